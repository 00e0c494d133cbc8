"""A copy of a model to trace: the model itself is never changed, as it may be in use meanwhile."""

import copy
from typing import Any

from torch import Tensor, nn

from flashnorm.trace.build import on_meta


def meta_copy(model: nn.Module) -> tuple[nn.Module, dict[Tensor, Tensor]]:
    """A copy of a model on the meta device, with modules, configs and hooks of its own.

    No parameter or buffer is read, except for numbers of the code (`_is_constant`), which are copied to the CPU. Other
    tensors in the modules are copied with their values.

    Returns:
        The copy; and each parameter and buffer of the model -> the copy's. Functions are not copied: a function that
        refers to the original model may still reach the original's tensors.
    """
    tensors: dict[Tensor, Tensor] = {parameter: on_meta(parameter) for parameter in model.parameters()}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            constant = _is_constant(buffer) and name in module._non_persistent_buffers_set
            tensors[buffer] = buffer.detach().to("cpu", copy=True) if constant else on_meta(buffer)
    states = {module: vars(module).copy() for module in model.modules()}
    memo: dict[int, Any] = {id(tensor): blank for tensor, blank in tensors.items()}
    memo |= {id(module): type(module).__new__(type(module)) for module in states}
    for module, state in states.items():
        vars(memo[id(module)]).update({name: _copied(value, memo) for name, value in state.items()})
    return memo[id(model)], tensors


def _is_constant(buffer: Tensor) -> bool:
    """Whether a buffer that no checkpoint stores is one whole number, such as the stride of a convolution."""
    return buffer.dim() == 0 and not buffer.is_meta and not buffer.dtype.is_floating_point


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a value; a shallow copy if that fails (for a lock in it, say); the value itself if both fail."""
    before = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        for half_a_copy in list(memo)[before:]:
            del memo[half_a_copy]
    try:
        memo[id(value)] = copy.copy(value)
    except Exception:
        memo[id(value)] = value
    return memo[id(value)]
