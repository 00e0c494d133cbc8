"""How a gain travels through each operator: one table. An operator that is not in it is an escape.

* `MOVES` only move elements: the operator itself, run on the index tensors, says where each channel went.
* `SCALES`, `SUMS` and friends are linear in what carries the gain, so the gain comes out again.
* `CONTRACTIONS` over the gain's channels with a parameter are where it folds; with anything else, it escapes.
* `NON_LINEAR` operators are known to be impossible, and say so; all others are merely unknown.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flashnorm.compat.torch import is_mutable, tree_leaves
from flashnorm.trace.values import (
    LOST,
    PLAIN,
    UNKNOWN,
    ZERO,
    Value,
    View,
    along,
    carries,
    collapse,
    constant_along,
    constant_except,
    without_zeros,
    written_once,
)

if TYPE_CHECKING:
    from flashnorm.trace.tracer import Tracer

aten = torch.ops.aten

# Index tensors larger than this are not written out (they are for activations of a few tokens; weights stay expanded).
_LARGEST_INDEX = 2**26

# Every reason that is no proof of impossibility begins with this.
UNKNOWN_OPERATOR = "unknown operator"

_DIFFERENT = "it adds channels that carry different elements of the gain"
_WITHOUT = "it adds a tensor that does not carry the gain"
_MIXES = "it mixes channels of the gain without a weight that could take it"
_TWICE = f"{UNKNOWN_OPERATOR}: it multiplies the gain by itself"
_NON_LINEAR = "it is not linear in the gain"
_NO_GAIN = "it also reads an activation that does not carry the gain"


class UnknownError(Exception):
    """The rule does not cover this form of the operator."""


@dataclass
class Call:
    """One operator at work: its arguments and results, and what is known of them."""

    tracer: "Tracer"
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any

    @property
    def operator(self) -> str:
        """The operator's name, as in `aten.mul`."""
        return str(self.func.overloadpacket)

    def propagate(self) -> list[Value]:
        """What is known of each result. Records uses and escapes on the way."""
        operands = [self.value(leaf) for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(self.out) if isinstance(leaf, Tensor)]
        packet = self.func.overloadpacket
        name = packet.__name__
        if is_mutable(self.func) and name.endswith("_"):
            packet = getattr(aten, name.rstrip("_"), packet)  # in place: the rule of the operator out of place
        rule = RULES.get(packet)
        try:
            if rule is not None:
                values = rule(self)
                values = [values] if isinstance(values, Value) else list(values)
                if packet not in _SHIFTED:
                    values = [replace(value, shifts={}) for value in values]
                return values + [PLAIN] * (len(results) - len(values))
        except UnknownError:
            pass
        self.tracer.escape_all(operands, UNKNOWN_OPERATOR, self)
        return [LOST if any(value.tracked or value.unknown for value in operands) else PLAIN] * len(results)

    def value(self, argument: Any) -> Value:
        """What is known of an argument (nothing, if it is not a tensor)."""
        value = self.tracer.value_of(argument) if isinstance(argument, Tensor) else PLAIN
        if value.parts and self.func.overloadpacket not in _KEEPS_PARTS:
            value = replace(value, parts=())
        return value

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def escape(self, gain: str, reason: str) -> None:
        """The gain ends here and cannot be folded."""
        self.tracer.escape(gain, reason, self.operator)

    def use(self, *values: Value, reason: str = "it has another use") -> None:
        """Note the use of a parameter that is neither a gain's nor a fold site."""
        for value in values:
            if value.view:
                self.tracer.escape_all([Value(view=value.view)], reason, self)


Rule = Callable[[Call], Value | Sequence[Value]]


# --- operators that move elements


def _same(call: Call) -> Value:
    """A copy, an alias, a cast."""
    value = call.value(call.args[0])
    if value.tracked and not call.out.dtype.is_floating_point:
        raise UnknownError
    return value


def _reshape(index: Tensor, shape: Sequence[int]) -> Tensor:
    try:
        return index.view(shape)
    except RuntimeError:
        if index.numel() > _LARGEST_INDEX:
            raise UnknownError from None
        return index.reshape(shape)


def _view(call: Call) -> Value:
    shape = call.out.shape
    return _moved(call.value(call.args[0]), lambda index: _reshape(index, shape))


