"""Makes norms weightless: removes the parameter and, where the norm's code allows it, the multiplication.

* What a norm module computes is measured, not guessed from its name: it is run with its weight at the identity value,
  on numbers small enough for eps to show.
* A module that accepts `weight = None` (LayerNorm, with or without bias) keeps its class. A plain RMSNorm becomes
  `WeightlessNorm`. Any other norm (a gated norm, a group norm) keeps its code, and a constant replaces its parameter.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flashnorm.compat.torch import calls_itself, with_parameters
from flashnorm.compat.transformers import forget_ties, keep_from_initialising
from flashnorm.trace.solve import names_by_parameter

_PROBE_TOKENS = 4


class WeightlessNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` over the last dimension, computed in float32 or wider, returned in the input's dtype.

    The class name does not contain "RMSNorm", because Transformers initialises `weight` in every class whose name does.

    Args:
        eps: added to the mean square.
    """

    # Called before each forward; see `adapters.py`. It is not a hook, because a layer with hooks is not fused.
    guard: Callable[[], object] | None = None

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[..., hidden size]`; the result has the same shape and dtype."""
        if self.guard is not None and not torch.compiler.is_compiling():
            self.guard()
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return F.rms_norm(wide, (wide.shape[-1],), eps=self.eps).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def make_weightless(model: nn.Module, norms: Mapping[str, float], readable: Collection[str] = ()) -> dict[str, float]:
    """Take the named norm weights out of a model, in place.

    Args:
        model: any module, on any device; the norms' gains are folded already, or will be loaded folded.
        norms: parameter name -> its identity value (1.0; 0.0 for offset gains and for biases).
        readable: names that code reads from outside of the norm, as Mamba's does for the dtype; each of these
            parameters is replaced by a constant.

    Returns:
        The names that are now constant buffers (which are not saved with the model) -> their value.
    """
    forget_ties(model, norms)
    constants: dict[str, float] = {}
    leaving: dict[str, dict[str, float]] = defaultdict(dict)
    for name, identity in norms.items():
        owner_name, _, attribute = name.rpartition(".")
        leaving[owner_name][attribute] = identity
    for owner_name, identities in leaving.items():
        owner = model.get_submodule(owner_name)
        present = dict(owner.named_parameters(recurse=False, remove_duplicate=False))
        identities = {name: one for name, one in identities.items() if name in present}
        if not identities:  # the module has two names, and was done under the other
            continue
        replacement = _without_weights(owner, identities)
        weights = {attribute: owner.get_parameter(attribute) for attribute in identities}
        if isinstance(replacement, WeightlessNorm):
            parent_name, _, child = owner_name.rpartition(".")
            # Code around the norm may read its settings.
            settings = {name: value for name, value in vars(owner).items() if not name.startswith("_")}
            vars(replacement).update(settings | vars(replacement))
            setattr(model.get_submodule(parent_name), child, replacement.train(owner.training))
            owner = replacement
        keep_from_initialising(owner)
        for attribute, weight in weights.items():
            owner.register_parameter(attribute, None)
            if replacement is None or f"{owner_name}.{attribute}" in readable:
                delattr(owner, attribute)
                constant = torch.full_like(weight, identities[attribute], requires_grad=False)
                owner.register_buffer(attribute, constant, persistent=False)
                constants[f"{owner_name}.{attribute}"] = identities[attribute]
    return constants


def under_all_names(model: nn.Module, norms: Mapping[str, float]) -> dict[str, float]:
    """The given parameters under all their names: a parameter has several if modules share it."""
    names = {alias: aliases for aliases in names_by_parameter(model).values() for alias in aliases}
    return {alias: identity for name, identity in norms.items() for alias in names[name]}


def _without_weights(module: nn.Module, leaving: Mapping[str, float]) -> nn.Module | None:
    """The module if it computes the same with these parameters None, a `WeightlessNorm` if that does, else None."""
    parameters = dict(module.named_parameters(recurse=False))
    if [*module.buffers()]:
        return None
    if any(parameters[attribute].dim() != 1 for attribute in leaving):
        return None
    channels = parameters[next(iter(leaving))].numel()
    generator = torch.Generator("cpu").manual_seed(1)
    values = {name: torch.rand(p.shape, generator=generator, device="cpu") for name, p in parameters.items()}
    values |= {name: torch.full((parameters[name].numel(),), one, device="cpu") for name, one in leaving.items()}
    if (expected := measured(module, values, channels)) is None:
        return None
    candidates: list[Callable[[torch.dtype], nn.Module]] = [
        lambda dtype: _with_parameters(module, values | dict.fromkeys(leaving), dtype)
    ]
    if len(parameters) == 1:
        epsilons = sorted({value for value in vars(module).values() if isinstance(value, float)})
        candidates += [lambda dtype, eps=eps: WeightlessNorm(eps) for eps in epsilons]
    for candidate in candidates:
        try:
            found = _outputs(candidate, channels)
        except Exception:  # its code needs a weight
            continue
        if all(same_outputs(a, b) for a, b in zip(found, expected, strict=True)):
            norm = candidate(torch.float32)
            return norm if isinstance(norm, WeightlessNorm) else module
    return None


def measured(module: nn.Module, values: Mapping[str, Tensor], channels: int) -> list[Tensor] | None:
    """A module's outputs for a few tokens (see `_outputs`), with other parameters; None if it cannot be run on them.

    Args:
        module: a module, on the CPU or the meta device.
        values: the values of its parameters.
        channels: how many channels a token has.
    """
    # A forward with more arguments (a gate, say) may use the weight in ways that this measurement does not show.
    if [*module.children()] or not _takes_one(module.forward) or not calls_itself(module):
        return None
    try:
        return _outputs(lambda dtype: _with_parameters(module, values, dtype), channels)
    except Exception:  # it does not take one tensor
        return None


def _takes_one(forward: Callable[..., Any]) -> bool:
    """Whether a function takes exactly one argument; `*args` and `**kwargs` count as more than one."""
    parameters = [*inspect.signature(forward).parameters.values()]
    return len(parameters) == 1 and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )


def _with_parameters(module: nn.Module, values: Mapping[str, Tensor | None], dtype: torch.dtype) -> nn.Module:
    """A copy of a module with the given parameters in a dtype; None removes a parameter."""
    cast = {
        name: None if value is None else nn.Parameter(value.to(dtype), requires_grad=False)
        for name, value in values.items()
    }
    return with_parameters(module, cast, dtype)


def _outputs(module_in: Callable[[torch.dtype], nn.Module], channels: int) -> list[Tensor]:
    """A module's outputs for a few tokens, in float32 and bfloat16, for values of ordinary size and small ones."""
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randn(_PROBE_TOKENS, channels, generator=generator, device="cpu")
    with torch.no_grad():
        return [
            module_in(dtype).forward((scale * tokens).to(dtype))
            for dtype in (torch.float32, torch.bfloat16)
            for scale in (1.0, 1e-3)
        ]


def same_outputs(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the order of a float32 sum (plain RMSNorm modules are equal bit for bit on the CPU)."""
    tolerance = 4 * torch.finfo(expected.dtype).eps
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=tolerance, atol=0.0)
