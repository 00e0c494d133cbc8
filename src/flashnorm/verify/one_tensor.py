"""Compares one tensor of a converted checkpoint, piece by piece, with the source's: what differs, and where."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashnorm.files.header import TensorInfo
from flashnorm.planning.tensors import TensorFold
from flashnorm.verify import means
from flashnorm.verify.findings import Finding
from flashnorm.verify.formats import FORMATS, Array, Scratch, decode
from flashnorm.verify.gains import ExactGain
from flashnorm.verify.products import correct, differing
from flashnorm.verify.range import NO_UNDERFLOW, Underflow, out_of_range
from flashnorm.verify.rounding import RoundingSample


@dataclass(frozen=True)
class Pair:
    """A tensor of the converted checkpoint and the source tensor that it must come from, of one dtype and shape.

    Attributes:
        name: the tensor's name in the converted checkpoint.
        source: where the source tensor is stored.
        stored: where the converted tensor is stored.
        fold: the gains that the tensor must have taken, or None if it takes none.
        centre: the source tensor's name, and the axis over which its mean must be subtracted; or None. Without both, it
            must be unchanged.
    """

    name: str
    source: TensorInfo
    stored: TensorInfo
    fold: TensorFold | None = None
    centre: tuple[str, int] | None = None


class Piece(NamedTuple):
    """The same range of bytes of both tensors of a pair."""

    pair: Pair
    first: int  # offset within the tensor, in bytes
    source: memoryview
    stored: memoryview


def _trailing(pair: Pair) -> int:
    """The product of the sizes of the axes that follow the folded one."""
    assert pair.fold is not None
    return math.prod(pair.stored.shape[pair.fold.axis + 1 :])


def line_of(pair: Pair) -> int:
    """Number of elements in a line, as `products.differing` defines it."""
    assert pair.fold is not None
    trailing = _trailing(pair)
    return pair.stored.shape[pair.fold.axis] if trailing == 1 else trailing


class TensorCheck:
    """The comparison of one tensor, collected over its pieces."""

    def __init__(
        self, pair: Pair, gain: ExactGain | None, sums: means.Sums | None, scratch: Scratch, sample: RoundingSample
    ) -> None:
        self.pair = pair
        self.differing = 0
        self._gain = gain
        self._sums = sums
        self._scratch = scratch
        self._sample = sample
        self._first: tuple[int, str, str] | None = None
        self._infinite = 0
        self._first_infinite: tuple[int, str, str] | None = None

    def look_at(self, piece: Piece) -> Underflow:
        """Compare the next piece. Returns what its folded weights lost at the small end of their dtype's range."""
        if self._gain is None:
            if self._sums is None:
                self._look_for_changes(piece)
            else:
                self._look_for_wrong_differences(piece, self._sums)
            return NO_UNDERFLOW
        return self._look_for_wrong_products(piece, self._gain)

    def _look_for_changes(self, piece: Piece) -> None:
        source, stored = (np.frombuffer(data, np.uint8) for data in (piece.source, piece.stored))
        whole = source.size // 8 * 8
        a, b = source[:whole].view(np.uint64), stored[:whole].view(np.uint64)
        same = np.equal(a, b, out=self._scratch.take("same", a.shape, np.bool_))
        if same.all() and np.array_equal(source[whole:], stored[whole:]):
            return
        elements = math.prod(self.pair.stored.shape)
        size = self.pair.stored.nbytes // elements or 1  # packed 4-bit numbers are compared as bytes
        unequal = (source != stored).reshape(-1, size).any(1)
        places = np.flatnonzero(unequal)

        def pattern(data: Array) -> int:
            return int.from_bytes(data[places[0] * size :][:size].tobytes(), "little")

        self._note(piece.first // size, places, pattern(stored), pattern(source), size)

    def _look_for_wrong_differences(self, piece: Piece, sums: means.Sums) -> None:
        assert self.pair.centre is not None
        tag, trailing = self.pair.stored.dtype, math.prod(self.pair.stored.shape[self.pair.centre[1] + 1 :])
        source, stored = (np.frombuffer(data, FORMATS[tag].bits) for data in (piece.source, piece.stored))
        first = piece.first // source.itemsize
        places = means.differing(tag, source, stored, sums, first, trailing)
        if places.size:
            at = int(places[0])
            line = int(means.lines_of(np.array([first + at]), sums.count, trailing)[0])
            self._note(first, places, int(stored[at]), means.correct(tag, int(source[at]), sums, line), source.itemsize)

    def _look_for_wrong_products(self, piece: Piece, gain: ExactGain) -> Underflow:
        tag = self.pair.stored.dtype
        bits, width = FORMATS[tag].bits, line_of(self.pair)
        source, stored = (np.frombuffer(data, bits) for data in (piece.source, piece.stored))
        first = piece.first // source.itemsize
        trailing = _trailing(self.pair)
        self._sample.take(tag, source, stored, gain.high, first, trailing)
        lines = (-1, width)
        places = differing(
            tag, source.reshape(lines), stored.reshape(lines), gain, first // width, trailing, self._scratch
        )
        if places.size:
            at = int(places[0])
            channel = (first + at) // trailing % len(gain.values)
            expected = correct(tag, int(source[at]), gain.values[channel])
            self._note(first, places, int(stored[at]), expected, source.itemsize)
        places, underflow = out_of_range(tag, source, stored, gain, first, trailing)
        if places.size:
            self._infinite += places.size
            if self._first_infinite is None:
                at = int(places[0])
                value = gain.high[(first + at) // trailing % len(gain.values)]
                factor = self._text(int(source[at]), source.itemsize)
                infinity = self._text(int(stored[at]), source.itemsize)
                self._first_infinite = first + at, infinity, f"{factor} times a gain of {value:.9g}"
        return underflow

    def _note(self, first: int, places: Array, stored: int, expected: int, size: int) -> None:
        self.differing += places.size
        if self._first is None:
            self._first = (first + int(places[0]), self._text(stored, size), self._text(expected, size))

    def _text(self, pattern: int, size: int) -> str:
        return number_text(self.pair.stored.dtype, pattern, size)

    def findings(self) -> Iterator[Finding]:
        """What is wrong with the tensor. Call this after all its pieces were compared."""
        changed = "was to be copied and differs" if self._gain is None else "is not the rounded product"
        changed = changed if self._sums is None else "is not the source's minus its mean, rounded"
        infinite = f"became infinite, as the product does not fit {self.pair.stored.dtype}: its norm must be kept"
        for problem, first, count in (
            (changed, self._first, self.differing),
            (infinite, self._first_infinite, self._infinite),
        ):
            if first is not None:
                at, stored, expected = first
                shape = self.pair.stored.shape
                yield Finding(
                    kind="tensor",
                    name=self.pair.name,
                    problem=problem,
                    index=tuple(int(i) for i in np.unravel_index(at, shape)) if math.prod(shape) > at else (at,),
                    stored=stored,
                    expected=expected,
                    differing=count,
                    elements=math.prod(shape),
                )


def number_text(tag: str, pattern: int, size: int) -> str:
    """A stored number as text: its value, if its dtype is in `FORMATS`, and its bit pattern of `size` bytes."""
    bits = f"0x{pattern:0{2 * size}x}"
    if tag not in FORMATS:
        return bits
    value = float(decode(tag, np.array([pattern], FORMATS[tag].bits))[0])
    return f"{value:.9g} ({bits})"