def _moved(value: Value, move: Callable[[Tensor], Tensor]) -> Value:
    return _moved_apart(value, lambda index: [move(index)])[0]


def _moved_apart(value: Value, move: Callable[[Tensor], list[Tensor]], count: int = 1) -> list[Value]:
    """The values of the `count` results of an operator that `move` is on index tensors."""
    gains = {gain: move(index) for gain, index in value.gains.items()}
    shifts = {bias: move(index) for bias, index in value.shifts.items()}
    views = value.view.moved(move) if value.view else [None] * count
    parts = [part.moved(move) for part in value.parts]
    return [
        replace(
            value,
            view=views[i],
            parts=tuple(part[i] for part in parts),
            gains={gain: moved[i] for gain, moved in gains.items() if carries(moved[i])},
            shifts={bias: moved[i] for bias, moved in shifts.items()},
        )
        for i in range(count)
    ]


def _move(call: Call) -> Value | list[Value]:
    """Run the operator itself on the index tensors of its one tensor."""
    tensor = call.args[0]
    value = call.value(tensor)
    count = len(tree_leaves(call.out))
    if not value.tracked:
        return [value] * count
    if call.func.overloadpacket in _COPIES and tensor.numel() > _LARGEST_INDEX:
        raise UnknownError
    return _moved_apart(value, lambda index: tree_leaves(call.func(index, *call.args[1:], **call.kwargs)), count)


def _join(call: Call) -> Value:
    """`cat` and `stack`: channels of a tensor without the gain are channels without a gain."""
    tensors = call.args[0]
    values = [call.value(tensor) for tensor in tensors]
    if any(value.view or value.parts for value in values):
        return _join_views(call, values)
    gains: dict[str, Tensor] = {}
    for gain in dict.fromkeys(gain for value in values for gain in value.gains):
        indices = [
            value.gains.get(gain, torch.tensor(ZERO if value.zero else UNKNOWN).expand(tensor.shape))
            for tensor, value in zip(tensors, values, strict=True)
        ]
        gains[gain] = call.func(indices, *call.args[1:], **call.kwargs)
    return Value(gains=gains, normalised=all(value.normalised for value in values))


def _join_views(call: Call, values: Sequence[Value]) -> Value:
    """Nothing may fold into parameters that are joined here; but where their elements are in the result is known."""
    dim = call.argument(1, "dim", 0) % call.out.dim()
    stacked = call.func.overloadpacket is aten.stack
    if not all(value.view or value.parts or value.zero for value in values):
        raise UnknownError
    if not stacked and any(tensor.dim() != call.out.dim() for tensor in call.args[0]):
        raise UnknownError  # an empty one
    lengths = [1 if stacked else tensor.shape[dim] for tensor in call.args[0]]

    def join(index: Tensor, position: int, elsewhere: int) -> Tensor:
        index = written_once(index, but=dim)
        shapes = [(*index.shape[:dim], length, *index.shape[dim + 1 :]) for length in lengths]
        if sum(map(math.prod, shapes)) > _LARGEST_INDEX:
            raise UnknownError
        pieces = [index.new_tensor(elsewhere).expand(shape) for shape in shapes]
        pieces[position] = index
        return torch.cat(pieces, dim).expand(call.out.shape)

    def part(view: View, position: int) -> View:
        if stacked:
            view = view.moved(lambda index: [index.unsqueeze(dim)])[0]
        coordinates = [
            collapse(index, dim).expand(call.out.shape)
            if constant_along(index, dim)
            else join(index, position, UNKNOWN)
            for index in view.coordinates
        ]
        return replace(view, coordinates=tuple(coordinates), mask=join(view.mask, position, False))

    views = [(value.view,) if value.view else value.parts for value in values]
    parts = tuple(part(view, position) for position, found in enumerate(views) for view in found)
    if len({view.name for view in parts}) < len(parts):
        raise UnknownError  # one parameter in several places
    call.tracer.escape_all(values, UNKNOWN_OPERATOR, call)
    return replace(LOST, parts=parts)


def _pad(call: Call) -> Value:
    value = call.value(call.args[0])
    if value.tracked and (value.view or call.argument(2, "value", 0) != 0):
        raise UnknownError
    return _moved(value, lambda index: aten.constant_pad_nd(index, call.args[1], ZERO))


