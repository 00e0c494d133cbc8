"""The mathematics of folding, as pure functions on tensors.

* `W* = W diag(g)` (FlashNorm, proposition 1) with `g = offset + w`: the result is the exact product rounded once, to
  the nearest value of `W`'s dtype, ties to even.
* A norm's bias goes into the linear's, `c* = c + W beta`, or stays as `beta / g`: exact as well, and rounded once.
* A gain is kept as an unevaluated sum `high + low` of two float64 tensors, because `1 + w` needs up to 53 + 126 bits.
* Casting float64 to a 16-bit dtype rounds twice in PyTorch (through float32); rounding the first time *to odd* makes
  the second rounding right (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

# Bits of significand, the hidden one included.
PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}

# The next wider dtype, the integers of its size, and how many of its last bits a rounding from it to the key drops.
_WIDER = {
    torch.bfloat16: (torch.float32, torch.int32, 16),
    torch.float16: (torch.float32, torch.int32, 13),
    torch.float32: (torch.float64, torch.int64, 29),
}


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
    if not offset:  # adding 0 would change the sign of -0
        return Gain(weight.double(), torch.zeros_like(weight, dtype=torch.float64))
    high, low = _two_sum(weight.double(), torch.tensor(offset, dtype=torch.float64, device=weight.device))
    return Gain(high, torch.where(high.isfinite(), low, 0.0))


def product_of(first: Gain, second: Gain) -> Gain:
    """The gain of two norm weights on one channel, without rounding.

    Raises:
        ValueError: the product needs more bits than two float64 numbers have, or is too large for them.
    """
    if first.low.any() or second.low.any():
        raise ValueError("the product of these gains needs more than 106 bits and cannot be folded exactly")
    high, low = _two_product(first.high, second.high)
    if (high.isinf() & first.high.isfinite() & second.high.isfinite()).any():
        raise ValueError("the product of these gains is too large for float64 and cannot be folded exactly")
    return Gain(high, low)


def exceeds_one(gain: Gain) -> Tensor:
    """Where a gain makes weights larger: `[n]`, boolean, exact; true for infinity."""
    size = gain.high.abs()
    return (size > 1) | ((size == 1) & (gain.high * gain.low > 0))


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
        # The dtype's own multiplication rounds the exact product once: float32 and float64 by IEEE 754, the 16-bit
        # types because PyTorch multiplies them in float32, where the product of two (16 or 22 bits) is exact.
        return torch.mul(weight, narrow, out=out)
    out = torch.empty_like(weight) if out is None else out
    if weight.numel() == 0:
        return out
    if weight.dtype in _WIDER and _is_normal(high, _WIDER[weight.dtype][0]):
        _fold_through_wider(weight, high, low, out)
    else:
        high, low = high.expand_as(weight), low.expand_as(weight)
        for block in _blocks(weight.shape):
            out[block] = _round_sum_of_products(weight[block].double(), high[block], low[block], weight.dtype)
    return out


def overflowed(weight: Tensor, folded: Tensor, gain: Gain, axis: int) -> Tensor:
    """Where a product does not fit the dtype: weights that were finite, with a finite gain, and became infinite.

    Args:
        weight, folded: what `fold_weight` took and returned.
        gain, axis: as for `fold_weight`.

    Returns:
        `[n]`, of `weight`'s dtype: the first such weight of each channel, 0 where there is none.
    """
    rows, products = (tensor.movedim(axis, 0).flatten(1) for tensor in (weight, folded))
    bad = products.isinf() & rows.isfinite() & gain.high.isfinite()[:, None]
    first = bad.byte().argmax(1, keepdim=True)
    return torch.where(bad.any(1), rows.gather(1, first).squeeze(1), 0.0)


def largest_weights(weight: Tensor, axis: int) -> Tensor:
    """The largest finite magnitude of each channel of `axis`, `[n]`: where its product fits, all products do."""
    if not weight.numel():
        return weight.new_zeros(weight.shape[axis])
    others = [dim for dim in range(weight.dim()) if dim != axis % weight.dim()]
    largest = torch.maximum(weight.amax(others), -weight.amin(others))
    return largest if largest.isfinite().all() else torch.where(weight.isfinite(), weight.abs(), 0.0).amax(others)


def fold_bias(bias: Tensor, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`c + W beta`: a linear's bias that takes the bias of the norm before it.

    Args:
        bias: `[out]`, of a dtype in `PRECISION`.
        products: pairs of `W`, `[out, in]`, and `beta`, `[in]`, one for each norm bias.

    Returns:
        `[out]`, of `bias`'s dtype: the exact sum of all products, rounded once to nearest, ties to even. An exact zero
        is +0. Where anything is infinite or NaN, so is the result, as summation has it.

    Raises:
        TypeError: a tensor is not of a dtype in `PRECISION`.
    """
    for tensor in (bias, *itertools.chain(*products)):
        _check_dtype(tensor)
    wide = [(weight.double(), beta.double()) for weight, beta in products]
    total, magnitude, terms = bias.double(), bias.double().abs(), 1
    for weight, beta in wide:
        total = total + weight @ beta
        magnitude = magnitude + weight.abs() @ beta.abs()
        terms += 2 * len(beta)
    # A float64 sum is off by at most about `terms` half units in the last place of the sum of magnitudes; a product of
    # two float64 numbers, by one more, and by what is lost below the normal numbers.
    bound = magnitude * (terms * torch.finfo(torch.float64).eps) + terms * torch.finfo(torch.float64).tiny
    low, high = (_round(total - bound, bias.dtype), _round(total + bound, bias.dtype))
    rounded = _round(total, bias.dtype) + 0.0  # turns -0 into +0
    always = bias.dtype == torch.float64  # a float64 sum is no wider than what it is rounded to
    doubtful = (((low != high) | always) & total.isfinite()).nonzero().flatten()
    if doubtful.numel():
        parts = [_two_product(weight[doubtful], beta) for weight, beta in wide]
        rows = torch.cat([bias[doubtful, None].double(), *itertools.chain(*parts)], dim=1)
        rounded[doubtful] = _round_sums(rows, bias.dtype)
    return rounded


