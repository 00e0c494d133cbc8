"""What is asked of PyTorch beyond its documented interface.

Used elsewhere without a function here, as they are what these interfaces are about: ATen's operators
(`torch.ops.aten.*`, the table of `trace/rules.py`) with `overloadpacket`, which a dispatch mode is handed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "TorchDispatchMode",  # sees every ATen operator, under all that autograd and composite operators do
    "TorchFunctionMode",  # sees every function and method of PyTorch that is called, before it runs
    "calls_itself",
    "children",
    "forward_hooks",
    "has_hooks",
    "is_mutable",
    "memory_of",
    "module_registrations",
    "surroundings",
    "tree_leaves",  # all that is in nested lists, tuples and dictionaries, in order; anything else is a leaf itself
    "tree_map",  # the same nest, with a function's results for its leaves
    "with_parameters",
    "without_modes",
    "written",
]

without_modes = _disable_current_modes
"""A context in which no dispatch mode is active."""


def memory_of(tensor: Tensor) -> int:
    """A number that tensors have in common if and only if they share memory, on the meta device too."""
    return tensor.untyped_storage()._cdata


def is_mutable(operator: Any) -> bool:
    """Whether an operator, as a dispatch mode is handed it, writes into one of its arguments."""
    return operator._schema.is_mutable


def written(operator: Any, args: Any) -> list[Tensor]:
    """The tensors among an operator's positional arguments that it writes into."""
    declared = zip(operator._schema.arguments, args, strict=False)
    return [value for argument, value in declared if argument.is_write and isinstance(value, Tensor)]


@contextmanager
def module_registrations(seen: Callable[[], None]) -> Iterator[None]:
    """Call a function whenever a module becomes part of another one, in any thread."""

    def hook(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        seen()

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def with_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> nn.Module:
    """A shallow copy of a module with these parameters for its own, which keeps those that it has."""
    probe = copy.copy(module)
    probe._parameters = dict(parameters)
    return probe


def calls_itself(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward` and nothing else: no hook, and no `forward` of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has a hook on its inputs or its gradients."""
    return any(module.__dict__[name] for name in _HOOKS)


def forward_hooks(module: nn.Module) -> dict[int, object]:
    """The hooks on a module's output."""
    return module.__dict__["_forward_hooks"]


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's direct submodules by name, without a copy."""
    return module.__dict__["_modules"]


def surroundings() -> str | None:
    """What is going on around the caller that has to see every operator or every module; None if nothing is.

    A fused kernel is one opaque operator: it would be passed over by all of these.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces it"
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "there are hooks for all modules"
    if torch.is_autocast_enabled("cpu"):
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
    """Whether a mode is `with torch.device(...)`, which says where new tensors are made."""
    return type(mode).__name__ == "DeviceContext" and type(mode).__module__ == "torch.utils._device"
