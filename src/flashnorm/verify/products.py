"""Is a stored weight the correctly rounded product of a source weight and its gain? Decided exactly, in NumPy.

* Shares nothing with `fold.py`: there torch multiplies and rounds, here the exact product is enclosed from both sides.
  Rounding is monotonic, so where both ends of the enclosure round to one value, that value is the answer.
* The enclosure is first narrow and quick (float32 for the 16-bit formats), then narrower (float64 and wider), and for
  the few products left, at worst one in some thousands, a single value: Python's rational numbers.
* Where format and gain are short enough the first product is exact, and there is nothing to enclose.
* Works on bit patterns (unsigned integers), because NumPy has no bfloat16 and a flipped bit is a bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Segments = Sequence[tuple[int, int, int]]

# Elements worked on at once: enough to hide the cost of a call, few enough for the buffers (20 bytes each) to stay in
# the last-level cache.
BLOCK = 1 << 18

_NOWHERE: Array = np.empty(0, np.int64)


@dataclass(frozen=True)
class Format:
    """A stored floating-point format.

    Attributes:
        bits: the unsigned integer type of the same size.
        precision: bits of significand, the hidden one included.
        exponent: bits of exponent.
        decode: bit patterns to numbers, in the narrowest NumPy dtype that has them.
        wide: the dtypes in which to enclose a product, the quickest first.
        encode: numbers of a wide dtype to bit patterns, rounded once to nearest, ties to even.
    """

    bits: type[np.unsignedinteger]
    precision: int
    exponent: int
    decode: Callable[[Array, "Scratch"], Array]
    wide: tuple[type[np.floating], ...]
    encode: Callable[[Array, Array, "Scratch"], None]

    @property
    def smallest_power(self) -> int:
        """The exponent of the smallest positive value, `2 ** smallest_power`."""
        return 3 - (1 << (self.exponent - 1)) - self.precision

    @property
    def infinity(self) -> int:
        """The bit pattern of infinity; larger magnitudes are NaN."""
        return ((1 << self.exponent) - 1) << (self.precision - 1)

    @property
    def sign(self) -> int:
        """The bit pattern of -0."""
        return 1 << (self.exponent + self.precision - 1)


class Scratch:
    """The working memory of one thread, reused: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """An uninitialised array, valid until the next one is taken for the same use."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if use not in self._buffers or self._buffers[use].size < size:
            self._buffers[use] = np.empty(size, np.uint8)
        return self._buffers[use][:size].view(dtype).reshape(shape)


def _decode_bfloat16(bits: Array, scratch: Scratch) -> Array:
    wide = scratch.take("decoded", bits.shape, np.uint32)
    np.copyto(wide, bits)
    wide <<= 16
    return wide.view(np.float32)


def _encode_bfloat16(value: Array, out: Array, scratch: Scratch) -> None:
    if value.dtype == np.float32:
        bits = value.view(np.uint32)
        rounded = np.right_shift(bits, 16, out=scratch.take("rounded", bits.shape, np.uint32))
        rounded &= 1
        rounded += bits
        rounded += 0x7FFF
    else:
        # Count in units of the last place (of the smallest subnormal if that is larger); `rint` rounds once.
        unit = np.maximum(np.frexp(value)[1] - 8, -133)
        rounded = np.ldexp(np.rint(np.ldexp(value, -unit)), unit).astype(np.float32).view(np.uint32)
    rounded >>= 16
    np.copyto(out, rounded, casting="unsafe")


def _ieee(number: type[np.floating], bits: type[np.unsignedinteger]) -> dict[str, Any]:
    return {
        "bits": bits,
        "decode": lambda pattern, scratch: pattern.view(number),
        "encode": lambda value, out, scratch: np.copyto(out.view(number), value, casting="same_kind"),
    }


# By the names that safetensors gives the dtypes.
FORMATS: dict[str, Format] = {
    "BF16": Format(
        bits=np.uint16,
        precision=8,
        exponent=8,
        decode=_decode_bfloat16,
        wide=(np.float32, np.float64),
        encode=_encode_bfloat16,
    ),
    "F16": Format(precision=11, exponent=5, wide=(np.float32, np.float64), **_ieee(np.float16, np.uint16)),
    "F32": Format(precision=24, exponent=8, wide=(np.float64,), **_ieee(np.float32, np.uint32)),
    "F64": Format(precision=53, exponent=11, wide=(np.longdouble,), **_ieee(np.float64, np.uint64)),
}


def decode(tag: str, bits: Array) -> Array:
    """Bit patterns of a safetensors dtype in `FORMATS` as float64, without rounding."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return FORMATS[tag].decode(bits, Scratch()).astype(np.float64)