def divide_bias(bias: Tensor, gain: Gain) -> Tensor:
    """`beta / g`: a norm's bias that stays when the gain leaves, since `g * x + beta = g * (x + beta / g)`.

    Args:
        bias: `[n]`, of a dtype in `PRECISION`.
        gain: one value per channel.

    Returns:
        `[n]`, of `bias`'s dtype: the exact quotient, rounded once to nearest, ties to even; a zero divided by
        anything is that zero. See `is_divisible` for where that can be used.

    Raises:
        TypeError: the bias is not of a dtype in `PRECISION`.
    """
    _check_dtype(bias)
    wide = bias.double()
    quotient = wide / gain.high
    product, error = _two_product(quotient, gain.high)
    residual = (wide - product) - error
    for i in (gain.low != 0).nonzero().flatten().tolist():  # a gain of more than 53 bits: rare, so exactly
        exact = Fraction(gain.high[i].item()) + Fraction(gain.low[i].item())
        if exact and math.isfinite(wide[i]):
            value = Fraction(wide[i].item()) / exact
            quotient[i] = float(value)
            rest = value - Fraction(quotient[i].item())
            residual[i] = float((rest > 0) - (rest < 0)) * math.copysign(1.0, exact)
    # Whether the exact quotient is above or below the rounded one: the residual's sign, turned with the gain's.
    error = torch.where(quotient.isfinite() & (wide != 0), residual * gain.high.sign(), 0.0)
    divided = _round(quotient if bias.dtype == torch.float64 else _to_odd(quotient, error), bias.dtype)
    return torch.where(bias == 0, bias, divided)


def is_divisible(bias: Tensor, gain: Gain) -> Tensor:
    """Where `beta / g` can stand for `beta`: `[n]`, boolean. Both are as for `divide_bias`.

    Not where the gain is zero or NaN and the bias is not zero, and not where the quotient is infinite or subnormal.
    """
    quotient = divide_bias(bias, gain)
    normal = quotient.isfinite() & (quotient.abs() >= torch.finfo(bias.dtype).tiny)
    return (bias == 0) | normal


def _check_dtype(weight: Tensor) -> None:
    if weight.dtype not in PRECISION:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in PRECISION)
        raise TypeError(f"expected a weight of {known}, found {weight.dtype}")


