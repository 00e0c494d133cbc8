"""Operators that only move elements: the operator itself, run on the index tensors, says where each channel went."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flashnorm.compat.torch import flat
from flashnorm.trace.rules.call import Call, UnknownError
from flashnorm.trace.values import PLAIN, UNKNOWN, ZERO, Value, carries, collapse, constant_along

aten = torch.ops.aten

# Larger index tensors are not written out. Activations of a few tokens have small ones; those of weights stay expanded.
LARGEST_INDEX = 2**26


def same(call: Call) -> Value:
    """A copy, an alias, a cast."""
    value = call.value(call.args[0])
    if value.tracked and not call.out.dtype.is_floating_point:
        raise UnknownError
    return value


def view(call: Call) -> Value:
    """The same elements in another shape."""
    shape = call.out.shape
    return _moved(call.value(call.args[0]), lambda index: _reshape(index, shape))


def _reshape(index: Tensor, shape: Sequence[int]) -> Tensor:
    try:
        return index.view(shape)
    except RuntimeError:
        if index.numel() > LARGEST_INDEX:
            raise UnknownError from None
        return index.reshape(shape)


def _moved(value: Value, move: Callable[[Tensor], Tensor]) -> Value:
    return _moved_apart(value, lambda index: [move(index)])[0]


def _moved_apart(value: Value, move: Callable[[Tensor], list[Tensor]], count: int = 1) -> list[Value]:
    """The values of the `count` results of an operator; `move` applies the operator to an index tensor."""
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


def move(call: Call) -> list[Value]:
    """Run the operator itself on the index tensors of its only tensor argument."""
    value = call.value(call.args[0])
    count = len(flat(call.out))
    if not value.tracked:
        return [value] * count
    return _moved_apart(value, lambda index: flat(call.func(index, *call.args[1:], **call.kwargs)), count)


def move_written(call: Call) -> list[Value]:
    """Like `move`, for an operator that writes its result out even if its argument is expanded."""
    if call.value(call.args[0]).tracked and call.args[0].numel() > LARGEST_INDEX:
        raise UnknownError
    return move(call)


def pad(call: Call) -> Value:
    """Padding with zeros, which carry any gain."""
    value = call.value(call.args[0])
    if value.tracked and (value.view or call.argument(2, "value", 0) != 0):
        raise UnknownError
    return _moved(value, lambda index: aten.constant_pad_nd(index, call.args[1], ZERO))


def patches(call: Call) -> Value:
    """`im2col` moves elements. Padding is not covered: it would write zeros, that is channel 0, into index tensors."""
    value = call.value(call.args[0])
    if value.tracked and any(call.args[3]):
        raise UnknownError
    return _moved(value, lambda index: call.func(index.double(), *call.args[1:]).long())


# --- selection by unknown indices: a gain passes if it does not vary along the dimension that is selected from


def index(call: Call) -> Value:
    """`tensor[:, index]`, and `tensor[:, index, other]`: indices of dimensions that follow each other."""
    if not call.value(call.args[0]).tracked:
        return PLAIN
    given = [(dim, at) for dim, at in enumerate(call.args[1]) if at is not None]
    dims = [dim for dim, _ in given]
    apart = dims != list(range(dims[0], dims[-1] + 1))  # the result has their dimensions in front then
    if apart or any(at.dtype == torch.bool for _, at in given):
        raise UnknownError
    return _select(call, dims, max(at.dim() for _, at in given))


def index_select(call: Call) -> Value:
    """`index_select(tensor, dim, index)`; the index has one dimension."""
    if not call.value(call.args[0]).tracked:
        return PLAIN
    return _select(call, [call.args[1] % call.args[0].dim()], 1)


def _select(call: Call, dims: Sequence[int], added: int) -> Value:
    """A selection of elements along `dims`, consecutive ones, which the index's `added` dimensions replace."""
    value = call.value(call.args[0])

    def move(index: Tensor) -> Tensor:
        if constant_along(index, tuple(dims)):
            for dim in reversed(dims):
                index = index.select(dim, 0)
            for _ in range(added):
                index = index.unsqueeze(dims[0])
            return index.expand(call.out.shape)
        others = tuple(dim for dim in range(index.dim()) if dim not in dims)
        if value.view and constant_along(index, others):  # it is unknown which expert, say
            return torch.tensor(UNKNOWN).expand(call.out.shape)
        raise UnknownError

    return _moved(value, move)


def gather(call: Call) -> Value:
    """`gather(tensor, dim, index)`."""
    value, dim = call.value(call.args[0]), call.args[1]

    def move(index: Tensor) -> Tensor:
        if not constant_along(index, dim):
            raise UnknownError
        for other, size in enumerate(call.out.shape):
            index = collapse(index, dim) if other == dim % index.dim() else index.narrow(other, 0, size)
        return index.expand(call.out.shape)

    return _moved(value, move)


def embedding(call: Call) -> Value:
    """Rows of a weight, by token. A gain that folds into the weight's columns would change them."""
    call.use(call.value(call.args[0]))
    return PLAIN
