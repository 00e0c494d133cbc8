"""What is asked of PyTorch beyond its documented interface.

Used elsewhere without a function here, as they are what these interfaces are about: ATen's operators
(`torch.ops.aten.*`, the table of `trace/rules.py`) with `overloadpacket`, which a dispatch mode is handed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "TorchDispatchMode",  # sees every ATen operator, under all that autograd and composite operators do
    "TorchFunctionMode",  # sees every function and method of PyTorch that is called, before it runs
    "calls_itself",
    "is_mutable",
    "memory_of",
    "module_registrations",
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
