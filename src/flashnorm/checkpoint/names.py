"""From module parameters to the tensors that a checkpoint stores, through transformers' own conversion mappings.

* What the module holds and what the file stores can differ: experts stacked or single, transposes, renamings, prefixes.
* No table of names: the mapping is run backwards on the model's meta parameters under the tracer, which sees where each
  stored tensor's elements come from, and so along which of its axes a gain goes.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashnorm.checkpoint.initial import wrongly_initialised
from flashnorm.compat.transformers import as_stored, optional_tensors, prefix_of_base
from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan, Linear, Segments
from flashnorm.trace.planner import names_by_parameter, segments_of
from flashnorm.trace.tracer import Tracer
from flashnorm.trace.values import UNKNOWN, View, along, constant_along, constant_except, written_once


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
class ShiftUse:
    """A norm bias `beta` that goes into the bias of a linear.

    Attributes:
        bias: the norm bias's tensor name in the source checkpoint.
        segments: which channel of the weight's axis takes which channel of `beta`, as in `GainUse`.
    """

    bias: str
    segments: Segments = ()


@dataclass(frozen=True)
class BiasFold:
    """What happens to the stored bias of a linear: `c + W beta`, for one norm bias or several.

    Attributes:
        weight: the tensor that holds `W`, of two axes; row `i` (column `i` for axis 0) belongs to element `i` of `c`.
        axis: the axis of `weight` that is contracted with `beta`.
        shifts: the norm biases.
    """

    weight: str
    axis: int
    shifts: tuple[ShiftUse, ...]


@dataclass(frozen=True)
class CheckpointPlan:
    """A fold plan in the names of a checkpoint's tensors. Whether they are there is for the reader of the files to say.

    Attributes:
        folds: tensor -> its fold. A tensor in `untied` is folded as well when it is named here.
        biases: bias tensor of a linear -> the norm biases that it takes.
        divided: bias tensor of a norm -> the gain that it is divided by, since that leaves and the bias stays.
        norms: norm tensor -> its identity value (1.0; 0.0 for offset gains and biases): these leave the checkpoint.
        spelled_out: those that stay even so, at that value, because transformers would initialise them to another one.
        untied: new tensor -> the source tensor whose values it copies (`lm_head.weight` -> the embedding).
        parameters: norm tensor -> the module parameter that it is loaded into.
        shapes: tensor -> the shape that the model's code expects, of all that hold a parameter or a part of one.
    """

    folds: dict[str, TensorFold] = field(default_factory=dict)
    biases: dict[str, BiasFold] = field(default_factory=dict)
    divided: dict[str, GainUse] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    spelled_out: tuple[str, ...] = ()
    untied: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def without(self, norms: Collection[str]) -> "CheckpointPlan":
        """The same plan with some norm tensors (weights, and with them their biases) kept instead of folded."""
        folds = {
            name: replace(fold, gains=tuple(use for use in fold.gains if use.norm not in norms))
            for name, fold in self.folds.items()
        }
        biases = {
            name: replace(fold, shifts=tuple(shift for shift in fold.shifts if shift.bias not in norms))
            for name, fold in self.biases.items()
        }
        return replace(
            self,
            folds={name: fold for name, fold in folds.items() if fold.gains},
            biases={name: fold for name, fold in biases.items() if fold.shifts},
            divided={name: use for name, use in self.divided.items() if use.norm not in norms},
            norms={name: identity for name, identity in self.norms.items() if name not in norms},
            spelled_out=tuple(name for name in self.spelled_out if name not in norms),
            parameters={name: parameter for name, parameter in self.parameters.items() if name not in norms},
        )

    def changed(self, other: "CheckpointPlan") -> set[str]:
        """The tensors of this plan with which another plan does something else."""
        parts = ("folds", "biases", "divided", "norms")
        pairs = [(getattr(self, part), getattr(other, part)) for part in parts]
        return {name for mine, its in pairs for name, what in mine.items() if its.get(name) != what}

    def tensors_of(self, parameters: Collection[str]) -> set[str]:
        """The norm tensors that are loaded into these module parameters."""
        return {name for name in self.norms if self.parameters.get(name, name) in parameters}


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
        self._optional = optional_tensors(model)
        own = {alias: name for name, aliases in self._aliases.items() for alias in aliases}
        stored = _views_as_stored(model, own)
        spell = _spelling(model, stored, own, tensors)
        self._views: dict[str, dict[str, View]] = defaultdict(dict)
        self._views_in: dict[str, tuple[View, ...]] = {}
        self._known = {spell(name) for name in [*stored, *own, *dict(model.named_buffers())]}
        for name, views in stored.items():
            self._views_in[spell(name)] = views
            for view in views:
                self._views[view.name][spell(name)] = view
        for alias, name in own.items():
            # Where the file has the module's own layout (stacked experts, say), that is what will be loaded.
            if spell(alias) in tensors and not any(stored in tensors for stored in self._views[name]):
                view = View.of(name, model.get_parameter(name))
                self._views[name], self._views_in[spell(alias)] = {spell(alias): view}, (view,)

    def views(self, parameter: str) -> dict[str, View]:
        """The tensors that hold a parameter, each as a view of it: all that there are, or all that there would be."""
        views = self._views[next(name for name, aliases in self._aliases.items() if parameter in aliases)]
        return {name: view for name, view in views.items() if name in self._present} or views

    def parts(self, tensor: str) -> tuple[View, ...]:
        """The views of all parameters that a tensor holds: one, or several if it is joined of them."""
        return self._views_in[tensor]

    def copies(self, parameter: str) -> list[str]:
        """The tensors that hold a parameter whole: one, or several if modules share it.

        Raises:
            InputError: it is stored in parts, as a part, or not at all.
        """
        views = self.views(parameter)
        if not views or any(
            view.stored_shape != view.shape or len(self.parts(name)) > 1 for name, view in views.items()
        ):
            raise InputError(f"expected {parameter} to be stored as one tensor, found {sorted(views) or 'none'}")
        return list(views)

    def absent(self) -> list[str]:
        """The tensors that the model's code needs and the checkpoint lacks: of parameters that are not there whole."""
        missing: list[str] = []
        for views in self._views.values():
            sizes = {name: view.size for name, view in views.items() if view.shape}
            stored = sum(size for name, size in sizes.items() if name in self._present)
            # Of a parameter with several names, one is enough.
            if stored < max((math.prod(views[name].shape) for name in sizes), default=0):
                missing += [name for name in sizes if name not in self._present]
        return sorted({name for name in missing if not any(re.search(pattern, name) for pattern in self._optional)})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that the model's code expects of each tensor that holds a parameter, or a part of one."""
        views = [view for stored in self._views.values() for view in stored.items()]
        return {name: view.stored_shape for name, view in views if view.shape}

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
    shifts: dict[str, list[ShiftUse]] = defaultdict(list)
    weights: dict[str, str] = {}
    takers: dict[tuple[str, GainUse], set[str]] = defaultdict(set)
    result = CheckpointPlan(shapes=names.shapes())
    for fold in plan.folds:
        norm = names.copies(fold.norm)[0]
        for parameter, identity in fold.leaving.items():
            for tensor in names.copies(parameter):
                result.norms[tensor] = identity
                result.parameters[tensor] = parameter
        if fold.bias and fold.bias_stays:
            result.divided.update(dict.fromkeys(names.copies(fold.bias), GainUse(norm, fold.offset)))
        size = model.get_parameter(fold.norm).numel()
        for linear in fold.linears:
            views = names.views(linear.name)
            if not views:
                raise InputError(
                    f"expected to see how checkpoints store {linear.name}, found that transformers hides it"
                )
            for tensor, view in views.items():
                axis, channels = _channels_along(linear, size, tensor, view)
                if axes.setdefault(tensor, axis) != axis:
                    raise InputError(
                        f"expected all gains of {tensor} on axis {axes[tensor]}, found axis {axis} as well"
                    )
                segments = segments_of(channels, size)
                use = GainUse(norm, fold.offset, segments)
                takers[tensor, use].add(view.name)
                if use not in gains[tensor]:  # else another part of the tensor has brought it
                    gains[tensor].append(use)
                if linear.bias is not None and fold.bias is not None:
                    for bias in _biases_beside(names, linear, tensor, view):
                        shift = ShiftUse(names.copies(fold.bias)[0], segments)
                        if weights.setdefault(bias, tensor) == tensor and shift not in shifts[bias]:
                            shifts[bias].append(shift)  # else W is stored twice, or joined
    for (tensor, use), parameters in takers.items():
        _check_others(tensor, axes[tensor], use, [view for view in names.parts(tensor) if view.name not in parameters])
    for name, stored in (tied or {}).items():
        if model.get_parameter(name) is not model.get_parameter(stored):  # else it is tied in another way as well
            source = next(iter(names.views(stored)))
            result.untied.update({tensor: source for tensor in names.views(name) if tensor not in tensors})
    result.folds.update({tensor: TensorFold(axes[tensor], tuple(uses)) for tensor, uses in gains.items()})
    for bias, uses in shifts.items():
        result.biases[bias] = BiasFold(weights[bias], axes[weights[bias]], tuple(uses))
    identities = {result.parameters[tensor]: identity for tensor, identity in result.norms.items()}
    wrong = wrongly_initialised(model, identities)
    return replace(result, spelled_out=tuple(name for name in result.norms if result.parameters[name] in wrong))


