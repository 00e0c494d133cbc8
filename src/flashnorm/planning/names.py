"""From module parameters to the tensors that a checkpoint stores, through Transformers' own conversion mappings.

* A model's parameters and a file's tensors can differ: experts stacked or single, transposes, renamings, prefixes.
* There is no table of names. The mapping is run backwards on the model's meta parameters under the tracer, which sees
  where each stored tensor's elements come from, and so which of its axes takes a gain.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashnorm.compat.transformers import as_stored, optional_tensors, prefix_of_base
from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan, Segments
from flashnorm.planning.initial import wrongly_initialised
from flashnorm.planning.tensors import BiasFold, GainUse, ShiftUse, TensorFold, TensorPlan, by_parameter
from flashnorm.trace.solve import names_by_parameter, segments_of
from flashnorm.trace.tracer import Tracer
from flashnorm.trace.values import UNKNOWN, View, along, constant_along, constant_except, written_once

# What formats of quantised weights store beside the numbers of a weight: these pieces alone are no weight.
_BESIDE_NUMBERS = re.compile(r"(bias|scales?|scale_inv|zeros|zero_point|shape|g_idx)$")


class StoredNames:
    """Under which names a checkpoint stores a model's parameters.

    Args:
        model: a Transformers model, on any device; its values are not read.
        tensors: the names of the checkpoint's tensors.
        views: the result of `stored_views` for the model, if it is known already.
    """

    def __init__(
        self, model: PreTrainedModel, tensors: Collection[str], views: dict[str, tuple[View, ...]] | None = None
    ):
        self.model = model
        self._aliases = names_by_parameter(model)
        self._present = tensors
        self._optional = optional_tensors(model)
        own = {alias: name for name, aliases in self._aliases.items() for alias in aliases}
        self._stored = stored_views(model) if views is None else views
        spell = _spelling(model, self._stored, own, tensors)
        self._views: dict[str, dict[str, View]] = defaultdict(dict)
        self._views_in: dict[str, tuple[View, ...]] = {}
        self._known = {spell(name) for name in [*self._stored, *own, *dict(model.named_buffers())]}
        for name, parts in self._stored.items():
            self._views_in[spell(name)] = parts
            for view in parts:
                self._views[view.name][spell(name)] = view
        for alias, name in own.items():
            # If the file has the module's own layout (stacked experts, say), Transformers loads that.
            if spell(alias) in tensors and not any(stored in tensors for stored in self._views[name]):
                view = View.of(name, model.get_parameter(name))
                self._views[name], self._views_in[spell(alias)] = {spell(alias): view}, (view,)
        self._pieces: dict[str, list[str]] = defaultdict(list)
        for name in self.unread():
            if (whole := _whole_of(name, self._known)) is not None:
                self._pieces[whole].append(name)

    def in_new_files(self) -> "StoredNames":
        """The names under which Transformers would save the model, whatever this checkpoint holds."""
        return StoredNames(self.model, (), self._stored)

    def has(self, tensor: str) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return tensor in self._present

    def pieces(self, tensor: str) -> list[str]:
        """The checkpoint's tensors that the model's code does not know and that belong to one that it knows.

        In this way formats store a quantised weight: `q_proj.qweight` and `q_proj.scales` for `q_proj.weight`,
        `gate_up_proj_blocks` for `gate_up_proj`. A bias that the code does not know is no such piece.
        """
        return self._pieces.get(tensor, [])

    def numbers(self, tensor: str) -> list[str]:
        """Those of a tensor's pieces that hold its numbers, and not only scales."""
        return [piece for piece in self.pieces(tensor) if not _BESIDE_NUMBERS.search(piece)]

    def holds(self, tensor: str) -> bool:
        """Whether the checkpoint has a tensor, as it is or in pieces."""
        return self.has(tensor) or bool(self.numbers(tensor))

    def views(self, parameter: str) -> dict[str, View]:
        """The tensors that hold a parameter -> their views of it: those of the checkpoint, else those of a new file."""
        views = self._views[next(name for name, aliases in self._aliases.items() if parameter in aliases)]
        return {name: view for name, view in views.items() if name in self._present} or views

    def parts(self, tensor: str) -> tuple[View, ...]:
        """The views of the parameters that a tensor holds: one view, or several if parameters were joined to it."""
        return self._views_in[tensor]

    def copies(self, parameter: str) -> list[str]:
        """The tensors that hold a parameter whole: one, or several if modules share it.

        Raises:
            InputError: the parameter is split over tensors, is joined to others in a tensor, or is not stored at all.
        """
        views = self.views(parameter)
        if not views or any(
            view.stored_shape != view.shape or len(self.parts(name)) > 1 for name, view in views.items()
        ):
            raise InputError(f"expected {parameter} to be stored as one tensor, found {sorted(views) or 'none'}")
        return list(views)

    def absent(self) -> list[str]:
        """The tensors that the model needs and the checkpoint lacks, for parameters that it does not hold whole."""
        missing: list[str] = []
        for views in self._views.values():
            sizes = {name: view.size for name, view in views.items() if view.shape}
            stored = sum(size for name, size in sizes.items() if self.holds(name))
            # For a parameter that can be stored under several names, one tensor is enough.
            if stored < max((math.prod(views[name].shape) for name in sizes), default=0):
                missing += [name for name in sizes if not self.holds(name)]
        return sorted({name for name in missing if not any(re.search(pattern, name) for pattern in self._optional)})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that the model's code expects of each tensor that holds a parameter, or a part of one."""
        views = [view for stored in self._views.values() for view in stored.items()]
        return {name: view.stored_shape for name, view in views if view.shape}

    def unread(self) -> list[str]:
        """The checkpoint's tensors that the model's code does not know (a multi-token-prediction head, say)."""
        return sorted(set(self._present) - self._known)