def _select_by_index(call: Call) -> Value:
    """Gathers by an index whose values are not known: fine along dimensions in which the gain does not vary."""
    tensor, value = call.args[0], call.value(call.args[0])
    if not value.tracked:
        return PLAIN
    if call.func.overloadpacket is aten.index:
        indices: list[Tensor | None] = list(call.args[1])
        if any(index is not None and index.dtype == torch.bool for index in indices):
            raise UnknownError
        dims = [dim for dim, index in enumerate(indices) if index is not None]
        added = next(index for index in indices if index is not None).dim()
    else:  # index_select
        dims, added = [call.args[1] % tensor.dim()], 1
    if len(dims) != 1:
        raise UnknownError
    dim = dims[0]

    def move(index: Tensor) -> Tensor:
        if constant_along(index, dim):
            index = index.select(dim, 0)
            for _ in range(added):
                index = index.unsqueeze(dim)
            return index.expand(call.out.shape)
        if value.view and constant_except(index, dim):  # which expert, say
            return torch.tensor(UNKNOWN).expand(call.out.shape)
        raise UnknownError

    return _moved(value, move)


def _embedding(call: Call) -> Value:
    """Rows of a weight, by token. What folds into columns would change them."""
    call.use(call.value(call.args[0]))
    return PLAIN


def _gather(call: Call) -> Value:
    value, dim = call.value(call.args[0]), call.args[1]

    def move(index: Tensor) -> Tensor:
        if not constant_along(index, dim):
            raise UnknownError
        for other, size in enumerate(call.out.shape):
            index = collapse(index, dim) if other == dim % index.dim() else index.narrow(other, 0, size)
        return index.expand(call.out.shape)

    return _moved(value, move)


# --- operators that are linear, element by element


def _multiply(call: Call) -> Value:
    a, b = call.value(call.args[0]), call.value(call.args[1])
    if not (_is_tensor(call, 0) and _is_tensor(call, 1)):
        value = a if _is_tensor(call, 0) else b
        if value.view:
            raise UnknownError  # a multiple of a parameter
        return value
    if a.view and b.view:
        raise UnknownError
    if b.view:
        a, b = b, a
    gains = _broadcast(call, _union(call, a, b))
    normalised = a.normalised or b.normalised or a.statistic != b.statistic
    if a.view:
        gains = _apply_gain(call, a.view, b, gains)
    return _result(call, gains, normalised, statistic=a.statistic and b.statistic)


def _result(call: Call, gains: dict[str, Tensor], normalised: bool, statistic: bool) -> Value:
    """The value of a product or quotient; a gain on something normalised is a norm's."""
    if normalised:
        for gain in gains:
            record = call.tracer.gains[gain]
            record.is_norm |= not record.escapes  # else a scale ahead of the norm, whose statistic has read it, too
    return Value(gains=gains, normalised=normalised, statistic=statistic)


def _is_tensor(call: Call, position: int) -> bool:
    return isinstance(call.args[position], Tensor)


def _apply_gain(call: Call, view: View, activation: Value, gains: dict[str, Tensor]) -> dict[str, Tensor]:
    """An activation times a parameter: the moment at which a gain is taken up."""
    channels = view.channels()
    if channels.numel() == 1:  # one learned number: no channels, so not a norm's weight
        call.use(Value(view=view))
        return gains
    if any((coordinate == UNKNOWN).any() for coordinate in view.coordinates):
        raise UnknownError
    record = call.tracer.gains[view.name]
    record.offsets.add(view.offset)
    if view.name in activation.gains:
        call.escape(view.name, _TWICE)
        return {gain: index for gain, index in gains.items() if gain != view.name}
    return gains | {view.name: channels.broadcast_to(call.out.shape)}


def _union(call: Call, a: Value, b: Value) -> dict[str, Tensor]:
    """The gains of a product: those of either factor; a gain of both would be squared."""
    for gain in a.gains.keys() & b.gains.keys():
        call.escape(gain, _TWICE)
    twice = a.gains.keys() & b.gains.keys()
    return {gain: index for gain, index in {**a.gains, **b.gains}.items() if gain not in twice}


