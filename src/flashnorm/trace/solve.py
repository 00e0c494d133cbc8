"""From a trace to a plan: a norm folds if nothing stops its gain and each weight that takes it does so in every use.

* Each norm is judged by itself: whether it folds does not depend on other norms.
* The reason for a kept norm is the first thing that stopped its gain, with the place where that happened.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from flashnorm.plan import Fold, FoldPlan, Kept, Kind, Linear, Segments
from flashnorm.trace.records import Records, unknown
from flashnorm.trace.tracer import Tracer
from flashnorm.trace.values import UNKNOWN

# The norm has no effect on the output: no weight takes its gain, and nothing stopped it.
NOTHING_READS_IT = Kept("nothing reads it", kind=Kind.UNREAD)


def solve(tracer: Tracer) -> FoldPlan:
    """The plan that follows from a trace of a model's forward."""
    records, model = tracer.records, tracer.model
    config = getattr(model, "config", None)
    parameters = dict(model.named_parameters())
    names = names_by_parameter(model)
    folds: list[Fold] = []
    kept: dict[str, Kept] = {}
    for norm, gain in records.gains.items():
        if not gain.is_norm:
            continue
        linears: list[Linear] = []
        reason = _stopped(records, norm)
        for name, uses in records.uses.items():
            if reason is None and any(norm in use.channels for use in uses):
                linear = _consistent(records, name, norm, parameters, names[name])
                if isinstance(linear, Kept):
                    reason = linear
                else:
                    linears.append(linear)
        if reason is None and not linears:
            reason = NOTHING_READS_IT
        if reason is None:
            reason = _unread(records, norm, parameters)
        bias = _norm_bias(records, norm)
        if reason is None and isinstance(bias, Kept):
            reason = bias
        if reason is None and not isinstance(bias, Kept):
            takers = _with_biases(records, norm, bias, linears) if bias else linears
            folds.append(Fold(norm, next(iter(gain.offsets)), tuple(takers), bias))
        elif reason is not None:
            kept[norm] = reason
    model_type = str(getattr(config, "model_type", "") or type(model).__name__)
    return FoldPlan(model_type=model_type, folds=tuple(folds), kept=kept)


def names_by_parameter(model: nn.Module) -> dict[str, list[str]]:
    """Each parameter's first name -> all its names; tied parameters have several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _stopped(records: Records, norm: str) -> Kept | None:
    """Why the gain itself cannot fold, whatever weights would take it; None if nothing stops it."""
    gain = records.gains[norm]
    if gain.escapes:
        return gain.escapes[0]
    if records.uses.get(norm):
        use = records.uses[norm][0].at
        reason = "the norm weight has another use than as a gain"
        why = unknown(reason) if use.kind is Kind.UNKNOWN else Kept(reason, kind=Kind.SHARED)
        return replace(why, operator=use.operator, where=use.where)
    if len(gain.offsets) != 1:
        return unknown(f"its gain is the weight plus {sorted(gain.offsets)}, depending on the place")
    return None


def _consistent(
    records: Records, name: str, norm: str, parameters: Mapping[str, Tensor], aliases: Sequence[str]
) -> Linear | Kept:
    """The linear layer's weight that takes the gain, if all uses of the weight agree; else why they do not."""
    uses = records.uses[name]
    axis = next(use.axis for use in uses if norm in use.channels)
    assert axis is not None
    size = parameters[name].shape[axis]
    nothing = torch.full((size,), UNKNOWN)
    channels, seen = nothing.clone(), torch.zeros(size, dtype=torch.bool)
    for use in uses:
        if use.axis is None:
            return _other_use(name, use.at, aliases)
        theirs = use.channels.get(norm, nothing)
        both = seen & use.touched
        if use.axis != axis or not torch.equal(channels[both], theirs[both]):
            reason = f"{name} would have to take it here, but not in another use of the same weight"
            return Kept(reason, use.at.operator, use.at.where, Kind.SHARED)
        channels = torch.where(use.touched, theirs, channels)
        seen |= use.touched
    if name in records.gains:
        reason = f"{name} would take it, but it also multiplies an activation channel by channel"
        return Kept(reason, kind=Kind.SHARED)
    return Linear(name, axis, segments_of(channels, parameters[norm].numel()))


def _norm_bias(records: Records, norm: str) -> str | Kept | None:
    """The norm's own bias, None if it has none; a reason to keep the norm if the bias is not this norm's alone."""
    biases = records.gains[norm].biases
    if not biases:
        return None
    if len(biases) > 1:
        return unknown(f"it goes with several biases, {', '.join(sorted(biases))}")
    bias = next(iter(biases))
    others = [use.at for use in records.uses[bias] if use.adds_to != norm]
    if others or bias in records.gains:
        at = others[0] if others else Kept("")
        return replace(unknown(f"its bias {bias} has another use"), operator=at.operator, where=at.where)
    return bias


def _with_biases(records: Records, norm: str, bias: str, linears: Sequence[Linear]) -> list[Linear]:
    """The linear layers, each with its bias `c` that takes the norm's bias; unchanged if one has no bias that can.

    The new bias `c + W beta` is one tensor, so it must be right in every use of `c`.
    """
    takers: list[Linear] = []
    for linear in linears:
        uses = records.uses[linear.name]
        own = uses[0].bias
        always = all(
            use.bias == own and bias in use.shifts and torch.equal(use.shifts[bias], use.channels[norm]) for use in uses
        )
        if own is None or not always or own in records.gains:
            return list(linears)
        if any(use.adds_to != linear.name for use in records.uses[own]):
            return list(linears)
        takers.append(replace(linear, bias=own))
    return takers


def _other_use(name: str, use: Kept, aliases: Sequence[str]) -> Kept:
    if len(aliases) > 1:
        tie = f"tied: {aliases[-1]} is {aliases[0]}, which {use.operator} reads without the gain"
        return Kept(tie, use.operator, use.where, Kind.TIED)
    if use.kind is Kind.UNKNOWN:
        return replace(use, reason=unknown(f"it also reads {name}, which would take it").reason)
    return replace(use, reason=f"{name} would take it, but {use.reason}", kind=Kind.SHARED)


def segments_of(channels: Tensor, gain_size: int) -> Segments:
    """Runs of consecutive channels as `(axis_start, gain_start, length)`; empty if every channel `i` takes gain `i`.

    Args:
        channels: `[axis size]`, the gain's channel for every index of the axis, -1 where there is none.
        gain_size: how many channels the gain has.
    """
    if torch.equal(channels, torch.arange(gain_size)):
        return ()
    segments: list[tuple[int, int, int]] = []
    for position, channel in enumerate(channels.tolist()):
        if channel == UNKNOWN:
            continue
        if segments:
            start, first, length = segments[-1]
            if position == start + length and channel == first + length:
                segments[-1] = (start, first, length + 1)
                continue
        segments.append((position, channel, 1))
    return tuple(segments)


def _unread(records: Records, norm: str, parameters: Mapping[str, Tensor]) -> Kept | None:
    """A reason to keep the norm if a module got its activation but left a parameter unread, as it may yet read it."""
    for module in sorted(records.gains[norm].received_by):
        prefix = f"{module}." if module else ""
        for name in parameters:
            if name.startswith(prefix) and not records.uses.get(name) and name not in records.gains:
                return replace(unknown(f"{name} may read it, but the trace did not reach it"), where=module)
    return None
