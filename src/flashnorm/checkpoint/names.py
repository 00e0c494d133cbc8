"""From module parameters to the tensors that a checkpoint stores, through transformers' own conversion mappings.

* What the module holds and what the file stores can differ: experts stacked or single, transposes, renamings, prefixes.
* No table of names: the mapping is run backwards on the model's meta parameters under the tracer, which sees where each
  stored tensor's elements come from, and so along which of its axes a gain goes.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from flashnorm.errors import InputError
from flashnorm.plan import Fold, FoldPlan, Linear, Segments
from flashnorm.trace.planner import names_by_parameter, segments_of
from flashnorm.trace.tracer import Tracer
from flashnorm.trace.values import UNKNOWN, View, along, constant_along, constant_except


@dataclass(frozen=True)
class GainUse:
    """A norm tensor whose gain multiplies one axis of a stored weight.

    Attributes:
        norm: the norm's tensor name in the source checkpoint.
        offset: the gain is `offset + w`.
        segments: `(axis_start, gain_start, length)` runs; empty: channel `i` takes gain `i` (see `plan.Linear`).
    """

    norm: str
    offset: float
    segments: Segments = ()


@dataclass(frozen=True)
class TensorFold:
    """What happens to one stored weight: the gains (nearly always one) that multiply its `axis`."""

    axis: int
    gains: tuple[GainUse, ...]


@dataclass(frozen=True)
class CheckpointPlan:
    """A fold plan in the names of a checkpoint's tensors. Whether they are there is for the reader of the files to say.

    Attributes:
        folds: tensor -> its fold. A tensor in `untied` is folded as well when it is named here.
        norms: norm tensor -> its identity value (1.0, or 0.0 for offset gains): these leave the checkpoint.
        untied: new tensor -> the source tensor whose values it copies (`lm_head.weight` -> the embedding).
        parameters: norm tensor -> the module parameter that it is loaded into.
        shapes: tensor, of those above -> the shape that the model expects.
    """

    folds: dict[str, TensorFold] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class StoredNames:
    """Under which names a checkpoint stores a model's parameters.

    Args:
        model: a transformers model, on any device; its values are not read.
        tensors: the names of the checkpoint's tensors.
    """

    def __init__(self, model: PreTrainedModel, tensors: Collection[str]):
        self._aliases = names_by_parameter(model)
        self._known: set[str] = set()
        self._present = tensors
        own = {alias: name for name, aliases in self._aliases.items() for alias in aliases}
        stored = _views_as_stored(model, own)
        spell = _spelling(model, [*stored, *own], tensors)
        self._views: dict[str, dict[str, View]] = defaultdict(dict)
        self._known = {spell(name) for name in [*stored, *own, *dict(model.named_buffers())]}
        for name, view in stored.items():
            if view is not None:
                self._views[view.name][spell(name)] = view
        for alias, name in own.items():
            # Where the file has the module's own layout (stacked experts, say), that is what will be loaded.
            if spell(alias) in tensors and not any(stored in tensors for stored in self._views[name]):
                self._views[name] = {spell(alias): View.of(name, model.get_parameter(name))}

    def views(self, parameter: str) -> dict[str, View]:
        """The tensors that hold a parameter, each as a view of it: all that there are, or all that there would be."""
        views = self._views[next(name for name, aliases in self._aliases.items() if parameter in aliases)]
        return {name: view for name, view in views.items() if name in self._present} or views

    def unread(self) -> list[str]:
        """The checkpoint's tensors that the model's code does not know (a multi-token-prediction head, say)."""
        return sorted(set(self._present) - self._known)


def checkpoint_plan(
    plan: FoldPlan, model: PreTrainedModel, tensors: Collection[str], tied: Mapping[str, str] | None = None
) -> CheckpointPlan:
    """Translate a plan into the names and axes of a checkpoint's tensors.

    Args:
        plan: the plan of `model`.
        model: the model that the plan was made from; its values are not read.
        tensors: the names of the checkpoint's tensors.
        tied: to untie: each name of a parameter that the source ties -> the name that the source stores.

    Raises:
        InputError: a parameter is stored in a way that the mapping does not show.
    """
    names = StoredNames(model, tensors)
    axes: dict[str, int] = {}
    gains: dict[str, list[GainUse]] = defaultdict(list)
    result = CheckpointPlan()
    for fold in plan.folds:
        norm, norm_view = _norm_tensor(names, fold)
        result.norms[norm] = fold.identity
        result.shapes[norm] = norm_view.stored_shape
        result.parameters[norm] = fold.norm
        size = model.get_parameter(fold.norm).numel()
        for linear in fold.linears:
            views = names.views(linear.name)
            if not views:
                raise InputError(
                    f"expected to see how checkpoints store {linear.name}, found that transformers hides it"
                )
            for tensor, view in views.items():
                axis, channels = _channels_along(linear, size, tensor, view)
                result.shapes[tensor] = view.stored_shape
                if axes.setdefault(tensor, axis) != axis:
                    raise InputError(
                        f"expected all gains of {tensor} on axis {axes[tensor]}, found axis {axis} as well"
                    )
                gains[tensor].append(GainUse(norm, fold.offset, segments_of(channels, size)))
                if tied and tensor not in tensors and linear.name in tied:
                    result.untied[tensor] = next(iter(names.views(tied[linear.name])))
    result.folds.update({tensor: TensorFold(axes[tensor], tuple(uses)) for tensor, uses in gains.items()})
    return result


def _norm_tensor(names: StoredNames, fold: Fold) -> tuple[str, View]:
    views = names.views(fold.norm)
    if len(views) != 1:
        raise InputError(f"expected {fold.norm} to be stored as one tensor, found {sorted(views) or 'none'}")
    return next(iter(views.items()))


def _channels_along(linear: Linear, gain_size: int, tensor: str, view: View) -> tuple[int, Tensor]:
    """The axis of a stored tensor that takes the gain, and the gain's channel for every index of it (-1: none)."""
    index = view.coordinates[linear.axis]
    dims = [dim for dim in range(index.dim()) if not constant_along(index, dim)]
    if len(dims) != 1 or not constant_except(index, dims[0]):
        raise InputError(f"expected one axis of {tensor} to be axis {linear.axis} of {linear.name}, found axes {dims}")
    channels = torch.full((view.shape[linear.axis],), UNKNOWN)
    for start, first, length in linear.segments or ((0, 0, gain_size),):
        channels[start : start + length] = torch.arange(first, first + length)
    return dims[0], channels[along(index, dims[0])]


@torch.inference_mode(False)
def _views_as_stored(model: PreTrainedModel, own: Mapping[str, str]) -> dict[str, View | None]:
    """Every tensor that transformers would save, as a view of the parameter that it comes from (None: of several)."""
    parameters = {name: model.get_parameter(name).to("meta") for name in dict.fromkeys(own.values())}
    tracer = Tracer(model, parameters)
    with tracer, torch.no_grad():
        stored = revert_weight_conversion(model, {alias: parameters[name] for alias, name in own.items()})
    return {name: tracer.value_of(tensor).view for name, tensor in stored.items()}


def _spelling(model: PreTrainedModel, names: Sequence[str], tensors: Collection[str]) -> Callable[[str], str]:
    """How the checkpoint spells names: as they are, or with the base model's prefix left out or put in front."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    spellings: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.removeprefix(prefix),
        lambda name: prefix + name,
    ]
    return max(spellings, key=lambda spell: sum(spell(name) in tensors for name in names))