def _broadcast(call: Call, gains: dict[str, Tensor]) -> dict[str, Tensor]:
    return {gain: index.broadcast_to(call.out.shape) for gain, index in gains.items()}


def _divide(call: Call) -> Value:
    a, b = call.value(call.args[0]), call.value(call.args[1])
    if a.view or b.view:
        raise UnknownError
    for gain in b.gains:
        call.escape(gain, _NON_LINEAR)
    gains = {gain: index for gain, index in _broadcast(call, dict(a.gains)).items() if gain not in b.gains}
    return _result(
        call,
        gains,
        normalised=a.normalised or (b.statistic and _is_tensor(call, 0)),
        statistic=a.statistic or (b.statistic and not _is_tensor(call, 0)),
    )


def _add(call: Call) -> Value:
    """A sum carries a gain if both sides do, on the same channels. A parameter plus a number is an offset gain."""
    a, b = call.value(call.args[0]), call.value(call.args[1])
    number = next((argument for argument in call.args[:2] if not isinstance(argument, Tensor)), None)
    if number is not None:
        value = a if _is_tensor(call, 0) else b
        if value.view:
            adds_one = call.func.overloadpacket is aten.add and number * call.kwargs.get("alpha", 1) == 1
            if not adds_one or value.view.offset:
                raise UnknownError
            return Value(view=replace(value.view, offset=1.0))
        if number != 0:
            for gain in value.gains:
                call.escape(gain, _WITHOUT)
            return Value(statistic=value.statistic)
        return value
    for value, view in ((a, b.view), (b, a.view)):
        if view and value.gains and call.func.overloadpacket is aten.add and call.kwargs.get("alpha", 1) == 1:
            gains = _broadcast(call, dict(value.gains))
            if shifts := _shift(call, gains, view):
                return Value(gains=gains, shifts=shifts)
    call.use(a, b)
    gains = {}
    for gain in {**a.gains, **b.gains}:
        if any(gain not in value.gains and not value.zero for value in (a, b)):
            call.escape(gain, UNKNOWN_OPERATOR if a.unknown or b.unknown else _WITHOUT)
            continue
        left, right = (value.gains.get(gain, torch.tensor(ZERO)).broadcast_to(call.out.shape) for value in (a, b))
        left, right = torch.where(left == ZERO, right, left), torch.where(right == ZERO, left, right)
        if torch.equal(left, right):
            gains[gain] = left
        else:
            call.escape(gain, _DIFFERENT)
    return Value(gains=gains, statistic=a.statistic or b.statistic, zero=a.zero and b.zero)


def _masked_fill(call: Call) -> Value:
    value = call.value(call.args[0])
    if value.tracked and (value.view or call.args[2] != 0):
        raise UnknownError
    return replace(value, gains=_broadcast(call, dict(value.gains)), zero=value.zero and call.args[2] == 0)