def _biases_beside(names: StoredNames, linear: Linear, tensor: str, weight: View) -> list[str]:
    """The stored biases whose elements belong, one by one, to the outputs of a stored part of a linear's weight."""
    assert linear.bias is not None
    index = weight.coordinates[1 - linear.axis]
    outputs = [along(index, dim) for dim in range(index.dim()) if constant_except(index, dim)]
    views = names.views(linear.bias)
    found = [name for name, view in views.items() if any(torch.equal(o, view.coordinates[0]) for o in outputs)]
    if not found:
        raise InputError(
            f"expected the bias {linear.bias} to be stored as the weight {linear.name} is, in {tensor}, found it "
            f"in {sorted(views) or 'none'}"
        )
    return found


def _channels_along(linear: Linear, gain_size: int, tensor: str, view: View) -> tuple[int, Tensor]:
    """The axis of a stored tensor that takes the gain, and the gain's channel for every index of it (-1: none)."""
    index = view.coordinates[linear.axis]
    dims = [dim for dim in range(index.dim()) if not constant_along(index, dim)]
    if len(dims) != 1 or not constant_except(index, dims[0]):
        raise InputError(f"expected one axis of {tensor} to be axis {linear.axis} of {linear.name}, found axes {dims}")
    channels = torch.full((view.shape[linear.axis],), UNKNOWN)
    for start, first, length in linear.segments or ((0, 0, gain_size),):
        channels[start : start + length] = torch.arange(first, first + length)
    positions = along(index, dims[0])
    return dims[0], torch.where(positions == UNKNOWN, UNKNOWN, channels[positions])


