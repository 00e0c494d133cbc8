"""What FlashNorm relies on in PyTorch beyond its documented interface.

There are no functions here for ATen's operators (`torch.ops.aten.*`) and their `overloadpacket`, which a dispatch mode
gets. The table in `trace/rules/` uses them directly, because it is a table of these operators.
"""

import copy
import ctypes
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "TorchDispatchMode",  # sees every ATen operator, below autograd and composite operators
    "TorchFunctionMode",  # sees every call of a function or method of PyTorch, before it runs
    "calls_itself",
    "children",
    "compute_alone",
    "copy_with",
    "flat",
    "forward_hooks",
    "is_mutable",
    "map_flat",
    "memory_of",
    "note_reads",
    "other_hooks",
    "surroundings",
    "tree_leaves",  # the leaves of what a module takes or returns: lists, dictionaries, Transformers' outputs, ...
    "tree_map",  # the same nesting, with a function applied to each leaf
    "unsaved_buffers",
    "with_parameters",
    "without_modes",
    "written",
]

without_modes = _disable_current_modes
"""A context in which no dispatch mode is active."""


def memory_of(tensor: Tensor) -> int:
    """A number that is equal for two tensors if and only if they share memory, also on the meta device."""
    return tensor.untyped_storage()._cdata


def unsaved_buffers(module: nn.Module) -> Set[str]:
    """The names of a module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def copy_with(model: nn.Module, tensors: Mapping[Tensor, Tensor]) -> nn.Module:
    """A copy of a model with modules, configs and hooks of its own, and with other parameters and buffers.

    Unlike `copy.deepcopy`, it copies a model that holds what cannot be copied: a lock, say, which both then have.

    Args:
        model: any module.
        tensors: the model's parameters and buffers -> those of the copy. Other tensors are copied with their values.
            Functions are not copied: one that refers to the original model may still reach the original's tensors.
    """
    states = {module: vars(module).copy() for module in model.modules()}
    memo: dict[int, Any] = {id(tensor): other for tensor, other in tensors.items()}
    memo |= {id(module): type(module).__new__(type(module)) for module in states}
    for module, state in states.items():
        vars(memo[id(module)]).update({name: _copied(value, memo) for name, value in state.items()})
    return memo[id(model)]


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


def is_mutable(operator: Any) -> bool:
    """Whether an operator, as a dispatch mode gets it, writes into one of its arguments."""
    return operator._schema.is_mutable


def written(operator: Any, args: Any) -> list[Tensor]:
    """The tensors among an operator's positional arguments that it writes into."""
    declared = zip(operator._schema.arguments, args, strict=False)
    return [value for argument, value in declared if argument.is_write and isinstance(value, Tensor)]


def flat(arguments: Any) -> list[Any]:
    """The tensors, numbers and other values that an operator takes or returns, in order, out of their lists.

    An operator's schema nests them in nothing but lists, tuples and dictionaries. `tree_leaves` would find the same
    ones, but it looks for many kinds of nests, which took a third of a trace's time.
    """
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (list, tuple)):
        return [arguments]
    found: list[Any] = []
    for value in arguments:
        if isinstance(value, (list, tuple, dict)):
            found += flat(value)
        else:
            found.append(value)
    return found


def map_flat(function: Callable[[Any], Any], arguments: Any) -> Any:
    """The same arguments or results with a function applied to each value that `flat` finds."""
    if isinstance(arguments, dict):
        return {name: map_flat(function, value) for name, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(map_flat(function, value) for value in arguments)
    if isinstance(arguments, list):
        return [map_flat(function, value) for value in arguments]
    return function(arguments)


def compute_alone() -> None:
    """Make PyTorch's operators in the calling thread use only this thread, until the thread ends.

    Only for threads that FlashNorm starts, because nothing is restored. `torch.set_num_threads` would not do: threads
    that start later, including the user's, inherit its number. The OpenMP that PyTorch is linked to has a number for
    each thread, and this function sets it. Without OpenMP, nothing changes.
    """
    torch.get_num_threads()  # PyTorch sets OpenMP's number in the first call in a thread, so that call must come first
    set_number = getattr(_LIBRARY, "omp_set_num_threads", None)
    if set_number is not None:
        set_number(1)


_LIBRARY = ctypes.CDLL(torch._C.__file__)


class _NotedParameters(dict[str, nn.Parameter | None]):
    """A module's parameters; calls `noted` whenever one of them is read as an attribute of the module."""

    noted: Callable[[str], None]

    def __getitem__(self, name: str) -> nn.Parameter | None:
        self.noted(name)
        return super().__getitem__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def note_reads(module: nn.Module, noted: Callable[[str], None]) -> None:
    """From now on, call `noted` with the name of each parameter that is read as an attribute of the module."""
    parameters = _NotedParameters(module._parameters)
    parameters.noted = noted
    module._parameters = parameters


def with_parameters(
    module: nn.Module, parameters: Mapping[str, nn.Parameter | None], dtype: torch.dtype | None = None
) -> nn.Module:
    """A shallow copy of a module that has these parameters instead, and None for others; the module keeps its own.

    If a dtype is given, the copy has the module's floating-point buffers in this dtype.
    """
    probe = copy.copy(module)
    probe._parameters = dict.fromkeys(module._parameters) | dict(parameters)
    probe._buffers = {
        name: buffer.to(dtype) if buffer is not None and buffer.is_floating_point() else buffer
        for name, buffer in module._buffers.items()
    }
    return probe


def calls_itself(module: nn.Module) -> bool:
    """Whether a call of the module runs only its class's `forward`: it has no hook and no `forward` of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def other_hooks(module: nn.Module) -> list[object]:
    """The hooks on a module's inputs and gradients."""
    return [hook for name in _HOOKS for hook in module.__dict__[name].values()]


def forward_hooks(module: nn.Module) -> dict[int, object]:
    """The hooks on a module's output."""
    return module.__dict__["_forward_hooks"]


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's direct submodules by name (not copied)."""
    return module.__dict__["_modules"]


def surroundings() -> str | None:
    """What is active around the caller and has to see every operator or module; None if nothing is.

    A fused kernel is one opaque operator, so it would hide the model's operators from all of these.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces it"
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "there are hooks for all modules"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if torch._C._len_torch_dispatch_stack():
        return "a mode sees every operator"
    if torch._C._len_torch_function_stack() and not all(map(_only_sets_device, _function_modes())):
        return "a mode sees every function"
    if _functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms it"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients are on"
    return None


def _function_modes() -> list[object]:
    return torch.overrides._get_current_function_mode_stack()


def _only_sets_device(mode: object) -> bool:
    """Whether a mode is `with torch.device(...)`, which only sets the device of new tensors."""
    return type(mode).__name__ == "DeviceContext" and type(mode).__module__ == "torch.utils._device"
