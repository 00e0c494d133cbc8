"""Is a stored weight the source's minus its mean, correctly rounded? Decided exactly, in NumPy, without `means.py`.

* A line (see `flashnorm.means`) is added up by `math.fsum`, which rounds the exact sum once; so does what is left.
* A lower and an upper bound of the difference are computed in float64, or wider. Rounding is monotonic, so if both
  bounds round to the same value, it is right; the few others are computed in rational numbers.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

from flashnorm.files.reader import Checkpoint
from flashnorm.verify.formats import FORMATS, Array, Format, Scratch, decode, nearest

_BLOCK = 8 << 20  # bytes of a weight
_ELEMENTS = 1 << 18  # of a block of differences


@dataclass
class Sums:
    """The exact sums of the lines of a tensor.

    Attributes:
        count: how many terms each has.
        high, low: `[lines]` float64: the rounded sum, and the rounded rest.
        others: line -> its sum, where `high + low` is not all of it.
    """

    count: int
    high: Array
    low: Array
    others: dict[int, Fraction] = field(default_factory=dict)

    def exact(self, line: int) -> Fraction:
        """The sum of a line."""
        return self.others.get(line, Fraction(float(self.high[line])) + Fraction(float(self.low[line])))


def sums_of(source: Checkpoint, name: str, axis: int) -> Sums:
    """The exact sums of a tensor over an axis. Sums of infinities and NaN are NaN.

    Args:
        source: the checkpoint that holds the tensor.
        name: the tensor, of a dtype in `FORMATS`.
        axis: the axis.

    Raises:
        InputError: a file cannot be read.
    """
    info = source.tensors[name]
    high: list[float] = []
    low: list[float] = []
    others: dict[int, Fraction] = {}
    for block in source.read_outputs(name, axis, _BLOCK):
        bits = block.contiguous().view(torch.uint8).numpy().view(FORMATS[info.dtype].bits)
        for terms in decode(info.dtype, bits).tolist():
            try:
                total = math.fsum(terms)
                rest = math.fsum((*terms, -total))
            except (ValueError, OverflowError):
                total = rest = math.nan
            if rest and math.isfinite(rest) and math.fsum((*terms, -total, -rest)):
                others[len(high)] = sum(map(Fraction, terms), Fraction(0))
            high.append(total)
            low.append(rest)
    return Sums(info.shape[axis], np.array(high), np.array(low), others)


def differing(tag: str, source: Array, stored: Array, sums: Sums, first: int, trailing: int) -> Array:
    """Where `stored` is not the correctly rounded difference of `source` and the mean of its line.

    Args:
        tag: the safetensors dtype of both.
        source, stored: bit patterns of a piece of the tensor, flat.
        sums: the sums of all lines.
        first: the position of the piece in the flat tensor.
        trailing: the product of the sizes of the axes after the one that is centred.

    Returns:
        The differing positions, ascending. +0 does not equal -0.
    """
    form, scratch = FORMATS[tag], Scratch()
    wide = np.longdouble if tag == "F64" else np.float64
    wrong: list[Array] = []
    for start in range(0, source.size, _ELEMENTS):
        part = slice(start, min(start + _ELEMENTS, source.size))
        lines = lines_of(np.arange(first + start, first + part.stop), sums.count, trailing)
        with np.errstate(all="ignore"):
            values = decode(tag, source[part]).astype(wide)
            rest = np.abs(sums.low.astype(wide)[lines]) / sums.count
            mean = sums.high.astype(wide)[lines] / sums.count
            difference = values - mean + 0.0  # turns -0 into +0
            error = 4 * np.finfo(wide).eps * (np.abs(mean) + np.abs(difference)) + 2 * rest
            low, high = np.empty((2, values.size), form.bits)
            form.encode(difference - error, low, scratch)
            form.encode(difference + error, high, scratch)
        unsure = low != high
        wrong.append(start + np.flatnonzero(~unsure & (low != stored[part])))
        again = [
            start + at
            for at in np.flatnonzero(unsure)
            if int(stored[start + at]) != correct(tag, int(source[start + at]), sums, int(lines[at]))
        ]
        wrong.append(np.array(again, np.int64))
    return np.sort(np.concatenate(wrong)) if wrong else np.empty(0, np.int64)


def correct(tag: str, pattern: int, sums: Sums, line: int) -> int:
    """The bit pattern of the correctly rounded difference of one weight (given as a bit pattern) and its mean."""
    form = FORMATS[tag]
    value = float(decode(tag, np.array([pattern], form.bits))[0])
    if not (math.isfinite(value) and math.isfinite(sums.high[line])):
        return _nan(form)
    difference = Fraction(value) - sums.exact(line) / sums.count
    return nearest(form, difference) if difference else 0


def lines_of(places: Array, count: int, trailing: int) -> Array:
    """The line of each position in the flat tensor."""
    return places // (count * trailing) * trailing + places % trailing


def _nan(form: Format) -> int:
    return form.infinity | 1 << (form.precision - 2)