def _check_others(tensor: str, axis: int, use: GainUse, others: Sequence[View]) -> None:
    """Refuse a gain that would multiply parameters that do not take it, since they are stored in the same tensor."""
    for view in others:
        held = written_once(view.mask, but=axis).movedim(axis, 0).flatten(1).any(1)
        runs = [held[start : start + length] for start, _, length in use.segments] or [held]
        if any(run.any() for run in runs):
            raise InputError(
                f"expected all of {tensor} to take the gain of {use.norm}, found that its part {view.name} does not"
            )


@torch.inference_mode(False)
def _views_as_stored(model: PreTrainedModel, own: Mapping[str, str]) -> dict[str, tuple[View, ...]]:
    """Every tensor that transformers would save, as views of the parameters that it comes from (none: it is hidden)."""
    parameters = {name: model.get_parameter(name).to("meta") for name in dict.fromkeys(own.values())}
    tracer = Tracer(model, parameters)
    with tracer, torch.no_grad():
        stored = as_stored(model, {alias: parameters[name] for alias, name in own.items()})
    values = {name: tracer.value_of(tensor) for name, tensor in stored.items()}
    return {name: (value.view,) if value.view else value.parts for name, value in values.items()}


def _spelling(
    model: PreTrainedModel, stored: Collection[str], own: Collection[str], tensors: Collection[str]
) -> Callable[[str], str]:
    """How the checkpoint spells names: as they are, or with the base model's prefix left out or put in front.

    Args:
        model: for its prefix.
        stored: the names under which transformers would save the parameters; these count.
        own: the module's names, which count where the others say nothing.
        tensors: the names of the checkpoint's tensors.
    """
    prefix = prefix_of_base(model)
    spellings: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.removeprefix(prefix),
        lambda name: prefix + name,
    ]
    return max(spellings, key=lambda spell: [sum(spell(name) in tensors for name in names) for names in (stored, own)])
