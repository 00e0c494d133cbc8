"""The plan: which norm folds into which linear layers, which norms are kept, and why. Data, JSON, and a table.

* Names are module parameters, as `model.named_parameters()` gives them; `planning/names.py` maps them to tensor names.
* A fold is the identity `W (g * x) = (W diag(g)) x` (FlashNorm, proposition 1), with `g = offset + weight`.
* Nothing here reads a model: `trace/` makes plans, and everything else reads plans.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from flashnorm.errors import InputError

PLAN_VERSION = 1

Segments = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer's weight that takes a gain.

    Attributes:
        name: the name of the module parameter.
        axis: the axis of the parameter that is contracted with the norm's output (1 for `nn.Linear`, 0 for `Conv1D`).
        segments: `(axis_start, gain_start, length)` runs: channel `axis_start + i` takes gain `gain_start + i`.
            Channels in no run do not change. Empty: channel `i` takes gain `i`.
        bias: the name of the layer's bias `c` if it takes the norm's bias `beta`, and so becomes `c + W beta`; or None.
    """

    name: str
    axis: int
    segments: Segments = ()
    bias: str | None = None


@dataclass(frozen=True)
class Fold:
    """A norm weight that is removed, and the linear layers that take its gain.

    Attributes:
        norm: the name of the norm's weight `w`. Its gain is `offset + w`, and its identity value is `1 - offset`.
        offset: 0.0 (Llama: the gain is `w`) or 1.0 (Gemma: the gain is `1 + w`).
        linears: the weight of every linear layer that reads the norm's output.
        bias: the name of the norm's own bias `beta` (LayerNorm, DyT), or None. If every linear layer has a bias that
            takes it, the norm's bias is removed. Otherwise it is kept and divided by the gain:
            `W (g * x + beta) = (W diag(g)) (x + beta / g)`.
    """

    norm: str
    offset: float
    linears: tuple[Linear, ...]
    bias: str | None = None

    @property
    def identity(self) -> float:
        """The value of the stored weight at which the norm multiplies by exactly one."""
        return 1.0 - self.offset

    @property
    def bias_removed(self) -> bool:
        """Whether the norm's bias is removed as well."""
        return self.bias is not None and all(linear.bias is not None for linear in self.linears)

    @property
    def bias_kept(self) -> bool:
        """Whether the norm has a bias that is kept, divided by the gain."""
        return self.bias is not None and not self.bias_removed

    @property
    def removed(self) -> dict[str, float]:
        """The norm's parameters that are removed -> the value at which each has no effect."""
        return {self.norm: self.identity} | ({self.bias: 0.0} if self.bias_removed and self.bias else {})


class Kind(str, Enum):
    """Why a norm is kept, for programs. `Kept.reason` says more, in words that may change between releases."""

    UNKNOWN = "unknown"  # folding may be possible: an operator has no rule, or the trace did not reach the code
    STOPPED = "stopped"  # folding is impossible: no gain passes an operator, or the model returns the norm's output
    SHARED = "shared"  # the weight that would take the gain, or the norm's own weight, has another use
    TIED = "tied"  # the weight that would take the gain is tied to another one: --untie may help
    UNREAD = "unread"  # nothing reads the norm
    QUANTISED = "quantised"  # the weight that would take the gain is stored quantised: it takes no exact gain
    VALUES = "values"  # the values of weights and gains do not allow an exact fold (a product overflows, say)
    ASKED = "asked"  # the caller asked for it


@dataclass(frozen=True)
class Kept:
    """Why a norm is kept.

    Attributes:
        reason: the reason in words.
        operator: the operator that stopped the gain, if there is one.
        where: the place in the model: module path, file and line.
        kind: the reason for programs; None where it is not known: a plan from a manifest does not store it.
    """

    reason: str
    operator: str | None = None
    where: str | None = None
    kind: Kind | None = None

    def to_dict(self) -> dict[str, str | None]:
        """As plain JSON values."""
        return dataclasses.asdict(self) | {"kind": self.kind and self.kind.value}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Kept":
        """Read back what `to_dict` gives."""
        kind = data.get("kind")
        return Kept(**{**data, "kind": None if kind is None else Kind(kind)})


