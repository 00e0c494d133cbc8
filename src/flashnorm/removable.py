"""What of a model's norms can be left out: divisions that cancel, and means that can be zero. Data, JSON, and a table.

* A norm divides each token by one number, `r(x) = sqrt(mean(x^2) + eps)`. If everything that reads the norm is
  normalised again, that division *cancels* (FlashNorm, proposition 3). It is exact if the second norm's `eps` becomes
  `eps * r(x)^power`.
* A LayerNorm also subtracts a mean. If everything that writes into its input can be *centred*, that mean is zero, and
  the LayerNorm is an RMSNorm.
* Names of norms are modules, names of weights are module parameters. Nothing here reads a model: `trace/` finds all of
  this.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from flashnorm.plan import Kept, Writer, because, pattern

REMOVABLE_VERSION = 1


class Verdict(str, Enum):
    """What can be said of a norm's division."""

    CANCELS = "cancels"  # everything that reads the norm is normalised again
    IN_PART = "cancels in part"  # some of what reads it is, and something else needs the division
    STAYS = "stays"  # nothing that reads it is normalised again
    UNREAD = "nothing reads it"


@dataclass(frozen=True)
class Ending:
    """A norm in which a factor `1 / r(x)` cancels.

    Attributes:
        norm: the module of that norm.
        power: its `eps` becomes `eps * r(x)^power`, for all readers of the division together; None if it has none.
        dims: the dimensions of what that norm normalises that the tokens of `x` run along, one for each dimension of
            `x` but the last; None if they are in another order there, or not all of it is scaled.
    """

    norm: str
    power: float | None
    dims: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Reader:
    """What becomes of a norm's division behind one linear layer that reads the norm.

    Attributes:
        weight: the weight of the linear layer; None for what is not behind a linear layer.
        endings: the norms in which the division cancels.
        escapes: where the division is needed: the operators that do not commute with it.
    """

    weight: str | None
    endings: tuple[Ending, ...] = ()
    escapes: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class Division:
    """The division of a norm.

    Attributes:
        norm: the module in which it is.
        where: the module, and the line of its code.
        readers: what becomes of it, by what reads the norm.
        shared: one of the modules, of it and of those in which it cancels, that runs more than once in a forward; None
            if each runs once.
    """

    norm: str
    where: str | None
    readers: tuple[Reader, ...]
    shared: str | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether the division cancels."""
        ends = any(reader.endings for reader in self.readers)
        escapes = any(reader.escapes for reader in self.readers)
        if ends:
            return Verdict.IN_PART if escapes else Verdict.CANCELS
        return Verdict.STAYS if escapes else Verdict.UNREAD


@dataclass(frozen=True)
class Centring:
    """The mean that a LayerNorm subtracts.

    Attributes:
        norm: the module in which this is done.
        where: the module, and the line of its code.
        writers: the parameters that write into its input, all of them to be centred at once.
        escapes: why the mean stays; empty if it is zero as soon as the writers are centred.
    """

    norm: str
    where: str | None
    writers: tuple[Writer, ...]
    escapes: tuple[Kept, ...]

    @property
    def removable(self) -> bool:
        """Whether the LayerNorm becomes an RMSNorm."""
        return not self.escapes


@dataclass(frozen=True)
class Removable:
    """What of a model's norms can be left out. Immutable.

    Attributes:
        model_type: `config.model_type`, or the class name of a plain module.
        divisions: the division of every norm, in the order in which the model computes them.
        centrings: the mean of every LayerNorm, likewise.
    """

    model_type: str
    divisions: tuple[Division, ...] = ()
    centrings: tuple[Centring, ...] = ()

    def of_verdict(self, verdict: Verdict) -> list[Division]:
        """The divisions of which this can be said."""
        return [division for division in self.divisions if division.verdict is verdict]

    @property
    def centred(self) -> list[Centring]:
        """The LayerNorms that can become RMSNorms."""
        return [centring for centring in self.centrings if centring.removable]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        divisions = [
            asdict(one)
            | {"verdict": one.verdict.value}
            | {"readers": [asdict(reader) | _escapes(reader.escapes) for reader in one.readers]}
            for one in self.divisions
        ]
        centrings = [asdict(one) | {"removable": one.removable} | _escapes(one.escapes) for one in self.centrings]
        return {
            "version": REMOVABLE_VERSION,
            "model_type": self.model_type,
            "divisions": divisions,
            "centrings": centrings,
        }

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def division_rows(self) -> list["RemovableRow"]:
        """The divisions as rows of a table; what is the same in several layers is one row."""
        return _rows((one.norm, one.verdict.value, _of_division(one)) for one in self.divisions)

    def centring_rows(self) -> list["RemovableRow"]:
        """The means of LayerNorms as rows of a table, likewise."""
        return _rows(
            (one.norm, "can be zero" if one.removable else "stays", _of_centring(one)) for one in self.centrings
        )

    def division_summary(self) -> str:
        """One line that says how many divisions cancel."""
        whole, part = len(self.of_verdict(Verdict.CANCELS)), len(self.of_verdict(Verdict.IN_PART))
        if not whole + part:
            return f"{self.model_type}: {len(self.divisions)} divisions of norms, none of which cancels"
        return f"{self.model_type}: {len(self.divisions)} divisions of norms, {whole} cancel, {part} cancel in part"

    def centring_summary(self) -> str:
        """One line that says how many LayerNorms can become RMSNorms."""
        if not self.centrings:
            return f"{self.model_type}: no norm subtracts a mean"
        return (
            f"{self.model_type}: {len(self.centrings)} norms subtract a mean, {len(self.centred)} of which can become "
            "RMSNorms"
        )


@dataclass(frozen=True)
class RemovableRow:
    """A row of a table: a norm (`*` for a layer number), how many there are, the verdict, and the details."""

    norm: str
    count: int
    verdict: str
    what: str


def _escapes(reasons: Iterable[Kept]) -> dict[str, Any]:
    return {"escapes": [why.to_dict() for why in reasons]}


def _rows(entries: Iterable[tuple[str, str, str]]) -> list[RemovableRow]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for norm, verdict, what in entries:
        groups.setdefault((pattern(norm), verdict, pattern(what)), []).append(norm)
    return [
        RemovableRow(names[0] if len(names) == 1 else norm, len(names), verdict, what)
        for (norm, verdict, what), names in groups.items()
    ]


def _of_division(division: Division) -> str:
    lines: list[str] = []
    for reader in division.readers:
        found = [_of_ending(ending) for ending in reader.endings] + [because(why) for why in reader.escapes[:1]]
        lines.append(f"{reader.weight or 'directly'}: {'; '.join(found)}")
    return "\n".join(lines)


def _of_ending(ending: Ending) -> str:
    # Without `dims`, the norm may normalise together what is scaled and what is not.
    of = "" if ending.dims is not None else " of what is scaled"
    return f"cancels in {ending.norm}" + ("" if ending.power is None else f" (eps{of} * r^{ending.power:g})")


def _of_centring(centring: Centring) -> str:
    if centring.escapes:
        return because(centring.escapes[0])
    names = dict.fromkeys(pattern(f"{writer.name} (axis {writer.axis})") for writer in centring.writers)
    return "to centre: " + ", ".join(names)
