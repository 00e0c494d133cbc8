"""What PyTorch does around modules and operators without a public way to ask for it."""

import torch
from torch import nn
from torch.nn.modules import module as torch_module

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
    if torch.jit.is_tracing():
        return "torch.jit traces it"
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "there are hooks for all modules"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch._C._len_torch_dispatch_stack():
        return "a mode sees every operator"
    if torch._C._len_torch_function_stack() and not all(map(_only_sets_device, _function_modes())):
        return "a mode sees every function"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms it"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients are on"
    return None


def _function_modes() -> list[object]:
    return torch.overrides._get_current_function_mode_stack()


def _only_sets_device(mode: object) -> bool:
    """Whether a mode is `with torch.device(...)`, which says where new tensors are made."""
    return type(mode).__name__ == "DeviceContext" and type(mode).__module__ == "torch.utils._device"
