"""Puts an RMSNorm in the place of each LayerNorm whose input has a mean of zero, because what writes it is centred.

* A centred checkpoint is a model of LayerNorms, and stays one: for a mean of zero, an RMSNorm computes the same. So the
  mean is left out only as long as it is known to be zero.
* It is subtracted again, for good, as soon as weights may change (`train`) or something else writes into the stream (an
  adapter), and if the loaded weights are not centred, since they were trained.
* Whether a module is a LayerNorm is measured, not guessed from its name. Any other module stays as it is.
* Embeddings that a caller gives in the place of ids are centred when they come in, as the model's own are.
"""

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from flashnorm.means import is_centred
from flashnorm.models.weightless import measured
from flashnorm.plan import Centred

# Of norms that have it in their code, and in no attribute.
_USUAL_EPS = (1e-5, 1e-6, 1e-12)


class CentredNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps) + bias` over the last dimension, in float32 or wider; or a LayerNorm.

    Args:
        eps: added to the mean square.
        weight, bias: what the LayerNorm has left of them, each `[hidden size]` or None.

    Attributes:
        subtracts_mean: whether it is a LayerNorm.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    # Called before each forward; see `adapters.py`.
    guard: Callable[[], object] | None = None

    def __init__(self, eps: float, weight: Tensor | None = None, bias: Tensor | None = None):
        super().__init__()
        self.eps = eps
        self.subtracts_mean = False
        self.register_parameter("weight", weight if isinstance(weight, nn.Parameter) else None)
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)

    def train(self, mode: bool = True) -> "CentredNorm":
        """Training changes what writes into the input, so the norm is a LayerNorm from then on."""
        self.subtracts_mean |= mode
        return super().train(mode)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[..., hidden size]`; the result has the same shape and dtype."""
        if self.guard is not None and not torch.compiler.is_compiling():
            self.guard()
        size = hidden_states.shape[-1:]
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        normed = F.layer_norm(wide, size, eps=self.eps) if self.subtracts_mean else F.rms_norm(wide, size, eps=self.eps)
        if self.weight is not None:
            normed = normed * self.weight
        if self.bias is not None:
            normed = normed + self.bias
        return normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, subtracts_mean={self.subtracts_mean}"


def put_rms_norms(
    model: nn.Module, centred: Centred, stored: Mapping[str, torch.dtype], readable: Collection[str] = ()
) -> list[str]:
    """Replace the LayerNorms that read centred sums, in place, if the model's weights are centred.

    Args:
        model: the model, with its weights.
        centred: the LayerNorms, and what is to be centred.
        stored: the dtype that each of these weights is stored in.
        readable: names that code reads from outside of the norm, as for `make_weightless`; such a norm stays.

    Returns:
        The modules that were replaced, without those that are no LayerNorms of a known kind.
    """
    if not all(is_centred(model.get_parameter(one.name), one.axis, stored[one.name]) for one in centred.writers):
        warnings.warn(
            "the model's LayerNorms stay what they are: config.json says that what writes into their inputs is "
            "centred, and it is not, or cannot be looked at; convert the model again if it was trained since",
            stacklevel=2,
        )
        return []
    replaced: list[str] = []
    everywhere = [*model.named_modules(remove_duplicate=False)]
    for name in centred.norms:
        owner = model.get_submodule(name)
        is_read = any(one.rpartition(".")[0] == name for one in readable)
        if is_read or (replacement := _rms_norm(owner)) is None:
            continue
        # Code around the norm may read its settings.
        settings = {key: value for key, value in vars(owner).items() if not key.startswith("_")}
        vars(replacement).update(settings | vars(replacement))
        replacement.training = owner.training
        for alias in (alias for alias, module in everywhere if module is owner):
            model.set_submodule(alias, replacement)
        replaced.append(name)
    if replaced:
        _centre_given_embeddings(model, {id(model.get_parameter(one.name)) for one in centred.writers})
    return replaced


class _GivenEmbeddings:
    """A hook that subtracts the means of a model's arguments at these places: each a name, and a position."""

    for_embeddings = True  # see `decoding/guard.py`

    def __init__(self, places: dict[str, int]):
        self.places = places

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = list(args)
        for name, position in self.places.items():
            if isinstance(kwargs.get(name), Tensor):
                kwargs = {**kwargs, name: _without_mean(kwargs[name])}
            elif position < len(given) and isinstance(given[position], Tensor):
                given[position] = _without_mean(given[position])
        return tuple(given), kwargs


def _without_mean(embeddings: Tensor) -> Tensor:
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return (wide - wide.mean(-1, keepdim=True)).to(embeddings.dtype)


def _centre_given_embeddings(model: nn.Module, centred: Collection[int]) -> None:
    """Prepare a model for `inputs_embeds` of any origin, if its own embedding (the id of a parameter) is centred."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        try:
            weight = getattr(part.get_input_embeddings(), "weight", None)
        except NotImplementedError:
            continue
        names = [*inspect.signature(part.forward).parameters]
        places = {name: position for position, name in enumerate(names) if name.endswith("inputs_embeds")}
        if places and id(weight) in centred:
            part.register_forward_pre_hook(_GivenEmbeddings(places), with_kwargs=True)


def subtract_means(model: nn.Module) -> None:
    """Make every `CentredNorm` of a model a LayerNorm, for good: what writes into its input is not centred any more."""
    for module in model.modules():
        if isinstance(module, CentredNorm):
            module.subtracts_mean = True


def _rms_norm(module: nn.Module) -> CentredNorm | None:
    """A `CentredNorm` with the parameters of a module, if the module is a LayerNorm; else None."""
    parameters = dict(module.named_parameters(recurse=False))
    sizes = {tuple(tensor.shape) for tensor in (*parameters.values(), *module.buffers(recurse=False))}
    sizes |= {tuple(getattr(module, "normalized_shape", ())) or next(iter(sizes), ())}
    if not parameters.keys() <= {"weight", "bias"} or len(sizes) != 1 or len(size := next(iter(sizes))) != 1:
        return None
    (channels,) = size
    generator = torch.Generator("cpu").manual_seed(1)
    values = {name: torch.rand(p.shape, generator=generator, device="cpu") for name, p in parameters.items()}
    expected = measured(module, values, channels)
    if expected is None:
        return None
    own = {value for value in vars(module).values() if isinstance(value, float)}
    for eps in sorted(own) or _USUAL_EPS:
        candidate = CentredNorm(eps, **parameters)
        candidate.subtracts_mean = True
        found = measured(candidate, values, channels)
        if found is not None and all(map(_same, found, expected)):
            candidate.subtracts_mean = False
            return candidate
    return None


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the order of float32 sums: a channel that is nearly the mean has the errors of the others."""
    of_sums = 4 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    rounding = 4 * torch.finfo(expected.dtype).eps
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=rounding, atol=of_sums)
