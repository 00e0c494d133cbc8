"""An adapter that was trained on a source -> what becomes of each of its tensors in an adapter for the folded model.

Which factor takes which gain is read off the plan, by the module that the factor belongs to. What cannot be exact is
refused, with the reason and the way on.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashnorm.errors import InputError
from flashnorm.files.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from flashnorm.files.header import TensorInfo
from flashnorm.files.reader import Checkpoint
from flashnorm.planning.adapter_kinds import WAY_ON, AdapterKind, adapter_kind
from flashnorm.planning.adapter_places import Place, Places
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import ShiftUse, TensorFold

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Constant:
    """The constant that a LoRA adds to a layer's output because the layer's inputs lack a norm's bias `beta`.

    `B A (g * x + beta) = B (A diag(g)) x + B A beta`, and PEFT multiplies `lora_B.bias` by the same scale as `B A x`.

    Attributes:
        a, b: the tensors of `A` (of the source's adapter) and `B`.
        before: the tensor of the bias that `B` has already; None if it has none.
        shifts: the norm biases, named by tensors of the source; none for a layer without such a constant.
    """

    a: str
    b: str
    before: str | None
    shifts: tuple[ShiftUse, ...]


@dataclass(frozen=True)
class SavedBias:
    """A layer's bias that the adapter holds: it becomes `c + W beta`, as the bias of the folded model did.

    Attributes:
        weight: the tensor of `W`.
        in_adapter: whether this is a tensor of the adapter; otherwise one of the source.
        axis: the axis of `weight` that is contracted with `beta`.
        shifts: the norm biases, named by tensors of the source.
    """

    weight: str
    in_adapter: bool
    axis: int
    shifts: tuple[ShiftUse, ...]


@dataclass(frozen=True)
class Magnitude:
    """DoRA's magnitudes `m` of a layer's outputs. With `V = W + s B A`, they become `m * norm(V diag(g)) / norm(V)`.

    Attributes:
        weight: the source's tensor of `W`.
        folded: the tensor of `W diag(g)` in the folded model.
        fold: the gains that `weight` takes.
        a, b: the tensors of `A` (of the source's adapter) and `B`.
        scale: `s`.
    """

    weight: str
    folded: str
    fold: TensorFold
    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class AdapterPlan:
    """What becomes of an adapter's tensors. Those that are named nowhere stay as they are.

    Attributes:
        kind: the kind of the adapter, as PEFT names it.
        folds: tensor -> the gains that it takes, named by tensors of the source.
        constants: tensor of a bias of `lora_B`, which may be new -> the constant to add. If there are any, the config
            gets `lora_bias`.
        biases: tensor of a layer's bias -> the norm biases to add.
        magnitudes: tensor of DoRA's magnitudes -> how they are corrected.
    """

    kind: str
    folds: dict[str, TensorFold] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    biases: dict[str, SavedBias] = field(default_factory=dict)
    magnitudes: dict[str, Magnitude] = field(default_factory=dict)

    @property
    def norms(self) -> set[str]:
        """The norm tensors of the source whose gains are used."""
        folds = [*self.folds.values(), *(magnitude.fold for magnitude in self.magnitudes.values())]
        return {use.norm for fold in folds for use in fold.gains}

    @property
    def changed(self) -> set[str]:
        """The tensors that do not stay as they are, new ones among them."""
        return {*self.folds, *self.constants, *self.biases, *self.magnitudes}


def plan_adapter(adapter: Checkpoint, planned: PlannedCheckpoint) -> AdapterPlan:
    """Plan the conversion of an adapter.

    Args:
        adapter: the adapter, trained on the source.
        planned: the source, with the plan that its conversion follows.

    Raises:
        InputError: the adapter cannot be converted exactly, or does not belong to the source.
    """
    return _Planner(adapter, planned).plan()


class _Planner:
    def __init__(self, adapter: Checkpoint, planned: PlannedCheckpoint):
        self._config = adapter.config
        self._where = adapter.folder / ADAPTER_CONFIG
        self._file = adapter.folder / ADAPTER_WEIGHTS
        self._tensors: Mapping[str, TensorInfo] = adapter.tensors
        self._source = planned.checkpoint
        self._unties = planned.tensors.unties
        self._kind: AdapterKind = adapter_kind(adapter.config, self._where)
        self._places = Places(planned)
        self._plan = AdapterPlan(str(adapter.config.get("peft_type")))
        self._nested = dict(self._nested_parameters())

    def plan(self) -> AdapterPlan:
        if self._unties and (self._config.get("ensure_weight_tying") or self._trains_tokens()):
            raise self._refusal(
                "trains what the tied embedding and output head share, and the FlashNorm version has untied them"
            )
        layers: dict[str, dict[str, str]] = {}
        for tensor in self._tensors:
            if tensor in self._kind.shared:
                continue
            ending = self._kind.ending(tensor)
            if ending is None:
                self._saved(tensor)
            else:
                layers.setdefault(tensor.removesuffix(f".{ending}"), {})[ending] = tensor
        for layer, parts in layers.items():
            self._layer(layer.removeprefix(_PREFIX), parts)
        if any(constant.shifts for constant in self._plan.constants.values()):
            self._check_constants()
        else:
            self._plan.constants.clear()
        return self._plan

    def _layer(self, layer: str, parts: dict[str, str]) -> None:
        """Plan the tensors of one layer: `parts` is ending -> tensor."""
        place = self._place_of(layer, parts)
        self._check_whole(layer, parts)
        if any(end.startswith("ln_tuning") for end in parts):
            if place.leaves:
                raise self._refusal(f"trains {place.name}, a norm that folds", self._of_norm(place))
            return
        if place.fold is None:
            groups = getattr(place.module, "groups", 1)
            if isinstance(groups, int) and groups > 1:
                raise self._refusal(f"changes {place.name}, a grouped convolution, through which gains may pass")
            if self._kind.constants and "lora_A.weight" in parts and not self._nested.get(layer):
                self._constant(parts, ())
            return
        if self._kind.stuck:
            raise self._refusal(f"reads {self._norms(place)} in {place.name}: {self._kind.stuck}")
        if self._kind.commutes:
            self._commutes(place, parts)
            return
        found = [(end, tensor) for end, tensor in parts.items() if end in self._kind.inputs]
        if not found:
            raise self._refusal(f"changes {place.name} in a way that is not known: {', '.join(sorted(parts))}")
        if (first := parts.get("lokr_w1") or parts.get("lokr_w1_b")) is not None:
            columns = self._shape(first)[-1:]
            if columns != (1,):
                raise self._refusal(
                    f"changes {place.name} by a Kronecker product, which times a gain is no such product unless its "
                    f"first factor has one column; found shape {list(self._shape(first))}"
                )
        for end, tensor in found:
            self._factor(place, layer, end, tensor, parts)
        if (magnitude := parts.get("lora_magnitude_vector") or parts.get("lora_magnitude_vector.weight")) is not None:
            self._magnitude(place, layer, magnitude, parts)
        elif self._kind.constants and layer not in self._nested:
            self._constant(parts, place.shifts)
            return
        if place.shifts:
            raise self._refusal(
                f"reads the bias {place.shifts[0].bias} of a norm in {place.name}, which is in the layer's bias now, "
                "and this kind of adapter cannot add a constant"
            )

    def _check_whole(self, layer: str, parts: dict[str, str]) -> None:
        """Refuse a LoRA that lacks one of its factors, or has factors of different ranks."""
        a, b = (parts.get(f"lora_{half}.weight") or parts.get(f"lora_{half}") for half in "AB")
        if (a is None) != (b is None) or (a and b and self._shape(a)[:1] != self._shape(b)[1:2]):
            found = ", ".join(f"{tensor} {list(self._shape(tensor))}" for tensor in parts.values())
            raise InputError(
                f"{self._file}: expected both factors of a LoRA for {layer}, of one rank, found {found}; save the "
                "adapter again"
            )

    def _factor(self, place: Place, layer: str, ending: str, tensor: str, parts: dict[str, str]) -> None:
        """A factor takes the gain along its axis of input channels."""
        assert place.fold is not None
        axis, length = self._kind.inputs[ending], place.shape[place.fold.axis]
        if (inputs := self._axis_of_inputs(place, layer)) is not None and inputs != place.fold.axis:
            # PEFT takes the parameter's other axis for that of the inputs, so `B` has the channels of the gain.
            tensor, axis = parts["lora_B.weight"], 0
        self._check_length(tensor, axis, length, place)
        self._plan.folds[tensor] = TensorFold(axis, place.fold.gains)

    def _axis_of_inputs(self, place: Place, layer: str) -> int | None:
        """The axis that PEFT takes for the inputs of a parameter that is adapted itself; None for a layer's weight."""
        if layer not in self._nested or len(place.shape) not in (2, 3):
            return None
        if len(place.shape) == 2 or not getattr(place.module, "is_transposed", False):
            return len(place.shape) - 1
        return 1

    def _commutes(self, place: Place, parts: dict[str, str]) -> None:
        rows, _ = (*self._shape(next(iter(parts.values()))), 0)[:2]
        if place.shifts and rows == 1:  # one row: it scales the inputs
            raise self._refusal(
                f"scales the inputs of {place.name}, and so the bias {place.shifts[0].bias} of a norm, which is in the "
                "layer's bias now"
            )

    def _magnitude(self, place: Place, layer: str, tensor: str, parts: dict[str, str]) -> None:
        assert place.fold is not None
        stored = self._places.stored(place.name)
        if stored is None or self._shape(parts["lora_B.weight"])[0] != place.shape[1 - place.fold.axis]:
            raise self._refusal(
                f"is a DoRA, whose magnitudes need the weight {place.name} as one matrix, and the source stores it in "
                "another form"
            )
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        self._plan.magnitudes[tensor] = Magnitude(*stored, place.fold, a, b, self._scale(layer, self._shape(a)[0]))

    def _scale(self, layer: str, rank: int) -> float:
        """The factor of `B A` (PEFT's `scaling`)."""
        patterns: Mapping[str, Any] = self._config.get("alpha_pattern") or {}
        try:
            found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
            alpha = float(next(found, self._config.get("lora_alpha", 8)))
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise InputError(
                f"{self._where}: expected lora_alpha and alpha_pattern as PEFT writes them, found something else "
                f"({error}); save the adapter again"
            ) from error
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _constant(self, parts: dict[str, str], shifts: tuple[ShiftUse, ...]) -> None:
        b = parts["lora_B.weight"]
        name = b.removesuffix("weight") + "bias"
        before = name if name in self._tensors else None
        self._plan.constants[name] = Constant(parts["lora_A.weight"], b, before, shifts)

    def _check_constants(self) -> None:
        """PEFT has `lora_bias` for a whole adapter, and not for every form of LoRA."""
        if self._nested or any(self._kind.ending(tensor) == "lora_embedding_A" for tensor in self._tensors):
            raise self._refusal(
                "reads the bias of a norm, and PEFT has no lora_bias for an adapter of embeddings or of parameters"
            )
        if self._config.get("use_dora"):
            raise self._refusal("reads the bias of a norm, and PEFT has no lora_bias for DoRA")

    def _saved(self, tensor: str) -> None:
        """A parameter of the model itself, saved whole: `modules_to_save`, or trained biases."""
        name = tensor.removeprefix(_PREFIX).replace(".base_layer.", ".")
        place = self._places.find(name)
        if place is None:
            raise self._unknown(tensor)
        if place.leaves:
            raise self._refusal(f"holds {place.name}, a trained parameter of a norm that folds", self._of_norm(place))
        if place.fold is not None:
            self._check_length(tensor, place.fold.axis, place.shape[place.fold.axis], place)
            self._plan.folds[tensor] = place.fold
            if place.shifts and not self._holds_bias(tensor):
                raise self._refusal(
                    f"holds the trained weight {place.name} without its bias, which has taken {place.shifts[0].bias} "
                    "through the weight of the source"
                )
        if place.sums is not None and place.sums.shifts:
            own = tensor.removesuffix("bias") + "weight"
            stored = (own, own) if own in self._tensors else self._places.stored(place.sums.weight)
            if stored is None:
                raise self._refusal(
                    f"holds the bias {place.name}, which takes the bias of a norm through {place.sums.weight}, and the "
                    "source stores that in another form"
                )
            self._plan.biases[tensor] = SavedBias(stored[0], own in self._tensors, place.sums.axis, place.sums.shifts)

    def _holds_bias(self, weight: str) -> bool:
        return weight.removesuffix("weight") + "bias" in self._tensors

    def _place_of(self, layer: str, parts: dict[str, str]) -> Place:
        parameter = self._nested.get(layer) or f"{layer}.weight"
        place = self._places.find(parameter)
        if place is None:
            raise self._unknown(next(iter(parts.values())))
        return place

    def _nested_parameters(self) -> Iterator[tuple[str, str]]:
        """Name of a layer in the adapter -> the parameter that it adapts, for `target_parameters`.

        PEFT nests its wrappers of a module's parameters in the order in which the module has them, the first innermost.
        """
        targets = [str(target) for target in self._config.get("target_parameters") or ()]
        for name, module in self._places.planned.model.named_modules():
            own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            found = [one for one in own if any(one == target or one.endswith(f".{target}") for target in targets)]
            for number, parameter in enumerate(found):
                yield name + ".base_layer" * (len(found) - 1 - number), parameter

    def _trains_tokens(self) -> bool:
        return any(tensor.endswith("trainable_tokens_delta") for tensor in self._tensors)

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self._tensors[tensor].shape

    def _check_length(self, tensor: str, axis: int, length: int, place: Place) -> None:
        shape = self._shape(tensor)
        if len(shape) <= axis or shape[axis] != length:
            raise InputError(
                f"{self._file}: expected {length} channels along axis {axis} of {tensor}, as {place.name} has inputs, "
                f"found shape {list(shape)}; was the adapter trained on {self._source.folder}?"
            )

    def _norms(self, place: Place) -> str:
        assert place.fold is not None
        return ", ".join(use.norm for use in place.fold.gains)

    def _of_norm(self, place: Place) -> str:
        return (
            f"convert the source with --keep {place.name!r}, which keeps that norm, and the adapter for it; or {WAY_ON}"
        )

    def _unknown(self, tensor: str) -> InputError:
        return InputError(
            f"{self._file}: expected parts of modules of {self._source.folder}, found {tensor}, which is none that is "
            f"known; name the model that the adapter was trained on, or {WAY_ON}"
        )

    def _refusal(self, found: str, way_on: str = WAY_ON) -> InputError:
        return InputError(
            f"{self._file}: expected an adapter that can be converted exactly, found one that {found}; {way_on}"
        )
