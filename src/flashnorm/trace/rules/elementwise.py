"""Operators that are linear, element by element: their results carry the gain again."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashnorm.trace.rules.call import Call, UnknownError
from flashnorm.trace.rules.norms import shifted_by
from flashnorm.trace.rules.reasons import DIFFERENT, NON_LINEAR, TWICE, UNKNOWN_OPERATOR, WITHOUT
from flashnorm.trace.values import UNKNOWN, ZERO, Value, View

aten = torch.ops.aten


# --- products


def multiply(call: Call) -> Value:
    """A product carries the gains of either factor. A parameter as a factor becomes a gain."""
    a, b = call.value(call.args[0]), call.value(call.args[1])
    if not (call.is_tensor(0) and call.is_tensor(1)):
        value = a if call.is_tensor(0) else b
        if value.view:
            raise UnknownError  # a multiple of a parameter
        return value
    if a.view and b.view:
        raise UnknownError
    if b.view:
        a, b = b, a
    gains = call.spread(_union(call, a, b))
    if a.view:
        gains = _take_up(call, a.view, b, gains)
    normalised = a.normalised or b.normalised or a.statistic != b.statistic
    return _scaled(call, gains, normalised, statistic=a.statistic and b.statistic)


def divide(call: Call) -> Value:
    """A quotient carries the gains of its dividend."""
    a, b = call.value(call.args[0]), call.value(call.args[1])
    if a.view or b.view:
        raise UnknownError
    for gain in b.gains:
        call.escape(gain, NON_LINEAR)
    return _scaled(
        call,
        {gain: index for gain, index in call.spread(a.gains).items() if gain not in b.gains},
        normalised=a.normalised or (b.statistic and call.is_tensor(0)),
        statistic=a.statistic or (b.statistic and not call.is_tensor(0)),
    )


def _union(call: Call, a: Value, b: Value) -> dict[str, Tensor]:
    """The gains of a product: those of either factor; a gain of both would be squared."""
    twice = a.gains.keys() & b.gains.keys()
    for gain in twice:
        call.escape(gain, TWICE)
    return {gain: index for gain, index in {**a.gains, **b.gains}.items() if gain not in twice}


def _take_up(call: Call, view: View, activation: Value, gains: dict[str, Tensor]) -> dict[str, Tensor]:
    """An activation times a parameter: the product carries the parameter as a gain from here on."""
    channels = view.channels()
    if channels.numel() == 1:  # one learned number has no channels, so it is no norm's weight
        call.use(Value(view=view))
        return gains
    if any((coordinate == UNKNOWN).any() for coordinate in view.coordinates):
        raise UnknownError
    call.records.gains[view.name].offsets.add(view.offset)
    if view.name in activation.gains:
        call.escape(view.name, TWICE)
        return {gain: index for gain, index in gains.items() if gain != view.name}
    return gains | {view.name: channels.broadcast_to(call.out.shape)}


def _scaled(call: Call, gains: dict[str, Tensor], normalised: bool, statistic: bool) -> Value:
    """The value of a product or quotient. A gain that multiplies something normalised is a norm's gain."""
    if normalised:
        for gain in gains:
            record = call.records.gains[gain]
            # A gain that has escaped is a scale ahead of the norm: the norm's statistic has read it as well.
            record.is_norm |= not record.escapes
    return Value(gains=gains, normalised=normalised, statistic=statistic)


# --- sums


def add(call: Call) -> Value:
    """A sum or difference of tensors, or of a tensor and a number."""
    a, b = call.value(call.args[0]), call.value(call.args[1])
    if not call.is_tensor(0):
        return _add_number(call, b, call.args[0])
    if not call.is_tensor(1):
        return _add_number(call, a, call.args[1])
    return _add_bias(call, a, b.view) or _add_bias(call, b, a.view) or _add_tensors(call, a, b)


def _adds(call: Call, factor: Any = 1) -> bool:
    """Whether the call adds, not in place, and its second operand times `factor` is taken exactly once."""
    return call.func.overloadpacket is aten.add and factor * call.kwargs.get("alpha", 1) == 1


def _add_number(call: Call, value: Value, number: Any) -> Value:
    """A tensor plus a number. A parameter plus one becomes a gain with offset 1."""
    if value.view:
        if value.view.offset or not _adds(call, number):
            raise UnknownError
        return Value(view=replace(value.view, offset=1.0))
    if number == 0:
        return value
    for gain in value.gains:
        call.escape(gain, WITHOUT)
    return Value(statistic=value.statistic)


def _add_bias(call: Call, activation: Value, bias: View | None) -> Value | None:
    """The sum of an activation and the bias of the norm whose gain it carries; None if it is another sum."""
    if not bias or not activation.gains or not _adds(call):
        return None
    gains = call.spread(activation.gains)
    shifts = shifted_by(call, gains, bias)
    return Value(gains=gains, shifts=shifts) if shifts else None


def _add_tensors(call: Call, a: Value, b: Value) -> Value:
    """A sum carries a gain if both sides do, on the same channels."""
    call.use(a, b)
    gains: dict[str, Tensor] = {}
    for gain in {**a.gains, **b.gains}:
        if any(gain not in value.gains and not value.zero for value in (a, b)):
            call.escape(gain, UNKNOWN_OPERATOR if a.unknown or b.unknown else WITHOUT)
        elif (index := _common(call, gain, a, b)) is None:
            call.escape(gain, DIFFERENT)
        else:
            gains[gain] = index
    return Value(gains=gains, statistic=a.statistic or b.statistic, zero=a.zero and b.zero)


def _common(call: Call, gain: str, a: Value, b: Value) -> Tensor | None:
    """The channels of a gain that both sides carry (a zero agrees with any channel); None if they differ."""
    left, right = (value.gains.get(gain, torch.tensor(ZERO)).broadcast_to(call.out.shape) for value in (a, b))
    left, right = torch.where(left == ZERO, right, left), torch.where(right == ZERO, left, right)
    return left if torch.equal(left, right) else None


def masked_fill(call: Call) -> Value:
    """Some elements become zero, and a zero carries any gain."""
    value = call.value(call.args[0])
    if value.tracked and (value.view or call.args[2] != 0):
        raise UnknownError
    return replace(value, gains=call.spread(value.gains), zero=value.zero and call.args[2] == 0)
