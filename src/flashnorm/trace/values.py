"""What the tracer knows about a tensor: which parameter it is a view of, and which gains it carries on which channels.

* A tensor *carries* gain `g` if it equals its value in the folded model times `g[index]`. The tensor `index` has the
  same shape and holds the channel of the gain for every element, or -1 where there is none.
* A tensor is *shifted* by a norm's bias if it equals its value without that bias plus `bias[index]`.
* A tensor that holds elements of one parameter, moved but not computed with, is a *view*; one index tensor per axis of
  the parameter says where every element comes from.
* A tensor that several views were joined to has *parts*: views that say which of its elements are theirs.
* An operator that only moves elements is run on the index tensors themselves. Index tensors are expanded (stride 0)
  wherever they are constant, so a view of a gigabyte costs a few kilobytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

UNKNOWN = -1  # an index that the trace cannot know, or a channel that carries no gain
ZERO = -2  # an element that is zero by construction (padding, say), and so carries any gain


@dataclass(frozen=True)
class View:
    """A tensor made of the elements of one parameter, moved but not computed with.

    Attributes:
        name: the parameter.
        shape: the parameter's shape.
        coordinates: for each axis of the parameter, the index along it of every element of this tensor.
        mask: which elements of this tensor are the parameter's: all, unless the view is a part of a joined tensor. The
            coordinates of other elements mean nothing.
        offset: a constant that was added (1.0 in Gemma's `1 + weight`).
    """

    name: str
    shape: tuple[int, ...]
    coordinates: tuple[Tensor, ...]
    mask: Tensor
    offset: float = 0.0

    @staticmethod
    def of(name: str, parameter: Tensor) -> "View":
        """The parameter itself."""
        shape = tuple(parameter.shape)
        coordinates = tuple(
            torch.arange(size).view([-1 if axis == other else 1 for other in range(len(shape))]).expand(shape)
            for axis, size in enumerate(shape)
        )
        return View(name, shape, coordinates, torch.tensor(True).expand(shape))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of this tensor (`shape` is the parameter's)."""
        return tuple(self.coordinates[0].shape)

    @property
    def size(self) -> int:
        """How many elements of this tensor are the parameter's."""
        written = written_once(self.mask)
        return int(written.sum()) * (self.mask.numel() // max(1, written.numel()))

    def moved(self, move: Callable[[Tensor], list[Tensor]]) -> "list[View]":
        """The views that an operator that only moves elements makes of this one; `move` is that operator."""
        moved = zip(move(self.mask), *(move(index) for index in self.coordinates), strict=True)
        return [replace(self, mask=mask, coordinates=tuple(coordinates)) for mask, *coordinates in moved]

    def channels(self) -> Tensor:
        """For every element, its flat index in the parameter."""
        flat = torch.zeros((), dtype=torch.long)
        stride = 1
        for size, coordinate in zip(reversed(self.shape), reversed(self.coordinates), strict=True):
            flat = flat + (coordinate * stride if size > 1 else 0)
            stride *= size
        return flat


@dataclass(frozen=True)
class Value:
    """What is known of a tensor. The default, `PLAIN`, is an activation that carries no gain.

    Attributes:
        view: the tensor as a view of a parameter, if it is one.
        gains: gain parameter -> channel index of every element (see the module's docstring).
        shifts: norm bias -> channel index of every element; kept only while the elements are moved, not computed with.
        normalised: it has been divided by a root mean square or a vector norm, or is the tanh of a DyT.
        statistic: it is such a divisor (or its reciprocal).
        zero: it is zero by construction.
        unknown: an operator without a rule made it from a tracked tensor, so nothing is known of its elements.
        parts: the views that were joined to it; kept only while the elements are moved, not computed with.
    """

    view: View | None = None
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    normalised: bool = False
    statistic: bool = False
    zero: bool = False
    unknown: bool = False
    parts: tuple[View, ...] = ()

    @property
    def tracked(self) -> bool:
        """Whether the tracer must account for every operator on it."""
        return self.view is not None or bool(self.gains) or bool(self.parts)


PLAIN = Value()
LOST = Value(unknown=True)


def written_once(index: Tensor, but: int | None = None) -> Tensor:
    """The index with its expanded dimensions, along which it is constant, reduced to size 1: there is less to read.

    Args:
        index: an index tensor of a value or a view.
        but: a dimension that stays as it is.
    """
    for dim, stride in enumerate(index.stride()):
        if stride == 0 and dim != but:
            index = collapse(index, dim)
    return index


def carries(index: Tensor) -> bool:
    """Whether any element carries a gain at all."""
    return index.numel() > 0 and bool((written_once(index) >= 0).any())


def constant_along(index: Tensor, dims: int | tuple[int, ...]) -> bool:
    """Whether the index is the same all along the given dimensions."""
    index = written_once(index)
    dims = (dims,) if isinstance(dims, int) else dims
    return all(index.size(dim) == 1 or bool((index == collapse(index, dim)).all()) for dim in dims)


def constant_except(index: Tensor, dim: int) -> bool:
    """Whether the index varies along `dim` alone."""
    dim %= index.dim()
    return constant_along(index, tuple(other for other in range(index.dim()) if other != dim))


def without_zeros(index: Tensor, dim: int) -> Tensor:
    """The index with each `ZERO` replaced by the channel of the other elements at the same position of `dim`."""
    if not (written_once(index) == ZERO).any():
        return index
    others = tuple(other for other in range(index.dim()) if other != dim % index.dim())
    line = index.amax(others, keepdim=True) if others else index
    return torch.where(index == ZERO, line, index)


def along(index: Tensor, dim: int) -> Tensor:
    """The index along one dimension, at position 0 of all others."""
    dim %= index.dim()
    return index[tuple(slice(None) if other == dim else 0 for other in range(index.dim()))]


def collapse(index: Tensor, dim: int) -> Tensor:
    """The index with a dimension along which it is constant reduced to size 1."""
    return index.narrow(dim, 0, 1)