class WideGain:
    """A gain in one wide dtype, with the factors that take a product below and above the exact one.

    Attributes:
        value: `[n]`, the gain, rounded.
        below, above: `[n]`, 1 where the product with any weight of the format is exact.
        exact: it is for every channel.
        zero: `[n]`, the gain is zero itself, not rounded to zero.
    """

    def __init__(self, gain: "ExactGain", number: type[np.floating], precision: int) -> None:
        limits = np.finfo(number)
        with np.errstate(all="ignore"):
            high, low = gain.high.astype(number), gain.low.astype(number)
            self.value = np.where(low == 0, high, high + low)  # -0 + 0 would lose its sign
        self.zero = gain.zero
        # Three roundings (of the gain, the product and the factor) move it by less than 4 epsilon. A gain out of the
        # dtype's range (or so small that `low` is not in float64's) says nothing about the product: it is between 0 and
        # infinity times the weight.
        usable = np.isfinite(self.value) & (np.abs(self.value) >= max(limits.smallest_normal, 2.0**-960))
        fits = gain.bits + precision <= limits.nmant + 1
        exact = gain.special | (usable & fits & (self.value == gain.high) & (gain.low == 0))
        self.value = np.where(exact | usable, self.value, number(1))
        self.below = np.where(exact, number(1), np.where(usable, number(1) - 4 * limits.eps, number(0)))
        self.above = np.where(exact, number(1), np.where(usable, number(1) + 4 * limits.eps, number(np.inf)))
        self.exact = bool(exact.all())
        # Smaller products are subnormal in the wide dtype, where the relative error has no bound.
        self.smallest = 2 * limits.smallest_normal


