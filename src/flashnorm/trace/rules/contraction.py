"""Contractions over a gain's channels: with a parameter, the gain folds into it; with anything else, it escapes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flashnorm.plan import Kept, Kind
from flashnorm.trace.records import Use
from flashnorm.trace.rules.call import Call, UnknownError
from flashnorm.trace.rules.reasons import MIXES, TWICE, UNKNOWN_OPERATOR, WITHOUT
from flashnorm.trace.values import (
    PLAIN,
    UNKNOWN,
    Value,
    View,
    along,
    collapse,
    constant_along,
    constant_except,
    without_zeros,
)

_CONTRACTED = Kept("it is contracted with the gain's channels", kind=None)
_NO_GAIN = Kept("it also reads an activation that does not carry the gain", kind=Kind.SHARED)


# --- matrix products


def matmul(call: Call) -> Value:
    """`a @ b`."""
    return _matmul(call, call.args[0], call.args[1])


def add_matmul(call: Call) -> Value:
    """`bias + a @ b`."""
    bias, activation, weight = (call.value(argument) for argument in call.args[:3])
    added = None
    if bias.view and weight.view and not activation.zero and _is_bias_of(call, bias.view, weight.view):
        added = bias.view.name
        call.records.note_addition(added, weight.view.name, call.operator)
    else:
        call.use(bias)
    value = _matmul(call, call.args[1], call.args[2], added)
    for gain in {**value.gains, **bias.gains}:
        call.escape(gain, WITHOUT)
    return PLAIN


def _is_bias_of(call: Call, bias: View, weight: View) -> bool:
    """Whether `bias + a @ weight` adds element `i` of the bias to the output of row (or column) `i` of the weight."""
    if bias.offset or len(bias.shape) != 1 or len(weight.shape) != 2 or len(weight.stored_shape) != 2 or call.kwargs:
        return False
    added = bias.coordinates[0].broadcast_to(call.out.shape)
    outputs = [index for index in weight.coordinates if constant_except(index, 1)]
    return (
        constant_except(added, 1)
        and len(outputs) == 1
        and torch.equal(along(outputs[0], 1), along(added, 1))
        and not (along(added, 1) == UNKNOWN).any()
    )


def _matmul(call: Call, a: Tensor, b: Tensor, bias: str | None = None) -> Value:
    """`[M, K] @ [K, N]`, or the same with a batch dimension in front of each; the caller adds `bias` to the product."""
    left, right = call.value(a), call.value(b)
    if left.view and right.view:
        raise UnknownError
    shape = call.out.shape
    carried = _contract(call, left, a.dim() - 1, right, b.dim() - 2, lambda index: index.expand(shape), bias)
    carried |= _contract(call, right, b.dim() - 2, left, a.dim() - 1, lambda index: index.expand(shape))
    return Value(gains=carried)


def _contract(
    call: Call,
    moving: Value,
    dim: int,
    other: Value,
    other_dim: int,
    expand: Callable[[Tensor], Tensor],
    bias: str | None = None,
) -> dict[str, Tensor]:
    """Fold or stop the gains of one operand of a contraction over its `dim`; return those that the result carries."""
    carried, folding = {}, {}
    for gain, index in moving.gains.items():
        index = without_zeros(index, dim)
        if gain in other.gains:
            call.escape(gain, TWICE)
        elif other.view and constant_except(index, dim):
            folding[gain] = along(index, dim)
        elif constant_along(index, dim):
            carried[gain] = expand(collapse(index, dim))
        else:
            call.escape(gain, UNKNOWN_OPERATOR if other.unknown else MIXES)
    if other.view and folding:
        shifts = {name: along(index, dim) for name, index in moving.shifts.items() if constant_except(index, dim)}
        _fold(call, other.view, other_dim, folding, shifts, bias)
    elif not moving.zero:
        call.use(other, why=_NO_GAIN)
    return carried


# --- convolutions


def convolution(call: Call) -> Value:
    """Convolution over channels (dimension 1): full, or depthwise (each filter reads one channel)."""
    activation, weight = call.value(call.args[0]), call.value(call.args[1])
    if activation.view or weight.gains:
        raise UnknownError
    call.use(call.value(call.args[2]))
    transposed, groups = call.args[6], call.args[8]
    channels, filters = call.args[0].shape[1], call.args[1].shape[0]
    folding = {gain: _channels(index, weight) for gain, index in activation.gains.items()}
    if not folding or not weight.view:
        call.use(weight, why=_NO_GAIN)
    elif groups == 1:
        _fold(call, weight.view, 0 if transposed else 1, folding)
    elif groups == channels and not transposed:
        repeat = filters // channels
        _fold(call, weight.view, 0, {gain: index.repeat_interleave(repeat) for gain, index in folding.items()})
    else:
        raise UnknownError
    return PLAIN


def _channels(index: Tensor, weight: Value) -> Tensor:
    """`[channels]`, a gain's index along dimension 1; the gain must not vary along any other dimension."""
    index = without_zeros(index, 1)
    if not constant_except(index, 1) or not weight.view:
        raise UnknownError
    return along(index, 1)


# --- where a gain folds


def _fold(
    call: Call,
    view: View,
    dim: int,
    gains: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor] | None = None,
    bias: str | None = None,
) -> None:
    """Note that a weight, contracted over `dim` with an activation, takes the gains of the activation.

    Args:
        gains, shifts: gain, or norm bias, of the activation -> `[K]`, its channel at each position of the contraction.
        bias: the parameter that is added to the product.
    """
    axis, positions = _contracted_axis(view, dim)
    size = view.shape[axis]
    touched = torch.zeros(size, dtype=torch.bool)
    touched[positions] = True
    use = Use(
        at=call.records.here(_CONTRACTED, call.operator),
        axis=axis,
        channels={gain: _by_position(index, positions, size) for gain, index in gains.items()},
        shifts={name: _by_position(index, positions, size) for name, index in (shifts or {}).items()},
        touched=touched,
        bias=bias,
    )
    call.records.uses[view.name].append(use)


def _contracted_axis(view: View, dim: int) -> tuple[int, Tensor]:
    """The axis of the parameter that runs along `dim` of its view, and `[K]`, the index along it at each position."""
    varying = [axis for axis, index in enumerate(view.coordinates) if not constant_along(index, dim)]
    if len(varying) != 1 or view.offset or not constant_except(view.coordinates[varying[0]], dim):
        raise UnknownError  # the contraction runs over more, or less, than one axis of the parameter
    positions = along(view.coordinates[varying[0]], dim)
    if (positions == UNKNOWN).any():
        raise UnknownError
    return varying[0], positions


def _by_position(index: Tensor, positions: Tensor, size: int) -> Tensor:
    """`[axis size]`, the channel for every index of an axis, from `[K]`, the channel at each contracted position."""
    channels, index = torch.full((size,), UNKNOWN), index.clamp(min=UNKNOWN)
    channels[positions] = index
    if not torch.equal(channels[positions], index):
        raise UnknownError  # one weight element meets two channels of the gain
    return channels