def _reduce(call: Call) -> Value:
    """`sum`, `mean` over some dimensions: linear, if the gain does not vary along them."""
    tensor, value = call.args[0], call.value(call.args[0])
    if value.view:
        raise UnknownError
    dims = call.argument(1, "dim")
    dims = range(tensor.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = tuple(sorted(dim % tensor.dim() for dim in dims))
    gains = {}
    for gain, index in value.gains.items():
        if not constant_along(index, dims):
            call.escape(gain, _MIXES)
            continue
        for dim in dims:
            index = collapse(index, dim)
        gains[gain] = index.reshape(call.out.shape)
    return Value(gains=gains, statistic=value.statistic)


def _resample(call: Call) -> Value:
    """Average pooling and interpolation over the last one to three dimensions: linear, if the gain varies with none."""
    value = call.value(call.args[0])
    if value.view:
        raise UnknownError
    count = _RESAMPLING[call.func.overloadpacket]
    gains = {}
    for gain, index in value.gains.items():
        places = tuple(range(index.dim() - count, index.dim()))
        if constant_along(index, places):
            for dim in places:
                index = collapse(index, dim)
            gains[gain] = index.expand(call.out.shape)
        else:
            call.escape(gain, _MIXES)
    return Value(gains=gains, statistic=value.statistic)


def _patches(call: Call) -> Value:
    """`im2col` moves elements, but those that it pads with are zeros."""
    value = call.value(call.args[0])
    if value.tracked and any(call.args[3]):
        raise UnknownError
    return _moved(value, lambda index: call.func(index.double(), *call.args[1:]).long())


def _cumulate(call: Call) -> Value:
    value = call.value(call.args[0])
    if value.view:
        raise UnknownError
    for gain, index in value.gains.items():
        if not constant_along(index, call.args[1]):
            call.escape(gain, _MIXES)
    kept = {gain: index for gain, index in value.gains.items() if constant_along(index, call.args[1])}
    return Value(gains=kept)


# --- operators with a norm inside


def _shift(call: Call, gains: dict[str, Tensor], bias: View) -> dict[str, Tensor]:
    """The addition of a norm's bias to what carries the norm's gain, or nothing if that is not what it is.

    The sum still carries the gain, as `g * x + beta = g * (x + beta / g)`.
    """
    if len(gains) != 1 or bias.offset or any((coordinate == UNKNOWN).any() for coordinate in bias.coordinates):
        return {}
    gain, index = next(iter(gains.items()))
    shift = bias.channels().broadcast_to(call.out.shape)
    if not call.tracer.gains[gain].is_norm or not torch.equal(shift, index):
        return {}
    call.tracer.gains[gain].biases.add(bias.name)
    call.tracer.note_addition(bias.name, gain, call)
    return {bias.name: shift}


def _norm_with_weight(call: Call) -> list[Value]:
    """`layer_norm` and `rms_norm` as one operator: input, normalised shape, weight, and for LayerNorm a bias."""
    _non_linear(call, call.args[:1])
    weight = call.value(call.argument(2, "weight"))
    is_layer_norm = call.func.overloadpacket is aten.native_layer_norm
    bias = call.value(call.argument(3, "bias")) if is_layer_norm else PLAIN
    if weight.view is None:
        call.use(weight, bias)
        return [Value(normalised=True)]
    results = call.out if isinstance(call.out, tuple) else (call.out,)
    gain = weight.view.name
    record = call.tracer.gains[gain]
    record.offsets.add(weight.view.offset)
    record.is_norm = True
    gains = {gain: weight.view.channels().broadcast_to(results[0].shape)}
    shifts: dict[str, Tensor] = {}
    if bias.view is not None:
        shifts = _shift(replace(call, out=results[0]), gains, bias.view)
        if not shifts:
            call.use(bias)
            call.escape(gain, f"{UNKNOWN_OPERATOR}: its bias and its gain do not go with the same channels")
            return [Value(normalised=True)]
    return [Value(gains=gains, shifts=shifts, normalised=True)]


# --- contractions


def _matmul(call: Call, a: Tensor, b: Tensor, bias: str | None = None) -> Value:
    """`a @ b` for `[M, K] @ [K, N]`, and the same with a batch dimension in front of all; `bias` will be added."""
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
    """The gains of one side of a contraction over its `dim`: returned if they come out, else folded or stopped."""
    carried, folding = {}, {}
    for gain, index in moving.gains.items():
        index = without_zeros(index, dim)
        if gain in other.gains:
            call.escape(gain, _TWICE)
        elif other.view and constant_except(index, dim):
            folding[gain] = along(index, dim)
        elif constant_along(index, dim):
            carried[gain] = expand(collapse(index, dim))
        else:
            call.escape(gain, UNKNOWN_OPERATOR if other.unknown else _MIXES)
    if other.view and folding:
        shifts = {name: along(index, dim) for name, index in moving.shifts.items() if constant_except(index, dim)}
        _fold_site(call, other.view, other_dim, folding, shifts, bias)
    elif not moving.zero:
        call.use(other, reason=_NO_GAIN)
    return carried


def _fold_site(
    call: Call,
    view: View,
    dim: int,
    gains: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor] | None = None,
    bias: str | None = None,
) -> None:
    """A weight contracted over `dim` with an activation.

    Args:
        gains, shifts: the gains that the activation carries and the norm biases in it; `[K]`, the channel for each
            position of the contraction.
        bias: the parameter that is added to the product.
    """
    from flashnorm.trace.tracer import Use

    varying = [axis for axis, index in enumerate(view.coordinates) if not constant_along(index, dim)]
    if len(varying) != 1 or view.offset or not constant_except(view.coordinates[varying[0]], dim):
        raise UnknownError  # the contraction runs over more, or less, than one axis of the parameter
    axis = varying[0]
    positions = along(view.coordinates[axis], dim)
    if (positions == UNKNOWN).any():
        raise UnknownError
    size = view.shape[axis]
    touched = torch.zeros(size, dtype=torch.bool)
    touched[positions] = True

    def by_position(index: Tensor) -> Tensor:
        channels, index = torch.full((size,), UNKNOWN), index.clamp(min=UNKNOWN)
        channels[positions] = index
        if not torch.equal(channels[positions], index):
            raise UnknownError  # one weight element meets two channels of the gain
        return channels

    use = Use(
        at=call.tracer.here("", call.operator),
        axis=axis,
        channels={gain: by_position(index) for gain, index in gains.items()},
        shifts={name: by_position(index) for name, index in (shifts or {}).items()},
        touched=touched,
        bias=bias,
    )
    call.tracer.uses[view.name].append(use)


