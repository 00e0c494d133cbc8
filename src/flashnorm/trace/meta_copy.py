"""A copy of a model to trace: the model itself is never changed, as it may be in use meanwhile."""

from torch import Tensor, nn

from flashnorm.compat.torch import copy_with, unsaved_buffers
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
            constant = _is_constant(buffer) and name in unsaved_buffers(module)
            tensors[buffer] = buffer.detach().to("cpu", copy=True) if constant else on_meta(buffer)
    return copy_with(model, tensors), tensors


def _is_constant(buffer: Tensor) -> bool:
    """Whether a buffer that no checkpoint stores is one whole number, such as the stride of a convolution."""
    return buffer.dim() == 0 and not buffer.is_meta and not buffer.dtype.is_floating_point