def _whole_of(piece: str, known: Collection[str]) -> str | None:
    """The known tensor that a tensor belongs to, by its name: it begins with that tensor's, or is in its module."""
    module, _, leaf = piece.rpartition(".")
    starts = [piece[: found.start()] for found in re.finditer(r"[._]", piece)]
    wholes = [name for name in (f"{module}.weight", *reversed(starts)) if name in known]
    return wholes[0] if wholes and leaf != "bias" else None


def tensor_plan(plan: FoldPlan, names: StoredNames, tied: Mapping[str, str] | None = None) -> TensorPlan:
    """Translate a plan into the names and axes of a checkpoint's tensors.

    Args:
        plan: the plan of a model.
        names: how the checkpoint stores that model.
        tied: what to untie: each further name of a parameter that the source ties -> the name that the source stores.

    Raises:
        InputError: a parameter is stored in a way that the mapping does not show.
    """
    model, of_parameters = names.model, by_parameter(plan)
    norms = {tensor: name for name in of_parameters.norms for tensor in names.copies(name)}
    folds: dict[str, TensorFold] = {}
    takers: dict[tuple[str, GainUse], set[str]] = defaultdict(set)
    for parameter, fold in of_parameters.folds.items():
        for use in fold.gains:
            for tensor, view, axis, segments in _stored_axes(names, parameter, fold.axis, use):
                known = folds.setdefault(tensor, TensorFold(axis, ()))
                if known.axis != axis:
                    raise InputError(f"expected all gains of {tensor} on axis {known.axis}, found axis {axis} as well")
                stored = GainUse(names.copies(use.norm)[0], use.offset, segments)
                takers[tensor, stored].add(view.name)
                if stored not in known.gains:  # else another part of the tensor has added it
                    folds[tensor] = replace(known, gains=(*known.gains, stored))
    for (tensor, use), parameters in takers.items():
        others = [view for view in names.parts(tensor) if view.name not in parameters]
        _check_others(tensor, folds[tensor].axis, use, others)
    own = {
        name: stored
        for name, stored in (tied or {}).items()
        if model.get_parameter(name) is not model.get_parameter(stored)  # else untying leaves them tied
    }
    untied: dict[str, str] = {}
    for name, stored in own.items():
        # The file may hold one of the two, or both.
        sources = sorted((*names.views(stored), *names.views(name)), key=names.has, reverse=True)
        untied |= {tensor: sources[0] for tensor in sources if not names.has(tensor)}
    wrong = wrongly_initialised(model, of_parameters.norms)
    return TensorPlan(
        folds=folds,
        biases=_stored_biases(names, of_parameters),
        divided={
            tensor: replace(use, norm=names.copies(use.norm)[0])
            for bias, use in of_parameters.divided.items()
            for tensor in names.copies(bias)
        },
        norms={tensor: of_parameters.norms[name] for tensor, name in norms.items()},
        spelled_out=tuple(tensor for tensor, name in norms.items() if name in wrong),
        untied=untied,
        unties=bool(own),
        parameters=norms,
        shapes=names.shapes(),
    )


def _stored_axes(
    names: StoredNames, parameter: str, axis: int, use: GainUse | ShiftUse
) -> Iterator[tuple[str, View, int, Segments]]:
    """Each tensor that holds a linear layer's weight, its view of the weight, and its axis and segments for `use`."""
    norm = use.norm if isinstance(use, GainUse) else use.bias
    size = names.model.get_parameter(norm).numel()
    views = names.views(parameter)
    if not views:
        raise InputError(f"expected to see how checkpoints store {parameter}, found that transformers hides it")
    for tensor, view in views.items():
        stored_axis, channels = _channels_along(parameter, axis, use.segments, size, tensor, view)
        yield tensor, view, stored_axis, segments_of(channels, size)