def _mm(call: Call) -> Value:
    return _matmul(call, call.args[0], call.args[1])


def _addmm(call: Call) -> Value:
    """`bias + a @ b`."""
    bias, activation, weight = (call.value(argument) for argument in call.args[:3])
    added_to = weight.view and bias.view and _is_bias_of(call, bias.view, weight.view) and weight.view.name
    added_to = None if activation.zero else added_to
    if added_to and bias.view:
        call.tracer.note_addition(bias.view.name, added_to, call)
    else:
        call.use(bias)
    value = _matmul(call, call.args[1], call.args[2], bias.view.name if added_to and bias.view else None)
    for gain in {**value.gains, **bias.gains}:
        call.escape(gain, _WITHOUT)
    return PLAIN


def _is_bias_of(call: Call, bias: View, weight: View) -> bool:
    """Whether `bias + a @ weight` adds element `i` of one parameter to what row (or column) `i` of the other makes."""
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


def _convolution(call: Call) -> Value:
    """Convolution over channels (dimension 1): full, or one filter a channel."""
    activation, weight = call.value(call.args[0]), call.value(call.args[1])
    if activation.view or weight.gains:
        raise UnknownError
    call.use(call.value(call.args[2]))
    transposed, groups = call.args[6], call.args[8]
    channels, filters = call.args[0].shape[1], call.args[1].shape[0]
    folding = {}
    for gain, index in activation.gains.items():
        index = without_zeros(index, 1)
        if not constant_except(index, 1) or not weight.view:
            raise UnknownError
        folding[gain] = along(index, 1)
    if not folding or not weight.view:
        call.use(weight, reason=_NO_GAIN)
    elif groups == 1:
        _fold_site(call, weight.view, 0 if transposed else 1, folding)
    elif groups == channels and not transposed:
        repeat = filters // channels
        _fold_site(call, weight.view, 0, {gain: index.repeat_interleave(repeat) for gain, index in folding.items()})
    else:
        raise UnknownError
    return PLAIN


# --- operators that no gain passes


