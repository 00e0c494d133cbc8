"""A plan summed up as one layer of each kind: removed norms, the linear layers that took them, kept norms and why."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from flashnorm.plan import FoldPlan

_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")


@dataclass(frozen=True)
class NormInLayer:
    """What happens to one norm of a layer. Names are relative to the layer, with `*` for further numbers in them.

    Attributes:
        name: name of the norm's weight.
        gain: "w" or "1 + w" if the norm is removed, None if it is kept.
        linears: names of the linear layers' weights that took the gain.
        why: why the norm is kept, with the operator and the place in the code.
    """

    name: str
    gain: str | None
    linears: tuple[str, ...] = ()
    why: str | None = None


@dataclass(frozen=True)
class LayerKind:
    """The layers in which the same norms are removed and kept.

    Attributes:
        stack: name of the list of layers, for instance "model.layers"; empty for norms outside of any layer.
        layers: numbers of the layers; empty for norms outside of any layer.
        norms: what happens to the norms of each layer, removed norms first.
    """

    stack: str
    layers: tuple[int, ...]
    norms: tuple[NormInLayer, ...]

    @property
    def title(self) -> str:
        """The layers in words, for instance "model.layers 0-2, 4"."""
        return f"{self.stack} {_ranges(self.layers)}" if self.layers else "outside the layers"


def layer_kinds(plan: FoldPlan) -> list[LayerKind]:
    """The kinds of layers of a plan, in the order in which the model uses them."""
    found: dict[tuple[str, int | None], list[NormInLayer]] = {}
    for fold in plan.folds:
        place, prefix, name = _place(fold.norm)
        linears = dict.fromkeys(_starred(linear.name.removeprefix(prefix)) for linear in fold.linears)
        norm = NormInLayer(_starred(name), "1 + w" if fold.offset else "w", tuple(linears))
        found.setdefault(place, []).append(norm)
    for full, kept in plan.kept.items():
        place, prefix, name = _place(full)
        at = ", ".join(part for part in (kept.operator, kept.where) if part)
        why = kept.reason + (f" ({at})" if at else "")
        norm = NormInLayer(_starred(name), None, why=_starred(why.replace(prefix, "") if prefix else why))
        found.setdefault(place, []).append(norm)
    groups: dict[tuple[str, tuple[NormInLayer, ...]], list[int]] = {}
    for (stack, number), norms in found.items():
        numbers = groups.setdefault((stack, tuple(dict.fromkeys(norms))), [])
        if number is not None:
            numbers.append(number)
    return [LayerKind(stack, tuple(sorted(numbers)), norms) for (stack, norms), numbers in groups.items()]


def _place(name: str) -> tuple[tuple[str, int | None], str, str]:
    """The layer that a parameter is in, the prefix of that layer's names, and the rest of the name."""
    match = _LAYER.match(name)
    if match is None:
        return ("", None), "", name
    stack, number, rest = match.groups()
    return (stack, int(number)), f"{stack}.{number}.", rest


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=[. ),]|$)", "*", name)


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in ascending order as text: 0-2, 4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
