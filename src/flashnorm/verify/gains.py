"""A norm's gain as exact numbers, and in the wide dtypes in which `products.py` encloses products between bounds.

An exact number is a `Fraction`, or a float where no fraction can hold the value: zero with its sign, infinity, NaN.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np

from flashnorm.verify.formats import Array

Segments = Sequence[tuple[int, int, int]]


class WideGain:
    """A gain in one wide dtype, with factors that turn a computed product into bounds of the exact product.

    Attributes:
        value: `[n]`, the gain, rounded to the wide dtype.
        below, above: `[n]`, the factors of the lower and the upper bound; 1 where the product with every weight of the
            format is exact.
        exact: whether the product is exact for every channel.
        zero: `[n]`, whether the gain itself is zero (not merely rounded to zero).
        smallest: products below this magnitude have no such bounds.
    """

    def __init__(self, gain: "ExactGain", number: type[np.floating], precision: int) -> None:
        limits = np.finfo(number)
        with np.errstate(all="ignore"):
            high, low = gain.high.astype(number), gain.low.astype(number)
            self.value = np.where(low == 0, high, high + low)  # -0 + 0 would lose its sign
        self.zero = gain.zero
        # Three roundings (of the gain, the product and the factor) move the product by less than 4 epsilon. If a gain
        # is outside of the dtype's range, or so small that float64 cannot hold `low`, nothing is known about the
        # product: its bounds are 0 and infinity.
        usable = np.isfinite(self.value) & (np.abs(self.value) >= max(limits.smallest_normal, 2.0**-960))
        fits = gain.bits + precision <= limits.nmant + 1
        exact = gain.special | (usable & fits & (self.value == gain.high) & (gain.low == 0))
        self.value = np.where(exact | usable, self.value, number(1))
        self.below = np.where(exact, number(1), np.where(usable, number(1) - 4 * limits.eps, number(0)))
        self.above = np.where(exact, number(1), np.where(usable, number(1) + 4 * limits.eps, number(np.inf)))
        self.exact = bool(exact.all())
        # Smaller products are subnormal in the wide dtype, where the relative error is not bounded.
        self.smallest = 2 * limits.smallest_normal


class ExactGain:
    """The gain of every channel of an axis, as exact numbers.

    Attributes:
        values: one exact number for each channel (a `Fraction`, or a float for zero, infinity and NaN).
    """

    def __init__(self, values: Sequence[Fraction | float]) -> None:
        self.values = list(values)
        self._wide: dict[tuple[type[np.floating], int], WideGain] = {}

    @staticmethod
    def of(weight: Array, offset: float, length: int, segments: Segments = ()) -> "ExactGain":
        """The gain `offset + weight` along an axis of `length` channels.

        Args:
            weight: the norm's stored weight as float64.
            offset: 0.0 for a plain gain, 1.0 for Gemma's.
            length: how many channels the axis has.
            segments: `(axis_start, gain_start, run)`: channel `axis_start + i` takes gain `gain_start + i`; channels
                in no segment have a gain of 1. Empty: channel `i` takes gain `i`.
        """
        gains = [_sum(float(w), offset) for w in weight.reshape(-1)]
        values: list[Fraction | float] = [Fraction(1)] * length
        for axis_start, gain_start, run in segments or ((0, 0, length),):
            taken = gains[gain_start : gain_start + run]
            if len(taken) != run or axis_start + run > length:
                raise ValueError(f"{len(gains)} gains do not reach over the {length} channels of the axis")
            values[axis_start : axis_start + run] = taken
        return ExactGain(values)

    def __mul__(self, other: "ExactGain") -> "ExactGain":
        return ExactGain([product_of(a, b) for a, b in zip(self.values, other.values, strict=True)])

    @cached_property
    def special(self) -> Array:
        """`[n]`: whether the gain is zero, infinite or NaN."""
        return np.array([isinstance(value, float) for value in self.values])

    @cached_property
    def zero(self) -> Array:
        """`[n]`: whether the gain is zero, of either sign."""
        return np.array([value == 0 for value in self.values])

    @cached_property
    def high(self) -> Array:
        """`[n]` float64: the rounded gain."""
        return np.array([_float(value) for value in self.values])

    @cached_property
    def low(self) -> Array:
        """`[n]` float64: the rounded rest, gain - `high`."""
        rest = np.zeros(len(self.values))
        for i, (value, high) in enumerate(zip(self.values, self.high.tolist(), strict=True)):
            if isinstance(value, Fraction) and math.isfinite(high):
                rest[i] = _float(value - Fraction(high))
        return rest

    @cached_property
    def bits(self) -> Array:
        """`[n]`: the number of significant bits, from the first set bit to the last."""
        return np.array([_bits(value) for value in self.values])

    def wide(self, number: type[np.floating], precision: int) -> WideGain:
        """The gain in a wide dtype, for weights of `precision` bits."""
        key = (number, precision)
        if key not in self._wide:
            self._wide[key] = WideGain(self, number, precision)
        return self._wide[key]


def exact(number: float) -> Fraction | float:
    """A float as an exact number; every NaN becomes the same NaN."""
    if math.isnan(number):
        return math.nan  # without a payload, whose rounding could carry into the sign
    return Fraction(number) if number and math.isfinite(number) else number


def _sum(number: float, offset: float) -> Fraction | float:
    if not offset or not math.isfinite(number):
        return exact(number)  # not `number + 0.0`, which has no -0
    return Fraction(number) + Fraction(offset) or 0.0


def product_of(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    """The exact product of two exact numbers."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    # One factor is zero, infinite or NaN, so only the sign of the other one matters.
    return _one_of_its_sign(a) * _one_of_its_sign(b)


def _one_of_its_sign(value: Fraction | float) -> float:
    return value if isinstance(value, float) else 1.0 if value > 0 else -1.0


def _float(value: Fraction | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _bits(value: Fraction | float) -> int:
    if isinstance(value, float):
        return 0
    digits = abs(value.numerator)
    return (digits // (digits & -digits)).bit_length()
