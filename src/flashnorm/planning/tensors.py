"""A fold plan turned round: what happens to each tensor, instead of where each norm folds.

The names are those of a checkpoint's tensors (`names.py`), or of a model's parameters (`by_parameter`). A checkpoint
need not have all tensors that are named.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from flashnorm.arithmetic import Gain, axis_gain, gain_of
from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan, Segments


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

    def gain(self, length: int, norms: Mapping[str, Tensor]) -> Gain:
        """The gain for each of `length` channels of the axis. `norms` holds each norm's stored weight, in any shape.

        Raises:
            ValueError: several norms multiply one channel, and their product cannot be held without rounding.
        """
        parts = [(gain_of(norms[use.norm].flatten(), use.offset), use.segments) for use in self.gains]
        return axis_gain(length, parts)


@dataclass(frozen=True)
class ShiftUse:
    """A norm bias `beta` that goes into the bias of a linear layer.

    Attributes:
        bias: the norm bias's tensor name in the source checkpoint.
        segments: which channel of the weight's axis takes which channel of `beta`, as in `GainUse`.
    """

    bias: str
    segments: Segments = ()


@dataclass(frozen=True)
class BiasFold:
    """What happens to the stored bias of a linear layer: it becomes `c + W beta`, for one norm bias or several.

    Attributes:
        weight: the tensor that holds `W`, of two axes; row `i` (column `i` for axis 0) belongs to element `i` of `c`.
        axis: the axis of `weight` that is contracted with `beta`.
        shifts: the norm biases.
    """

    weight: str
    axis: int
    shifts: tuple[ShiftUse, ...]


@dataclass(frozen=True)
class TensorPlan:
    """A fold plan in the names of a checkpoint's tensors, which the checkpoint need not have.

    Attributes:
        folds: tensor -> its fold. A tensor in `untied` is folded only if it is named here.
        biases: bias tensor of a linear layer -> the norm biases that it takes.
        divided: bias tensor of a norm -> the gain that it is divided by, because the gain folds and the bias stays.
        centred: tensor -> the axis over which its mean is subtracted. A tensor in `untied` is centred only if it is
            named here, and none is folded as well.
        norms: norm tensor that leaves the checkpoint -> its identity value (1.0; 0.0 for offset gains and for biases).
        spelled_out: those of `norms` that stay after all, at this value, as Transformers would initialise them to
            another one.
        untied: new tensor -> the source tensor whose values it copies (`lm_head.weight` -> the embedding).
        unties: whether the plan gives a tied output head a weight of its own. The source may hold a tensor for it
            already, as Transformers accepts; then `untied` is empty.
        parameters: norm tensor -> the module parameter that it is loaded into.
        shapes: tensor that holds a parameter, or a part of one -> the shape that the model's code expects.
    """

    folds: dict[str, TensorFold] = field(default_factory=dict)
    biases: dict[str, BiasFold] = field(default_factory=dict)
    divided: dict[str, GainUse] = field(default_factory=dict)
    centred: dict[str, int] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    spelled_out: tuple[str, ...] = ()
    untied: dict[str, str] = field(default_factory=dict)
    unties: bool = False
    parameters: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def without(self, norms: Collection[str]) -> "TensorPlan":
        """The same plan with some norm tensors (weights together with their biases) kept instead of folded."""
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

    def changed(self, other: "TensorPlan") -> set[str]:
        """The tensors of this plan that another plan treats differently."""
        parts = ("folds", "biases", "divided", "centred", "norms")
        pairs = [(getattr(self, part), getattr(other, part)) for part in parts]
        return {name for mine, its in pairs for name, what in mine.items() if its.get(name) != what}

    def about(self, tensors: Collection[str]) -> "TensorPlan":
        """What this plan does to some of the source's tensors, and to untied copies of them; nothing of the model."""
        names = {*tensors, *(new for new, source in self.untied.items() if source in tensors)}
        return TensorPlan(
            folds={name: fold for name, fold in self.folds.items() if name in names},
            biases={name: fold for name, fold in self.biases.items() if name in names},
            divided={name: use for name, use in self.divided.items() if name in names},
            centred={name: axis for name, axis in self.centred.items() if name in names},
            norms={name: identity for name, identity in self.norms.items() if name in names},
            spelled_out=tuple(name for name in self.spelled_out if name in names),
            untied=self.untied,
            unties=self.unties,
        )

    @property
    def read(self) -> set[str]:
        """The source's tensors that new values are computed from, besides those that take these values."""
        gains = {use.norm for fold in self.folds.values() for use in fold.gains}
        biases = self.biases.values()
        return {
            *gains,
            *(use.norm for use in self.divided.values()),
            *(self.untied.get(fold.weight, fold.weight) for fold in biases),
            *(shift.bias for fold in biases for shift in fold.shifts),
        }

    def tensors_of(self, parameters: Collection[str]) -> set[str]:
        """The norm tensors that are loaded into these module parameters."""
        return {name for name in self.norms if self.parameters.get(name, name) in parameters}


def by_parameter(plan: FoldPlan) -> TensorPlan:
    """What a plan does to each parameter of its model, in the model's own names.

    Raises:
        InputError: a weight would take gains on two of its axes.
    """
    axes: dict[str, int] = {}
    gains: dict[str, list[GainUse]] = defaultdict(list)
    weights: dict[str, str] = {}
    shifts: dict[str, list[ShiftUse]] = defaultdict(list)
    divided: dict[str, GainUse] = {}
    for fold in plan.folds:
        if fold.bias is not None and fold.bias_kept:
            divided[fold.bias] = GainUse(fold.norm, fold.offset)
        for linear in fold.linears:
            if axes.setdefault(linear.name, linear.axis) != linear.axis:
                raise InputError(
                    f"expected all gains of {linear.name} on axis {axes[linear.name]}, found axis {linear.axis} as well"
                )
            gains[linear.name].append(GainUse(fold.norm, fold.offset, linear.segments))
            if fold.bias is not None and fold.bias_removed and linear.bias is not None:
                weights[linear.bias] = linear.name
                shifts[linear.bias].append(ShiftUse(fold.bias, linear.segments))
    return TensorPlan(
        folds={name: TensorFold(axes[name], tuple(uses)) for name, uses in gains.items()},
        biases={name: BiasFold(weights[name], axes[weights[name]], tuple(uses)) for name, uses in shifts.items()},
        divided=divided,
        norms={name: identity for fold in plan.folds for name, identity in fold.removed.items()},
    )