@dataclass(frozen=True)
class Writer:
    """A parameter that writes into the input of LayerNorms.

    Attributes:
        name: the parameter.
        axis: its axis that runs over the channels of what is normalised; to centre the parameter is to subtract its
            mean over this axis.
    """

    name: str
    axis: int


@dataclass(frozen=True)
class Centred:
    """LayerNorms that become RMSNorms, as everything that writes into their inputs is centred.

    Attributes:
        norms: the modules of these LayerNorms.
        writers: the parameters that are centred.
        kept: the module of another LayerNorm -> why the mean of its input stays.
    """

    norms: tuple[str, ...] = ()
    writers: tuple[Writer, ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "norms": list(self.norms),
            "writers": {writer.name: writer.axis for writer in self.writers},
            "kept": {name: kept.to_dict() for name, kept in self.kept.items()},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Centred":
        """Read back what `to_dict` gives."""
        writers = tuple(Writer(str(name), int(axis)) for name, axis in data["writers"].items())
        kept = {str(name): Kept.from_dict(reason) for name, reason in data["kept"].items()}
        return Centred(tuple(map(str, data["norms"])), writers, kept)

    def rows(self) -> list["PlanRow"]:
        """Rows of a table; what is the same in several layers is one row."""
        whats = dict.fromkeys(self.norms, "becomes an RMSNorm")
        whats |= {name: f"stays a LayerNorm: {because(kept)}" for name, kept in self.kept.items()}
        return _rows(whats)


@dataclass(frozen=True)
class Ending:
    """A norm in which a division is cancelled: its `eps` becomes `eps * r(x)^power`.

    Attributes:
        norm: its module.
        power: the power of `r(x)`, the root that the cancelled norm would divide its input `x` by.
        dims: the dimensions of this norm's input that the tokens of `x` run along, one for each of `x` but the last.
    """

    norm: str
    power: float
    dims: tuple[int, ...]


class Form(str, Enum):
    """What becomes of `eps` where divisions are cancelled."""

    EXACT = "exact"  # it becomes `eps * r(x)^power`
    DROP = "drop"  # it stays, which is an approximation


@dataclass(frozen=True)
class Cancelled:
    """Norms that need not be computed, as everything that reads them is normalised again.

    Attributes:
        form: what becomes of `eps`; None if no norm is cancelled.
        norms: the module of such a norm -> the norms in which its division cancels.
        kept: the module of another norm whose division cancels -> why it is computed all the same.
    """

    form: Form | None = None
    norms: Mapping[str, tuple[Ending, ...]] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def keep(self, reasons: Mapping[str, Kept]) -> "Cancelled":
        """The same with the named norms computed, if they are among those that are not."""
        kept = {name: why for name, why in reasons.items() if name in self.norms}
        norms = {name: ends for name, ends in self.norms.items() if name not in kept}
        return Cancelled(self.form if norms else None, norms, {**self.kept, **kept}) if kept else self

    def listed(self) -> dict[str, Any]:
        """The form and the norms as plain JSON values."""
        norms = {
            name: [{"norm": one.norm, "power": one.power, "dims": list(one.dims)} for one in ends]
            for name, ends in sorted(self.norms.items())
        }
        return {"form": self.form and self.form.value, "norms": norms}

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self.listed() | {"kept": {name: kept.to_dict() for name, kept in self.kept.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Cancelled":
        """Read back what `to_dict` or `listed` gives. Raises KeyError, TypeError or ValueError if it is not that."""
        norms = {
            str(name): tuple(
                Ending(str(one["norm"]), float(one["power"]), tuple(map(int, one["dims"]))) for one in ends
            )
            for name, ends in dict(data["norms"]).items()
        }
        kept = {str(name): Kept.from_dict(reason) for name, reason in data.get("kept", {}).items()}
        return Cancelled(Form(data["form"]), norms, kept)

    def rows(self) -> list["PlanRow"]:
        """Rows of a table; what is the same in several layers is one row."""
        whats = {
            name: f"is not computed ({self.form and self.form.value}): cancels in {', '.join(one.norm for one in ends)}"
            for name, ends in self.norms.items()
        }
        return _rows(whats | {name: f"is computed: {because(kept)}" for name, kept in self.kept.items()})


@dataclass(frozen=True)
class FoldPlan:
    """Which norm folds into which linear layers, and which norms are kept and why. Immutable.

    Attributes:
        model_type: `config.model_type`, or the class name of a plain module.
        folds: the folds, in the order in which the model uses the norms.
        kept: name of a norm's weight -> why it is kept.
        centred: the LayerNorms that become RMSNorms, if that was asked for.
        cancelled: the norms that are not computed, if that was asked for.
    """

    model_type: str
    folds: tuple[Fold, ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict)
    centred: Centred = Centred()
    cancelled: Cancelled = field(default_factory=Cancelled)

    @property
    def norms(self) -> int:
        """How many norm weights the model has."""
        return len(self.folds) + len(self.kept)

    def keep(self, reasons: Mapping[str, Kept]) -> "FoldPlan":
        """The same plan with the named norms kept instead of folded. A norm that has its gain is computed."""
        folds = tuple(fold for fold in self.folds if fold.norm not in reasons)
        cancelled = self.cancelled.keep({name.rpartition(".")[0]: kept for name, kept in reasons.items()})
        return dataclasses.replace(self, folds=folds, kept={**self.kept, **reasons}, cancelled=cancelled)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "version": PLAN_VERSION,
            "model_type": self.model_type,
            "folds": [
                {
                    "norm": fold.norm,
                    "offset": fold.offset,
                    "bias": fold.bias,
                    "linears": [_linear_to_dict(linear) for linear in fold.linears],
                }
                for fold in self.folds
            ],
            "kept": {name: kept.to_dict() for name, kept in self.kept.items()},
            **({"centred": self.centred.to_dict()} if self.centred.norms else {}),
            **({"cancelled": self.cancelled.to_dict()} if self.cancelled.norms else {}),
        }

    def folds_hash(self) -> str:
        """SHA-256 of the folds, in hexadecimal: what an adapter for the folded model depends on."""
        data = self.to_dict()
        centred = [data["centred"]["writers"]] if self.centred.norms else []
        return hashlib.sha256(json.dumps([*data["folds"], *centred], sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON text; `FoldPlan.from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "FoldPlan":
        """Read a plan back from `to_dict`'s values.

        Raises:
            InputError: the data is not a plan, or one of another version.
        """
        try:
            if data["version"] != PLAN_VERSION:
                raise InputError(
                    f"expected a fold plan of version {PLAN_VERSION}, found version {data['version']!r}: "
                    "use the flashnorm release that wrote it, or convert again"
                )
            folds = tuple(
                Fold(
                    norm=str(fold["norm"]),
                    offset=float(fold["offset"]),
                    bias=_name_or_none(fold["bias"]),
                    linears=tuple(_linear_from_dict(linear) for linear in fold["linears"]),
                )
                for fold in data["folds"]
            )
            kept = {str(name): Kept.from_dict(reason) for name, reason in data["kept"].items()}
            centred = Centred.from_dict(data["centred"]) if "centred" in data else Centred()
            cancelled = Cancelled.from_dict(data["cancelled"]) if "cancelled" in data else Cancelled()
            return FoldPlan(str(data["model_type"]), folds, kept, centred, cancelled)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"expected a fold plan, found something else ({type(error).__name__}: {error})") from error

    @staticmethod
    def from_json(text: str) -> "FoldPlan":
        """Read a plan back from `to_json`'s text. Raises `InputError` if it is not one."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"expected a fold plan as JSON, found text that is not JSON ({error})") from error
        return FoldPlan.from_dict(data)

    def why_kept(self) -> str:
        """The end of a message that says why norms are kept; empty if none is."""
        reasons = list(dict.fromkeys(kept.reason for kept in self.kept.values()))
        return f"; why norms stay: {'; '.join(reasons[:5])}" if reasons else ""

    def rows(self) -> list["PlanRow"]:
        """The plan as rows of a table; what is the same in several layers is one row."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for fold in self.folds:
            into = ", ".join(_merge_numbers(f"{linear.name} (axis {linear.axis})" for linear in fold.linears))
            gain = "1 + w" if fold.offset else "w"
            beta = ", its bias into theirs" if fold.bias_removed else ", its bias is kept: beta / gain" * fold.bias_kept
            groups.setdefault((pattern(fold.norm), gain, "folds into " + pattern(into) + beta), []).append(fold.norm)
        for name, kept in self.kept.items():
            groups.setdefault((pattern(name), "", pattern(f"kept: {because(kept)}")), []).append(name)
        return [
            *(
                PlanRow(norm=names[0] if len(names) == 1 else norm, count=len(names), gain=gain, what=what)
                for (norm, gain, what), names in groups.items()
            ),
            *self.centred.rows(),
            *self.cancelled.rows(),
        ]

    def summary(self) -> str:
        """One line that says how many norms there are, how many are folded, and how many are kept."""
        linears = {linear.name for fold in self.folds for linear in fold.linears}
        return (
            f"{self.model_type}: {self.norms} norms, {len(self.folds)} folded into {len(linears)} linears, "
            f"{len(self.kept)} kept"
            + (f", {len(self.centred.norms)} LayerNorms become RMSNorms" if self.centred.norms else "")
            + (f", {len(self.cancelled.norms)} not computed" if self.cancelled.norms else "")
        )


@dataclass(frozen=True)
class PlanRow:
    """A row of the table: a norm (`*` for a layer number), how many there are, the form of the gain, what happens."""

    norm: str
    count: int
    gain: str
    what: str

    @property
    def kept(self) -> bool:
        """Whether the row is about something else than a fold; then it shows no gain."""
        return not self.gain


def _rows(whats: Mapping[str, str]) -> list[PlanRow]:
    """Modules of norms, and what happens to them, as rows of a table."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, what in whats.items():
        groups.setdefault((pattern(name), pattern(what)), []).append(name)
    return [
        PlanRow(names[0] if len(names) == 1 else norm, len(names), "", what) for (norm, what), names in groups.items()
    ]


def because(kept: Kept) -> str:
    """A reason with its operator and its place."""
    at = [part for part in (kept.operator, kept.where and f"at {kept.where}") if part]
    return kept.reason + (f" [{' '.join(at)}]" if at else "")


def _linear_to_dict(linear: Linear) -> dict[str, Any]:
    data: dict[str, Any] = {"name": linear.name, "axis": linear.axis}
    if linear.segments:
        data["segments"] = [list(segment) for segment in linear.segments]
    if linear.bias is not None:
        data["bias"] = linear.bias
    return data


def _linear_from_dict(data: Mapping[str, Any]) -> Linear:
    segments = tuple((int(a), int(g), int(n)) for a, g, n in data.get("segments", ()))
    return Linear(
        name=str(data["name"]), axis=int(data["axis"]), segments=segments, bias=_name_or_none(data.get("bias"))
    )


def _name_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"a bias named {value!r}")
    return value


def pattern(name: str) -> str:
    """A name with `*` for its numbers, so that what is the same in several layers has one name."""
    return re.sub(r"(?<=\.)\d+(?=[. ]|$)", "*", name)


def _merge_numbers(names: Iterable[str]) -> list[str]:
    """Names with `*` for their numbers, without repetition, so that the experts of a layer are one entry."""
    return list(dict.fromkeys(pattern(name) for name in names))