def _non_linear(call: Call, operands: Sequence[Any] | None = None) -> Value:
    """Escape whatever arrives; remember statistics such as `rsqrt(mean(x^2))` and what is made of them."""
    leaves = tree_leaves((call.args, call.kwargs) if operands is None else operands)
    values = [call.value(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    for gain in dict.fromkeys(gain for value in values for gain in value.gains):
        call.escape(gain, _NON_LINEAR)
    call.use(*values)
    packet = call.func.overloadpacket
    exponent = call.args[1] if packet is aten.pow else None
    statistic = packet in _STATISTICS or (isinstance(exponent, float) and exponent in (-0.5, 0.5))
    return Value(normalised=packet is aten.tanh, statistic=statistic or any(value.statistic for value in values))


def _independent(call: Call) -> Value:
    """The result does not depend on the elements."""
    return PLAIN


def _zeros(call: Call) -> Value:
    return Value(zero=True)


def _aten(names: str) -> list[Any]:
    """ATen operators by their names; those that this PyTorch does not have cannot be met."""
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


_STATISTICS = _aten("rsqrt sqrt linalg_vector_norm norm")

# These write a tensor out that may have been expanded.
_COPIES = _aten("repeat flip roll")
_SAME = _aten("clone alias detach _to_copy lift_fresh neg")
_VIEWS = _aten("view _unsafe_view reshape")
_MOVES = _COPIES + _aten(
    "expand permute transpose t squeeze unsqueeze slice select split split_with_sizes unbind chunk narrow unfold "
    "diagonal movedim"
)

# What a norm's bias survives: results that are moved and not computed with, and those to which it is added.
_SHIFTED = {*_SAME, *_VIEWS, *_MOVES, aten.add, aten.native_layer_norm} - {aten.neg}
_JOINS = _aten("cat stack")
# What keeps a joined tensor's elements as they are.
_KEEPS_PARTS = {*_SAME, *_VIEWS, *_MOVES, *_JOINS} - {aten.neg}

# What is impossible whatever the gain's values; `relu` and `abs` are not here, since positive gains pass them.
_NON_LINEAR_OPERATORS = _STATISTICS + _aten(
    "silu gelu sigmoid tanh exp exp2 log log1p softplus elu celu selu mish hardswish hardsigmoid log_sigmoid_forward "
    "_softmax _log_softmax _safe_softmax pow square reciprocal cos sin erf clamp clamp_min clamp_max maximum minimum "
    "amax amin max min argmax argmin topk sort argsort floor ceil round var var_mean std eq ne lt le gt ge isnan isinf"
)
# Over how many dimensions, the last ones; the input may be without a batch.
_RESAMPLING = {
    **dict.fromkeys(_aten("avg_pool1d upsample_nearest1d upsample_linear1d"), 1),
    **dict.fromkeys(
        _aten(
            "avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
        ),
        2,
    ),
    aten.avg_pool3d: 3,
}
_INDEPENDENT = _aten("ones_like full_like empty_like rand_like randn_like new_ones new_full new_empty")
_ZEROS = _aten("zeros zeros_like new_zeros")

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_JOINS, _join),
    aten.constant_pad_nd: _pad,
    **dict.fromkeys(_aten("index index_select"), _select_by_index),
    aten.embedding: _embedding,
    aten.gather: _gather,
    aten.mul: _multiply,
    aten.div: _divide,
    **dict.fromkeys(_aten("add sub"), _add),
    aten.masked_fill: _masked_fill,
    **dict.fromkeys(_aten("sum mean"), _reduce),
    **dict.fromkeys(_RESAMPLING, _resample),
    aten.im2col: _patches,
    aten.cumsum: _cumulate,
    **dict.fromkeys(_aten("native_layer_norm _fused_rms_norm"), _norm_with_weight),
    **dict.fromkeys(_aten("mm bmm"), _mm),
    **dict.fromkeys(_aten("addmm baddbmm"), _addmm),
    aten.convolution: _convolution,
    **dict.fromkeys(_NON_LINEAR_OPERATORS, _non_linear),
    **dict.fromkeys(_INDEPENDENT, _independent),
    **dict.fromkeys(_ZEROS, _zeros),
}


class Guess(NamedTuple):
    """Answers to questions that a meta tensor cannot answer.

    Attributes:
        number: the value of an element; whatever is not zero is also true, or equal.
        all_hits: no element of a tensor is zero: code that goes through the hits (experts that have tokens, say) then
            goes through them all. Else there are as many hits, at unknown places.
    """

    number: int
    all_hits: bool


# The code behind a question may take one path of several: a trace goes over all of these, and what any shows counts.
GUESSES = (Guess(1, True), Guess(1, False), Guess(0, True), Guess(2**31 - 1, False))


def _item(guess: Guess, tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return bool(guess.number)
    return float(guess.number) if tensor.dtype.is_floating_point else guess.number


def _equal(guess: Guess, a: Tensor, b: Tensor) -> bool:
    return bool(guess.number)


def _nonzero(guess: Guess, tensor: Tensor) -> Tensor:
    if guess.all_hits:
        return torch.ones(tensor.shape, dtype=torch.bool, device="cpu").nonzero()
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.long, device=tensor.device)


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense: _item,
    aten.equal: _equal,
    aten.nonzero: _nonzero,
}