def _blocks(shape: torch.Size, limit: int = 1 << 15) -> Iterator[tuple[slice, ...]]:
    """Parts of a tensor, about `limit` elements each: what is computed on the way then stays in the cache."""
    axis = next((axis for axis, size in enumerate(shape) if size > 1), 0)
    step = max(1, limit * shape[axis] // max(1, shape.numel()))
    for start in range(0, shape[axis], step):
        yield (*[slice(None)] * axis, slice(start, start + step))


def _is_normal(gain: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds these gains with a relative error of at most half a unit in the last place."""
    narrow = gain.to(dtype)
    return bool((narrow.isfinite() & ((narrow.abs() >= torch.finfo(dtype).tiny) | (gain == 0))).all())


def _fold_through_wider(weight: Tensor, high: Tensor, low: Tensor, out: Tensor) -> None:
    """`weight * (high + low)`, rounded once into `out`, for gains that are normal in the wider dtype.

    The product in the next wider dtype is off by less than two units in its last place. Rounding it gives what rounding
    the exact product gives, unless a rounding boundary is as near as that: once in thousands. Those are done again, in
    one go at the end.
    """
    wider, integer, dropped = _WIDER[weight.dtype]
    smallest = torch.finfo(weight.dtype).tiny
    gain, high, low = high.to(wider).expand_as(weight), high.expand_as(weight), low.expand_as(weight)
    again: list[tuple[Tensor, Tensor, Tensor]] = []
    places: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    for block in _blocks(weight.shape):
        product = weight[block].to(wider).mul_(gain[block])
        # The dropped bits of a boundary are 100...0; here, two units below it are 0, and two units above it are 4.
        doubtful = (product.view(integer) - ((1 << (dropped - 1)) - 2)).bitwise_and_((1 << dropped) - 1) <= 4
        # Below the normal numbers, more bits are dropped. (Those of bfloat16 and its wider dtype end together.)
        if smallest > torch.finfo(wider).tiny:
            doubtful |= (product.abs() < smallest) & (product != 0)
        at = doubtful.nonzero(as_tuple=True)
        again.append((weight[block][at], high[block][at], low[block][at]))
        places.append((out[block], at))
        out[block].copy_(product)
    values, highs, lows = (torch.cat(parts) for parts in zip(*again, strict=True))
    exact = _round_sum_of_products(values.double(), highs, lows, weight.dtype)
    for (part, at), folded in zip(places, exact.split([len(values) for values, _, _ in again]), strict=True):
        part[at] = folded


def _round_sum_of_products(weight: Tensor, high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight * (high + low)`, rounded once: an exact sum of four float64 terms, all but the last step to odd."""
    main, main_error = _two_product(weight, high)
    side, side_error = _two_product(weight, low)
    middle, rest = _two_sum(main_error, side)
    tail = _add_to_odd(rest, side_error)
    upper, upper_error = _two_sum(middle, tail)
    total, total_error = _two_sum(main, upper)
    correction = _add_to_odd(total_error, upper_error)
    rounded = total + correction if dtype == torch.float64 else _add_to_odd(total, correction)
    # Where there is nothing to round, the product itself: it has the right sign of zero, infinity or NaN. A sum that is
    # infinite has no error to add.
    rounded = torch.where(total.isinf(), total, rounded)
    return _round(torch.where(main.isfinite() & (weight != 0) & (high != 0), rounded, main), dtype)


def _round_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The exact sum of each row of float64 numbers, rounded once: `[rows, terms]` to `[rows]` of `dtype`."""
    sums, errors = [], []
    for terms in rows.tolist():
        sums.append(math.fsum(terms))  # is the exact sum, rounded
        errors.append(math.fsum([*terms, -sums[-1]]))
    total, error = torch.tensor(sums, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    return (total if dtype == torch.float64 else _round(_to_odd(total, error), dtype)) + 0.0


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 to `dtype`, rounded once to nearest, ties to even."""
    if dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    single = value.float()
    error = torch.where(value == single, 0.0, value - single)
    return _to_odd(single, error).to(dtype)


def _to_odd(rounded: Tensor, error: Tensor) -> Tensor:
    """Turn round-to-nearest into round-to-odd; of `error`, the exact value minus `rounded`, only the sign counts.

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
    """`a * b` rounded, and its error: exactly `a * b` together (Dekker; the error is exact above 2^-960)."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, torch.where(product.isfinite(), error, 0.0)


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 as the sum of two 26-bit halves (Veltkamp)."""
    # The largest numbers are split at a smaller scale, where the multiplication does not overflow.
    scale = torch.where(value.abs() > 2.0**990, 2.0**-28, 1.0)
    spread = value * scale * (2.0**27 + 1.0)
    high = (spread - (spread - value * scale)) / scale
    return high, value - high