def _stored_biases(names: StoredNames, of_parameters: TensorPlan) -> dict[str, BiasFold]:
    folds: dict[str, BiasFold] = {}
    for parameter, fold in of_parameters.biases.items():
        for shift in fold.shifts:
            for tensor, view, axis, segments in _stored_axes(names, fold.weight, fold.axis, shift):
                for bias in _biases_beside(names, parameter, fold, tensor, view):
                    known = folds.setdefault(bias, BiasFold(tensor, axis, ()))
                    stored = ShiftUse(names.copies(shift.bias)[0], segments)
                    if known.weight == tensor and stored not in known.shifts:  # else W is stored twice, or joined
                        folds[bias] = replace(known, shifts=(*known.shifts, stored))
    return folds


def _biases_beside(names: StoredNames, bias: str, fold: BiasFold, tensor: str, weight: View) -> list[str]:
    """The stored biases whose elements belong, one by one, to the output channels of a stored part of a weight."""
    index = weight.coordinates[1 - fold.axis]
    outputs = [along(index, dim) for dim in range(index.dim()) if constant_except(index, dim)]
    views = names.views(bias)
    found = [name for name, view in views.items() if any(torch.equal(o, view.coordinates[0]) for o in outputs)]
    if not found:
        raise InputError(
            f"expected the bias {bias} to be stored as the weight {fold.weight} is, in {tensor}, found it in "
            f"{sorted(views) or 'none'}"
        )
    return found


def _channels_along(
    parameter: str, axis: int, segments: Segments, gain_size: int, tensor: str, view: View
) -> tuple[int, Tensor]:
    """The axis of a stored tensor that takes a gain, and the gain's channel for each index of the axis (-1: none)."""
    index = view.coordinates[axis]
    dims = [dim for dim in range(index.dim()) if not constant_along(index, dim)]
    if len(dims) != 1 or not constant_except(index, dims[0]):
        raise InputError(f"expected one axis of {tensor} to be axis {axis} of {parameter}, found axes {dims}")
    channels = torch.full((view.shape[axis],), UNKNOWN)
    for start, first, length in segments or ((0, 0, gain_size),):
        channels[start : start + length] = torch.arange(first, first + length)
    positions = along(index, dims[0])
    return dims[0], torch.where(positions == UNKNOWN, UNKNOWN, channels[positions])


def _check_others(tensor: str, axis: int, use: GainUse, others: Sequence[View]) -> None:
    """Refuse a gain that would also multiply parameters that do not take it but are stored in the same tensor."""
    for view in others:
        held = written_once(view.mask, but=axis).movedim(axis, 0).flatten(1).any(1)
        runs = [held[start : start + length] for start, _, length in use.segments] or [held]
        if any(run.any() for run in runs):
            raise InputError(
                f"expected all of {tensor} to take the gain of {use.norm}, found that its part {view.name} does not"
            )


@torch.inference_mode(False)
def stored_views(model: PreTrainedModel) -> dict[str, tuple[View, ...]]:
    """Every tensor that Transformers would save -> its views of the parameters (none if the mapping hides them)."""
    own = {alias: name for name, aliases in names_by_parameter(model).items() for alias in aliases}
    parameters = {name: model.get_parameter(name).to("meta") for name in dict.fromkeys(own.values())}
    tracer = Tracer(model, parameters)
    with tracer, torch.no_grad():
        stored = as_stored(model, {alias: parameters[name] for alias, name in own.items()})
    values = {name: tracer.value_of(tensor) for name, tensor in stored.items()}
    return {name: (value.view,) if value.view else value.parts for name, value in values.items()}


def _spelling(
    model: PreTrainedModel, stored: Collection[str], own: Collection[str], tensors: Collection[str]
) -> Callable[[str], str]:
    """How the checkpoint spells names: unchanged, or with the base model's prefix left out or put in front.

    Each also as releases spelled norms that were made after TensorFlow's, which Transformers still reads.

    Args:
        model: the model whose base model's prefix is meant.
        stored: the names under which Transformers would save the parameters; they decide.
        own: the module's names; they decide if `stored` fits several spellings equally well.
        tensors: the names of the checkpoint's tensors.
    """
    prefix = prefix_of_base(model)
    prefixed: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.removeprefix(prefix),
        lambda name: prefix + name,
    ]
    spellings = [*prefixed, *(lambda name, spell=spell: _as_in_tensorflow(spell(name)) for spell in prefixed)]
    return max(spellings, key=lambda spell: [sum(spell(name) in tensors for name in names) for names in (stored, own)])


def _as_in_tensorflow(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
