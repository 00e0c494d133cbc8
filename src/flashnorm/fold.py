"""The mathematics of folding, as pure functions on tensors.

* `W* = W diag(g)` (FlashNorm, proposition 1) with `g = offset + w`: the result is the exact product rounded once, to the
  nearest value of `W`'s dtype, ties to even.
* A gain is kept as an unevaluated sum `high + low` of two float64 tensors, because `1 + w` needs up to 53 + 126 bits.
* Casting float64 to a 16-bit dtype rounds twice in PyTorch (through float32); rounding the first time *to odd* makes
  the second rounding right (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Bits of significand, the hidden one included.
PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


class Gain(NamedTuple):
    """A gain per channel, exactly `high + low`. Both `[n]`, float64, with `|low| <= ulp(high) / 2`."""

    high: Tensor
    low: Tensor


def gain_of(weight: Tensor, offset: float = 0.0) -> Gain:
    """The gain `offset + weight` of a norm, without rounding.

    Args:
        weight: the norm's stored weight, any shape, a floating dtype.
        offset: 0.0 for a plain gain, 1.0 for Gemma's.

    Raises:
        TypeError: the weight is not of a dtype in `PRECISION`.
    """
    _check_dtype(weight)
    high, low = _two_sum(weight.double(), torch.tensor(offset, dtype=torch.float64, device=weight.device))
    return Gain(high, torch.where(high.isfinite(), low, 0.0))


def product_of(first: Gain, second: Gain) -> Gain:
    """The gain of two norm weights on one channel, without rounding.

    Raises:
        ValueError: the product needs more bits than two float64 numbers have.
    """
    if first.low.any() or second.low.any():
        raise ValueError("the product of these gains needs more than 106 bits and cannot be folded exactly")
    high, low = _two_product(first.high, second.high)
    return Gain(high, low)


def fold_weight(weight: Tensor, gain: Gain, axis: int, out: Tensor | None = None) -> Tensor:
    """`W diag(g)`: every slice of `weight` along `axis` times its gain (FlashNorm, proposition 1).

    Args:
        weight: a linear's weight of any shape and a dtype in `PRECISION`.
        gain: one value per index of `axis`, on the same device.
        axis: the axis that is contracted with the norm's output.
        out: where to write the result, of `weight`'s shape and dtype; may be `weight` itself.

    Returns:
        `out` or a new tensor of `weight`'s shape and dtype: the exact product, rounded once to nearest, ties to even.
        Infinities and NaNs are carried as multiplication carries them.

    Raises:
        TypeError: the weight is not of a dtype in `PRECISION`.
        ValueError: the gain's length is not the axis's.
    """
    _check_dtype(weight)
    if gain.high.shape != (weight.shape[axis],):
        raise ValueError(f"expected {weight.shape[axis]} gains for axis {axis}, found shape {list(gain.high.shape)}")
    shape = [1] * weight.dim()
    shape[axis] = -1
    high, low = gain.high.view(shape), gain.low.view(shape)
    narrow = high.to(weight.dtype)
    if not low.any() and (narrow == high).all():
        # The dtype's own multiplication rounds the exact product once: float32 and float64 by IEEE 754, the 16-bit types
        # because PyTorch multiplies them in float32, where the product of two such numbers (16 or 22 bits) is exact.
        return torch.mul(weight, narrow, out=out)
    wide = weight.double()
    if not low.any() and PRECISION[weight.dtype] + _significant_bits(high) <= PRECISION[torch.float64]:
        folded = _round(wide * high, weight.dtype)
    else:
        folded = _round_sum_of_products(wide, high, low, weight.dtype)
    return folded if out is None else out.copy_(folded)


def _check_dtype(weight: Tensor) -> None:
    if weight.dtype not in PRECISION:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in PRECISION)
        raise TypeError(f"expected a weight of {known}, found {weight.dtype}")


def _significant_bits(value: Tensor) -> int:
    """The most bits that any of these float64 values needs from its first set bit to its last."""
    mantissa, _ = torch.frexp(torch.where(value.isfinite(), value, 0.0))
    integer = (mantissa.abs() * 2.0**53).long()
    lowest = (integer & -integer).clamp_min(1).double()
    return int(torch.where(integer == 0, 0.0, 53 - torch.log2(lowest)).max()) if value.numel() else 0


def _round_sum_of_products(weight: Tensor, high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight * (high + low)`, rounded once: an exact sum of four float64 terms, all but the last step to odd."""
    main, main_error = _two_product(weight, high)
    side, side_error = _two_product(weight, low)
    middle, rest = _two_sum(main_error, side)
    tail = _add_to_odd(rest, side_error)
    upper, upper_error = _two_sum(middle, tail)
    total, total_error = _two_sum(main, upper)
    correction = _add_to_odd(total_error, upper_error)
    if dtype == torch.float64:
        rounded = total + correction
    else:
        rounded = _add_to_odd(total, correction)
    # Where there is nothing to round, the product itself: it has the right sign of zero, infinity or NaN.
    return _round(torch.where(main.isfinite() & (weight != 0), rounded, main), dtype)


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 to `dtype`, rounded once to nearest, ties to even."""
    if dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    single = value.float()
    error = torch.where(value == single, 0.0, value - single)
    return _to_odd(single, error).to(dtype)


def _to_odd(rounded: Tensor, error: Tensor) -> Tensor:
    """Turn round-to-nearest into round-to-odd; `error` is the exact value minus `rounded`, of which only the sign counts.

    An inexact result is truncated towards zero and its last bit set, so that a later rounding to two bits less or
    fewer gives what rounding the exact value would have given.
    """
    integer = torch.int32 if rounded.dtype == torch.float32 else torch.int64
    bits = rounded.view(integer)
    away_from_zero = (torch.signbit(error) != torch.signbit(rounded)).to(integer)
    return torch.where(error == 0, bits, (bits - away_from_zero) | 1).view(rounded.dtype)


def _add_to_odd(a: Tensor, b: Tensor) -> Tensor:
    return _to_odd(*_two_sum(a, b))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a + b` rounded, and its error: exactly `a + b` together (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a * b` rounded, and its error: exactly `a * b` together (Dekker; for magnitudes between 2^-480 and 2^480)."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, torch.where(product.isfinite(), error, 0.0)


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 as the sum of two 26-bit halves (Veltkamp)."""
    scaled = value * (2.0**27 + 1.0)
    high = scaled - (scaled - value)
    return high, value - high
