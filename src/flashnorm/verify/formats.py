"""The floating-point formats of stored weights, in NumPy: from bit patterns to numbers, and back with one rounding.

* The functions work on bit patterns (unsigned integers), because NumPy has no bfloat16 and every bit must be compared.
* The bfloat16 of ml_dtypes is no alternative: it rounds float64 to float32 first, and so 1 + 2**-8 + 2**-40 becomes 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Format:
    """A stored floating-point format.

    Attributes:
        bits: the unsigned integer type of the same size.
        precision: number of bits of the significand, the hidden bit included.
        exponent: number of bits of the exponent.
        decode: turns bit patterns into numbers of the narrowest NumPy dtype that can hold them.
        wide: the dtypes in which a product is enclosed between bounds, the fastest first.
        encode: turns numbers of a wide dtype into bit patterns, rounded once to nearest, ties to even.
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
    """The working memory of one thread. It is reused, because fresh pages cost more time than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """An uninitialised array, valid until the next call with the same `use`."""
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
        # Count in units of the last place (at least the smallest subnormal); only `rint` rounds.
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


# safetensors' name of a dtype -> its format.
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
    """The values of bit patterns as float64, without rounding; `tag` is a safetensors dtype in `FORMATS`."""
    with np.errstate(invalid="ignore"):  # signalling NaNs would warn
        return FORMATS[tag].decode(bits, Scratch()).astype(np.float64)


def nearest(form: Format, value: Fraction) -> int:
    """The bit pattern of the number in `form` nearest to a nonzero `value`; ties go to the even pattern."""
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = max(exponent - form.precision + 1, form.smallest_power)
    # Patterns of one sign are ordered like their values, so a carry goes into the exponent correctly, up to infinity.
    pattern = round(size / Fraction(2) ** unit) + ((unit - form.smallest_power) << (form.precision - 1))
    return min(pattern, form.infinity) | (form.sign if value < 0 else 0)
