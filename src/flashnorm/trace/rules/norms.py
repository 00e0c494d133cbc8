"""Norms that are one operator, and the biases of norms."""

from dataclasses import replace

import torch
from torch import Tensor

from flashnorm.trace.records import unknown
from flashnorm.trace.rules.call import Call
from flashnorm.trace.rules.nonlinear import stop
from flashnorm.trace.values import PLAIN, UNKNOWN, Value, View


def rms_norm(call: Call) -> list[Value]:
    """`_fused_rms_norm`: input, normalised shape, weight."""
    return _norm(call, PLAIN)


def layer_norm(call: Call) -> list[Value]:
    """`native_layer_norm`: input, normalised shape, weight, bias."""
    return _norm(call, call.value(call.argument(3, "bias")))


def _norm(call: Call, bias: Value) -> list[Value]:
    stop(call, call.args[:1])
    weight = call.value(call.argument(2, "weight"))
    if weight.view is None:
        call.use(weight, bias)
        return [Value(normalised=True)]
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    gain = weight.view.name
    record = call.records.gains[gain]
    record.offsets.add(weight.view.offset)
    record.is_norm = True
    gains = {gain: weight.view.channels().broadcast_to(out.shape)}
    shifts = shifted_by(replace(call, out=out), gains, bias.view) if bias.view else {}
    if bias.view and not shifts:
        call.use(bias)
        call.escape(gain, unknown("its bias and its gain do not go with the same channels"))
        return [Value(normalised=True)]
    return [Value(gains=gains, shifts=shifts, normalised=True)]


def shifted_by(call: Call, gains: dict[str, Tensor], bias: View) -> dict[str, Tensor]:
    """The shifts of a sum of a norm's bias and an activation that carries the norm's gain; empty for any other sum.

    The sum still carries the gain, as `g * x + beta = g * (x + beta / g)`.
    """
    if len(gains) != 1 or bias.offset or any((coordinate == UNKNOWN).any() for coordinate in bias.coordinates):
        return {}
    gain, index = next(iter(gains.items()))
    shift = bias.channels().broadcast_to(call.out.shape)
    if not call.records.gains[gain].is_norm or not torch.equal(shift, index):
        return {}
    call.records.gains[gain].biases.add(bias.name)
    call.records.note_addition(bias.name, gain, call.operator)
    return {bias.name: shift}