class ExactGain:
    """The gain of every channel of an axis, as exact numbers.

    Attributes:
        values: a rational number, or a float where only a float will do: zeros with their sign, infinities, NaN.
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
            segments: `(axis_start, gain_start, run)`: channel `axis_start + i` takes gain `gain_start + i`; the others
                are left alone. Empty: channel `i` takes gain `i`.
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
        return ExactGain([_product(a, b) for a, b in zip(self.values, other.values, strict=True)])

    @cached_property
    def special(self) -> Array:
        """`[n]`: zero, infinite or NaN."""
        return np.array([isinstance(value, float) for value in self.values])

    @cached_property
    def zero(self) -> Array:
        """`[n]`: zero of either sign."""
        return np.array([value == 0 for value in self.values])

    @cached_property
    def high(self) -> Array:
        """`[n]` float64: the gain, rounded."""
        return np.array([_float(value) for value in self.values])

    @cached_property
    def low(self) -> Array:
        """`[n]` float64: what `high` left over, rounded."""
        rest = np.zeros(len(self.values))
        for i, (value, high) in enumerate(zip(self.values, self.high.tolist(), strict=True)):
            if isinstance(value, Fraction) and math.isfinite(high):
                rest[i] = _float(value - Fraction(high))
        return rest

    @cached_property
    def bits(self) -> Array:
        """`[n]`: bits from the first set to the last set one."""
        return np.array([_bits(value) for value in self.values])

    def wide(self, number: type[np.floating], precision: int) -> WideGain:
        """The gain in a wide dtype, for weights of `precision` bits."""
        key = (number, precision)
        if key not in self._wide:
            self._wide[key] = WideGain(self, number, precision)
        return self._wide[key]


def differing(
    tag: str,
    weight: Array,
    stored: Array,
    gain: ExactGain,
    first_line: int = 0,
    trailing: int = 1,
    scratch: Scratch | None = None,
) -> Array:
    """Where `stored` is not the correctly rounded product of `weight` and its gain.

    Args:
        tag: the safetensors dtype of both.
        weight: `[lines, width]` unsigned integers: bit patterns of a run of lines of the tensor. A line is a slice
            along the folded axis if that is the last (`trailing == 1`, `width` channels), else all that follows it
            (`width == trailing` numbers of one channel).
        stored: like `weight`.
        gain: of every channel of the axis.
        first_line: the number of the first line within the tensor.
        trailing: the product of the sizes of the axes that follow the folded one.
        scratch: the calling thread's.

    Returns:
        The differing positions in `weight.reshape(-1)`, ascending. NaN is equal to NaN, +0 is not equal to -0.
    """
    lines, width = weight.shape
    per_block = max(1, BLOCK // width)
    scratch = scratch or Scratch()
    wrong = []
    for start in range(0, lines, per_block):
        stop = min(start + per_block, lines)
        of_lines = np.arange(first_line + start, first_line + stop) % len(gain.values)
        channels = None if trailing == 1 else of_lines
        found = _differing_in_block(tag, weight[start:stop], stored[start:stop], gain, channels, scratch)
        if found.size:
            wrong.append(found + start * width)
    return np.concatenate(wrong) if wrong else _NOWHERE


def correct(tag: str, weight: int, gain: Fraction | float) -> int:
    """The bit pattern of the correctly rounded product of one weight, a bit pattern, and an exact gain."""
    form = FORMATS[tag]
    product = _product(_exact(float(decode(tag, np.array([weight], form.bits))[0])), gain)
    if isinstance(product, Fraction):
        return nearest(form, product)
    if math.isnan(product):
        return form.infinity | 1 << (form.precision - 2)
    return (form.infinity if product else 0) | (form.sign if math.copysign(1.0, product) < 0 else 0)


def nearest(form: Format, value: Fraction) -> int:
    """The bit pattern of the value of `form` nearest to `value`, which is not zero; ties go to the even pattern."""
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = max(exponent - form.precision + 1, form.smallest_power)
    # Patterns of one sign are in the order of their values, so that a carry runs into the exponent, up to infinity.
    pattern = round(size / Fraction(2) ** unit) + ((unit - form.smallest_power) << (form.precision - 1))
    return min(pattern, form.infinity) | (form.sign if value < 0 else 0)


def _differing_in_block(
    tag: str,
    weight: Array,
    stored: Array,
    gain: ExactGain,
    channels: Array | None,
    scratch: Scratch,
) -> Array:
    """`differing` for few lines; `channels`: the channel of each line, or None where a line has all channels."""
    form = FORMATS[tag]
    wrong, unsure = _enclose(form, form.wide[0], weight, stored, gain, channels, scratch)
    if not unsure.size:
        return wrong
    found = [wrong]
    width = weight.shape[1]
    channel = unsure % width if channels is None else channels[unsure // width]
    weight, stored = weight.reshape(-1)[unsure][:, None], stored.reshape(-1)[unsure][:, None]
    for number in form.wide[1:]:
        wrong, still = _enclose(form, number, weight, stored, gain, channel, scratch)
        found.append(unsure[wrong])
        unsure, channel, weight, stored = unsure[still], channel[still], weight[still], stored[still]
    pairs = zip(unsure, channel, weight[:, 0].tolist(), stored[:, 0].tolist(), strict=True)
    exactly = [at for at, c, w, s in pairs if not _same(form, s, correct(tag, w, gain.values[c]))]
    found.append(np.array(exactly, np.int64))
    return np.sort(np.concatenate(found))


def _enclose(
    form: Format,
    number: type[np.floating],
    weight: Array,
    stored: Array,
    gain: ExactGain,
    channels: Array | None,
    scratch: Scratch,
) -> tuple[Array, Array]:
    """The positions where `stored` is certainly wrong, and those where this dtype is too narrow to tell."""
    wide = gain.wide(number, form.precision)
    shape = weight.shape

    def spread(per_channel: Array) -> Array:
        return per_channel if channels is None else per_channel[channels][:, None]

    def rounded(factor: Array | None, use: str) -> Array:
        moved = product
        if factor is not None:
            moved = np.multiply(product, spread(factor), out=scratch.take("moved", shape, number))
        bits = scratch.take(use, shape, form.bits)
        form.encode(moved, bits, scratch)
        return bits

    with np.errstate(all="ignore"):
        numbers = form.decode(weight, scratch)
        product = np.multiply(numbers, spread(wide.value), out=scratch.take("product", shape, number))
        low = rounded(None if wide.exact else wide.below, "low")
        unequal = np.not_equal(low, stored, out=scratch.take("unequal", shape, np.bool_))
        unsure = None
        if not wide.exact:
            high = rounded(wide.above, "high")
            unsure = np.not_equal(low, high, out=scratch.take("unsure", shape, np.bool_))
        size = np.abs(product, out=product)
        # Written so that a NaN counts as small and is looked at closely.
        if not size.min(initial=np.inf) >= wide.smallest:
            small = (size < wide.smallest) & (numbers != 0) & ~spread(wide.zero)
            unsure = small if unsure is None else unsure | small
    if unsure is None or not unsure.any():
        wrong = np.flatnonzero(unequal) if unequal.any() else _NOWHERE
        return _without_equal_nans(form, low, stored, wrong), _NOWHERE
    wrong = np.flatnonzero(unequal & ~unsure)
    return _without_equal_nans(form, low, stored, wrong), np.flatnonzero(unsure)


def _without_equal_nans(form: Format, a: Array, b: Array, positions: Array) -> Array:
    if not positions.size:
        return positions
    a, b = a.reshape(-1)[positions] & (form.sign - 1), b.reshape(-1)[positions] & (form.sign - 1)
    return positions[~((a > form.infinity) & (b > form.infinity))]


def _same(form: Format, a: int, b: int) -> bool:
    both_nan = a & (form.sign - 1) > form.infinity and b & (form.sign - 1) > form.infinity
    return a == b or both_nan


def _exact(number: float) -> Fraction | float:
    if math.isnan(number):
        return math.nan  # without a payload, whose rounding could carry into the sign
    return Fraction(number) if number and math.isfinite(number) else number


def _sum(number: float, offset: float) -> Fraction | float:
    if not offset or not math.isfinite(number):
        return _exact(number)  # not `number + 0.0`, which has no -0
    return Fraction(number) + Fraction(offset) or 0.0


def _product(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    # One of them is zero, infinite or NaN: of the other only the sign counts.
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
