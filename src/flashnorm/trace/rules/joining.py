"""`cat` and `stack`: channels that come from a tensor without the gain do not carry it in the result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashnorm.trace.rules.call import Call, UnknownError
from flashnorm.trace.rules.movement import LARGEST_INDEX
from flashnorm.trace.rules.reasons import UNKNOWN_OPERATOR
from flashnorm.trace.values import LOST, UNKNOWN, ZERO, Value, View, collapse, constant_along, written_once

aten = torch.ops.aten


def join(call: Call) -> Value:
    """Join tensors and, in the same way, the index tensors of their gains."""
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
    """Join views. Nothing may fold into their parameters, but it stays known where in the result their elements are."""
    if not all(value.view or value.parts or value.zero for value in values):
        raise UnknownError
    joint = _Joint.of(call)
    views = [(value.view,) if value.view else value.parts for value in values]
    parts = tuple(joint.part(view, position) for position, found in enumerate(views) for view in found)
    if len({view.name for view in parts}) < len(parts):
        raise UnknownError  # one parameter in several places
    call.records.escape_all(values, UNKNOWN_OPERATOR, call.operator)
    return replace(LOST, parts=parts)


@dataclass(frozen=True)
class _Joint:
    """How tensors are joined.

    Attributes:
        shape: the shape of the result.
        dim: the dimension along which the tensors follow each other in the result.
        stacked: whether the tensors themselves lack that dimension (`stack`).
        lengths: the length along `dim` of each tensor's piece of the result.
    """

    shape: Sequence[int]
    dim: int
    stacked: bool
    lengths: Sequence[int]

    @staticmethod
    def of(call: Call) -> "_Joint":
        tensors: Sequence[Tensor] = call.args[0]
        dim = call.argument(1, "dim", 0) % call.out.dim()
        stacked = call.func.overloadpacket is aten.stack
        if not stacked and any(tensor.dim() != call.out.dim() for tensor in tensors):
            raise UnknownError  # an empty tensor, which `cat` skips
        lengths = [1 if stacked else tensor.shape[dim] for tensor in tensors]
        return _Joint(call.out.shape, dim, stacked, lengths)

    def part(self, view: View, position: int) -> View:
        """The view of the tensor at a position, as a part of the result."""
        if self.stacked:
            view = view.moved(lambda index: [index.unsqueeze(self.dim)])[0]
        coordinates = [
            collapse(index, self.dim).expand(self.shape)
            if constant_along(index, self.dim)
            else self._among_others(index, position, UNKNOWN)
            for index in view.coordinates
        ]
        return replace(view, coordinates=tuple(coordinates), mask=self._among_others(view.mask, position, False))

    def _among_others(self, index: Tensor, position: int, elsewhere: int) -> Tensor:
        """An index of the result: that of the tensor at a position, and `elsewhere` in the place of all others."""
        index = written_once(index, but=self.dim)
        shapes = [(*index.shape[: self.dim], length, *index.shape[self.dim + 1 :]) for length in self.lengths]
        if sum(map(math.prod, shapes)) > LARGEST_INDEX:
            raise UnknownError
        pieces = [index.new_tensor(elsewhere).expand(shape) for shape in shapes]
        pieces[position] = index
        return torch.cat(pieces, self.dim).expand(self.shape)
