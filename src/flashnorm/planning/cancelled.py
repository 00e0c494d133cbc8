"""Which norms of a checkpoint need not be computed: those whose divisions cancel, in norms that take over their `eps`.

* No weight changes. A runtime that computes these norms computes the same.
* A norm counts if it does nothing but to divide: its gain has folded, and it has no bias.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from flashnorm.errors import InputError
from flashnorm.plan import Cancelled, Ending, FoldPlan, Form, Kept, Kind
from flashnorm.planning.names import StoredNames
from flashnorm.removable import Division, Verdict
from flashnorm.trace.planner import trace
from flashnorm.trace.scales import FACTORS, divisions


def plan_cancelled(plan: FoldPlan, names: StoredNames, folder: Path, form: Form) -> FoldPlan:
    """The plan with the norms that are not computed.

    Args:
        plan: the plan without them.
        names: how the checkpoint stores the model.
        folder: the checkpoint's folder, for messages.
        form: what becomes of `eps`.

    Raises:
        InputError: there is no such norm.
    """
    found = divisions(trace(names.model, None, FACTORS))
    removed = {name for fold in plan.folds for name in fold.removed}
    norms: dict[str, tuple[Ending, ...]] = {}
    kept: dict[str, Kept] = {}
    taken: set[str] = set()
    for division in found:
        if division.verdict is not Verdict.CANCELS:
            continue
        own = {f"{division.norm}.{name}" for name, _ in names.model.get_submodule(division.norm).named_parameters()}
        ends = _ends(division)
        if (why := _why_not(division, ends, taken, own - removed)) is not None:
            kept[division.norm] = Kept(why, where=division.where, kind=Kind.STOPPED)
        elif ends is not None:
            norms[division.norm] = ends
            taken |= {division.norm, *(one.norm for one in ends)}
    if norms:
        return replace(plan, cancelled=Cancelled(form, norms, kept))
    why = next((f": {name}: {one.reason}" for name, one in kept.items()), "")
    partly = sum(division.verdict is Verdict.IN_PART for division in found)
    raise InputError(
        f"{folder}: expected a norm whose division cancels, found none among {len(found)} ({partly} cancel in part)"
        f"{why}; `flashnorm plan --cancel` says what stops each; leave out --cancel"
    )


def confirmed(model: nn.Module, cancelled: Cancelled) -> Cancelled:
    """What of this the model's code, as it is installed now, still allows. A norm that is left out must be computed."""
    found = {
        division.norm: {*(_ends(division) or ())}
        for division in divisions(trace(model, None, FACTORS))
        if division.verdict is Verdict.CANCELS and division.shared is None
    }
    return replace(
        cancelled, norms={norm: ends for norm, ends in cancelled.norms.items() if found.get(norm) == {*ends}}
    )


def _ends(division: Division) -> tuple[Ending, ...] | None:
    """Where a division cancels, in the names of a plan; None if an `eps` or the order of tokens is not known."""
    found = dict.fromkeys(ending for reader in division.readers for ending in reader.endings)
    ends = tuple(
        Ending(one.norm, one.power, one.dims) for one in found if one.power is not None and one.dims is not None
    )
    return ends if len(ends) == len(found) == len({one.norm for one in found}) else None


def _why_not(division: Division, ends: tuple[Ending, ...] | None, taken: set[str], weights: set[str]) -> str | None:
    """Why a norm is computed although its division cancels; None if it need not be."""
    if weights:
        return f"{min(weights)} does not fold"
    if division.shared is not None:
        return f"{division.shared} runs more than once"
    if ends is None:
        return "it is not known which eps takes over"
    if {division.norm, *(one.norm for one in ends)} & taken:
        return "another division is cancelled in the same norm"
    return None
