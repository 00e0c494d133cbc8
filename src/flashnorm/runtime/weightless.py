"""Makes norms weightless: no parameter, and no multiplication wherever the norm's own computation allows that.

* What a norm module computes is measured, not read off its name: with its weight at the identity value, on numbers
  small enough for eps to show.
* A module that accepts `weight = None` keeps its class. One that is a plain RMSNorm becomes `WeightlessNorm`. Anything
  else (a gated norm, a group norm) keeps its code, with a constant in the place of the parameter.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flashnorm.errors import InputError
from flashnorm.trace.planner import trace

_PROBE_TOKENS = 4


class WeightlessNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` over the last dimension, computed in float32 or wider, returned in the input's dtype.

    Its class name does not say RMSNorm, because transformers initialises `weight` in every class that does.

    Args:
        eps: added to the mean square.
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., hidden size]` to the same shape and dtype."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return F.rms_norm(wide, (wide.shape[-1],), eps=self.eps).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def make_weightless(model: nn.Module, norms: Mapping[str, float], readable: bool = False) -> dict[str, float]:
    """Take the named norm weights out of a model, in place.

    Args:
        model: any module, on any device; the norms' gains must be folded, or about to be loaded folded.
        norms: parameter name -> its identity value (1.0, or 0.0 for offset gains).
        readable: leave a constant under each weight's name, for code that reads its dtype from outside of the norm.

    Returns:
        The names that are now constant buffers (not saved with the model) -> their value.
    """
    constants: dict[str, float] = {}
    for name, identity in norms.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        replacement = _without_weight(owner, attribute, identity)
        weight = owner.get_parameter(attribute)
        if isinstance(replacement, WeightlessNorm):
            parent_name, _, child = owner_name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, replacement.train(owner.training))
            owner = replacement
        delattr(owner, attribute)
        if replacement is None or readable:
            constant = torch.full_like(weight, identity, requires_grad=False)
            owner.register_buffer(attribute, constant, persistent=False)
            constants[name] = identity
        else:
            owner.register_parameter(attribute, None)
    return constants


def needs_readable_weights(model: nn.Module, norms: Mapping[str, float], inputs: tuple[Any, ...] | None) -> bool:
    """Whether the model's code reads a norm's weight from outside of the norm (Mamba does, for its dtype).

    Tried on a copy on the meta device.

    Raises:
        InputError: the forward does not run there with constants either.
    """
    for readable in (False, True):
        memo = {id(tensor): _on_meta(tensor) for tensor in (*model.parameters(), *model.buffers())}
        blank = copy.deepcopy(model, memo)
        make_weightless(blank, norms, readable)
        try:
            trace(blank, inputs)
        except InputError:
            if readable:
                raise
        else:
            break
    return readable


def _on_meta(tensor: Tensor) -> Tensor:
    blank = tensor.detach().to("meta")
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank


def _without_weight(module: nn.Module, attribute: str, identity: float) -> nn.Module | None:
    """The module itself if it computes the same with its weight None, a `WeightlessNorm` if that does, else None."""
    weight = module.get_parameter(attribute)
    others = [*module.parameters(), *module.buffers(), *module.children()]
    # One that can be given more than a tensor (a gate, say) may do more with its weight than what is measured here.
    if weight.dim() != 1 or len(others) != 1 or len(inspect.signature(module.forward).parameters) != 1:
        return None
    ones = torch.full((weight.numel(),), identity, device="cpu")
    try:
        expected = _outputs(lambda dtype: _with_weight(module, attribute, ones.to(dtype)), weight.numel())
    except Exception:  # it does not take one tensor: no norm that we know
        return None
    epsilons = sorted({value for value in vars(module).values() if isinstance(value, float)})
    for candidate in [_with_weight(module, attribute, None), *map(WeightlessNorm, epsilons)]:
        try:
            found = _outputs(lambda dtype, candidate=candidate: candidate, weight.numel())
        except Exception:  # it insists on a weight
            continue
        if all(_same(a, b) for a, b in zip(found, expected, strict=True)):
            return candidate if isinstance(candidate, WeightlessNorm) else module
    return None


def _with_weight(module: nn.Module, attribute: str, weight: Tensor | None) -> nn.Module:
    """A copy of a module that has no other parameters, with this weight."""
    probe = copy.copy(module)
    probe._parameters = {attribute: None if weight is None else nn.Parameter(weight, requires_grad=False)}
    return probe


def _outputs(module_in: Callable[[torch.dtype], nn.Module], channels: int) -> list[Tensor]:
    """What a module makes of a few tokens, in float32 and bfloat16, of ordinary size and small."""
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randn(_PROBE_TOKENS, channels, generator=generator, device="cpu")
    with torch.no_grad():
        return [
            module_in(dtype).forward((scale * tokens).to(dtype))
            for dtype in (torch.float32, torch.bfloat16)
            for scale in (1.0, 1e-3)
        ]


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the order of a float32 sum (the modules that this is for are equal bit for bit on the CPU)."""
    tolerance = 4 * torch.finfo(expected.dtype).eps
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=tolerance, atol=0.0)
