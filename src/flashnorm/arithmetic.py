"""The mathematics of folding, as pure functions on tensors.

* A folded weight is `W* = W diag(g)` (FlashNorm, proposition 1) with `g = offset + w`: the exact product, rounded once
  to the nearest value of `W`'s dtype, ties to even.
* A norm's bias is added to the linear layer's bias, `c* = c + W beta`, or divided by the gain, `beta / g`. Both are
  exact results that are rounded once.
* A gain is stored as an unevaluated sum `high + low` of two float64 tensors, because `1 + w` needs up to 53 + 126 bits.
* PyTorch casts float64 to a 16-bit dtype through float32, which rounds twice. If the first rounding is *to odd*, the
  second one is right (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

# Dtype -> number of bits of its significand, the hidden bit included.
PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}

# Dtype -> the next wider dtype, the integer dtype of that size, and how many bits rounding to the narrow one drops.
_WIDER = {
    torch.bfloat16: (torch.float32, torch.int32, 16),
    torch.float16: (torch.float32, torch.int32, 13),
    torch.float32: (torch.float64, torch.int64, 29),
}


# `(axis_start, gain_start, length)`: channel `axis_start + i` of an axis takes channel `gain_start + i` of a gain.
Run = tuple[int, int, int]


class Gain(NamedTuple):
    """A gain for each channel, exactly `high + low`. Both are `[n]`, float64, with `|low| <= ulp(high) / 2`."""

    high: Tensor
    low: Tensor


def gain_of(weight: Tensor, offset: float = 0.0) -> Gain:
    """The gain `offset + weight` of a norm, without rounding.

    Args:
        weight: the norm's stored weight, of any shape.
        offset: 0.0 for a plain gain, 1.0 for Gemma's.

    Raises:
        TypeError: the weight is not of a dtype in `PRECISION`.
    """
    _check_dtype(weight)
    if not offset:  # adding 0 would change the sign of -0
        return Gain(weight.double(), torch.zeros_like(weight, dtype=torch.float64))
    high, low = two_sum(weight.double(), torch.tensor(offset, dtype=torch.float64, device=weight.device))
    return Gain(high, torch.where(high.isfinite(), low, 0.0))


def product_of(first: Gain, second: Gain) -> Gain:
    """The product of two norms' gains, channel by channel, without rounding.

    Raises:
        ValueError: a product needs more bits than two float64 numbers have, or is too large for float64.
    """
    if first.low.any() or second.low.any():
        raise ValueError("the product of these gains needs more than 106 bits and cannot be folded exactly")
    high, low = two_product(first.high, second.high)
    if (high.isinf() & first.high.isfinite() & second.high.isfinite()).any():
        raise ValueError("the product of these gains is too large for float64 and cannot be folded exactly")
    return Gain(high, low)


def exceeds_one(gain: Gain) -> Tensor:
    """Where a gain is larger than one in magnitude: `[n]`, boolean, exact; true for infinity."""
    size = gain.high.abs()
    return (size > 1) | ((size == 1) & (gain.high * gain.low > 0))


def fold_weight(weight: Tensor, gain: Gain, axis: int, out: Tensor | None = None) -> Tensor:
    """`W diag(g)`: each slice of `weight` along `axis` is multiplied by its gain (FlashNorm, proposition 1).

    Args:
        weight: a linear layer's weight, of any shape and a dtype in `PRECISION`.
        gain: one value for each index of `axis`, on the same device.
        axis: the axis that is contracted with the norm's output.
        out: a tensor of `weight`'s shape and dtype for the result; may be `weight` itself.

    Returns:
        `out` or a new tensor of `weight`'s shape and dtype: the exact product, rounded once to nearest, ties to even.
        Infinities and NaNs are carried as multiplication carries them.

    Raises:
        TypeError: the weight is not of a dtype in `PRECISION`.
        ValueError: the gain does not have the length of the axis.
    """
    _check_dtype(weight)
    if gain.high.shape != (weight.shape[axis],):
        raise ValueError(f"expected {weight.shape[axis]} gains for axis {axis}, found shape {list(gain.high.shape)}")
    shape = [1] * weight.dim()
    shape[axis] = -1
    high, low = gain.high.view(shape), gain.low.view(shape)
    narrow = high.to(weight.dtype)
    if not low.any() and (narrow == high).all():
        # The dtype's own multiplication rounds the exact product once: float32 and float64 by IEEE 754, and the 16-bit
        # dtypes because PyTorch multiplies in float32, which holds the product of two (16 or 22 bits) exactly.
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
    """Finite weights whose product with a finite gain became infinite, because it does not fit the dtype.

    Args:
        weight, folded: the weight that was passed to `fold_weight`, and its result.
        gain, axis: as for `fold_weight`.

    Returns:
        `[n]`, of `weight`'s dtype: the first such weight of each channel; 0 if the channel has none.
    """
    rows, products = (tensor.movedim(axis, 0).flatten(1) for tensor in (weight, folded))
    bad = products.isinf() & rows.isfinite() & gain.high.isfinite()[:, None]
    first = bad.byte().argmax(1, keepdim=True)
    return torch.where(bad.any(1), rows.gather(1, first).squeeze(1), 0.0)


def largest_weights(weight: Tensor, axis: int) -> Tensor:
    """The largest finite magnitude in each channel of `axis`, `[n]`. If its product fits the dtype, all products do."""
    if not weight.numel():
        return weight.new_zeros(weight.shape[axis])
    others = [dim for dim in range(weight.dim()) if dim != axis % weight.dim()]
    largest = torch.maximum(weight.amax(others), -weight.amin(others))
    return largest if largest.isfinite().all() else torch.where(weight.isfinite(), weight.abs(), 0.0).amax(others)


def fold_bias(bias: Tensor, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`c + W beta`: a linear layer's bias that takes the bias of the norm before it.

    Args:
        bias: `[out]`, of a dtype in `PRECISION`.
        products: pairs of `W`, `[out, in]`, and `beta`, `[in]`, one pair for each norm bias.

    Returns:
        `[out]`, of `bias`'s dtype: the exact sum, rounded once to nearest, ties to even. An exact zero is +0.
        Infinities and NaNs are carried as addition carries them.

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
    # The error of a float64 sum is at most about `terms` half units in the last place of the sum of magnitudes. A
    # product of two float64 numbers adds one half unit, and what is lost below the normal numbers.
    bound = magnitude * (terms * torch.finfo(torch.float64).eps) + terms * torch.finfo(torch.float64).tiny
    low, high = (rounded_once(total - bound, bias.dtype), rounded_once(total + bound, bias.dtype))
    rounded = rounded_once(total, bias.dtype) + 0.0  # turns -0 into +0
    always = bias.dtype == torch.float64  # a float64 sum has no more bits than the result
    doubtful = (((low != high) | always) & total.isfinite()).nonzero().flatten()
    if doubtful.numel():
        parts = [two_product(weight[doubtful], beta) for weight, beta in wide]
        rows = torch.cat([bias[doubtful, None].double(), *itertools.chain(*parts)], dim=1)
        rounded[doubtful] = _round_sums(rows, bias.dtype)
    return rounded


def divide_bias(bias: Tensor, gain: Gain) -> Tensor:
    """`beta / g`: the bias that a norm keeps when its gain is folded, because `g * x + beta = g * (x + beta / g)`.

    Args:
        bias: `[n]`, of a dtype in `PRECISION`.
        gain: one value for each channel.

    Returns:
        `[n]`, of `bias`'s dtype: the exact quotient, rounded once to nearest, ties to even. A bias of zero stays that
        zero, whatever the gain is. `is_divisible` says where the quotient can be used.

    Raises:
        TypeError: the bias is not of a dtype in `PRECISION`.
    """
    _check_dtype(bias)
    wide = bias.double()
    quotient = wide / gain.high
    product, error = two_product(quotient, gain.high)
    residual = (wide - product) - error
    for i in (gain.low != 0).nonzero().flatten().tolist():  # a gain of more than 53 bits: rare, so in fractions
        exact = Fraction(gain.high[i].item()) + Fraction(gain.low[i].item())
        if exact and math.isfinite(wide[i]):
            value = Fraction(wide[i].item()) / exact
            quotient[i] = float(value)
            rest = value - Fraction(quotient[i].item())
            residual[i] = float((rest > 0) - (rest < 0)) * math.copysign(1.0, exact)
    # The sign says whether the exact quotient is above or below the rounded one: the residual's sign times the gain's.
    error = torch.where(quotient.isfinite() & (wide != 0), residual * gain.high.sign(), 0.0)
    divided = rounded_once(quotient if bias.dtype == torch.float64 else to_odd(quotient, error), bias.dtype)
    return torch.where(bias == 0, bias, divided)


def is_divisible(bias: Tensor, gain: Gain) -> Tensor:
    """Where `beta / g` can replace `beta`: `[n]`, boolean. The arguments are those of `divide_bias`.

    It cannot where the bias is not zero and the gain is zero or NaN, or the quotient is infinite or subnormal.
    """
    quotient = divide_bias(bias, gain)
    normal = quotient.isfinite() & (quotient.abs() >= torch.finfo(bias.dtype).tiny)
    return (bias == 0) | normal


def _check_dtype(weight: Tensor) -> None:
    if weight.dtype not in PRECISION:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in PRECISION)
        raise TypeError(f"expected a weight of {known}, found {weight.dtype}")


def _blocks(shape: torch.Size, limit: int = 1 << 15) -> Iterator[tuple[slice, ...]]:
    """Slices of a tensor, about `limit` elements each, so that intermediate results stay in the processor's cache."""
    axis = next((axis for axis, size in enumerate(shape) if size > 1), 0)
    step = max(1, limit * shape[axis] // max(1, shape.numel()))
    for start in range(0, shape[axis], step):
        yield (*[slice(None)] * axis, slice(start, start + step))


def _is_normal(gain: Tensor, dtype: torch.dtype) -> bool:
    """Whether all gains are zero or normal in `dtype`, so that the error is at most half a unit in the last place."""
    narrow = gain.to(dtype)
    return bool((narrow.isfinite() & ((narrow.abs() >= torch.finfo(dtype).tiny) | (gain == 0))).all())


def _fold_through_wider(weight: Tensor, high: Tensor, low: Tensor, out: Tensor) -> None:
    """`weight * (high + low)`, rounded once into `out`, for gains that are normal in the wider dtype.

    The error of the product in the next wider dtype is less than two units in its last place. Rounding this product
    gives the same as rounding the exact product, unless a rounding boundary is that near, which happens once in
    thousands. Such products are computed again, all at once at the end.
    """
    wider, integer, dropped = _WIDER[weight.dtype]
    smallest = torch.finfo(weight.dtype).tiny
    gain, high, low = high.to(wider).expand_as(weight), high.expand_as(weight), low.expand_as(weight)
    again: list[tuple[Tensor, Tensor, Tensor]] = []
    places: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    for block in _blocks(weight.shape):
        product = weight[block].to(wider).mul_(gain[block])
        # The dropped bits of a boundary are 100...0. After the subtraction, two units below the boundary become 0, and
        # two units above it become 4.
        doubtful = (product.view(integer) - ((1 << (dropped - 1)) - 2)).bitwise_and_((1 << dropped) - 1) <= 4
        # Below the normal numbers, more bits are dropped. (Bfloat16 and float32 have the same smallest normal number.)
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
    """`weight * (high + low)`, rounded once: the sum of four float64 terms, where only the last step is not to odd."""
    main, main_error = two_product(weight, high)
    side, side_error = two_product(weight, low)
    middle, rest = two_sum(main_error, side)
    tail = add_to_odd(rest, side_error)
    upper, upper_error = two_sum(middle, tail)
    total, total_error = two_sum(main, upper)
    correction = add_to_odd(total_error, upper_error)
    rounded = total + correction if dtype == torch.float64 else add_to_odd(total, correction)
    # If the sum is infinite, its error is meaningless and is not added. If the product is zero, infinite or NaN, there
    # is nothing to round, and the product itself has the right sign.
    rounded = torch.where(total.isinf(), total, rounded)
    return rounded_once(torch.where(main.isfinite() & (weight != 0) & (high != 0), rounded, main), dtype)


def _round_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The exact sum of each row of float64 numbers, rounded once: `[rows, terms]` to `[rows]` of `dtype`."""
    sums, errors = [], []
    for terms in rows.tolist():
        sums.append(math.fsum(terms))  # the exact sum, rounded
        errors.append(math.fsum([*terms, -sums[-1]]))
    total, error = torch.tensor(sums, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    return (total if dtype == torch.float64 else rounded_once(to_odd(total, error), dtype)) + 0.0


def rounded_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers in `dtype`, rounded once to nearest, ties to even."""
    if dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    single = value.float()
    error = torch.where(value == single, 0.0, value - single)
    return to_odd(single, error).to(dtype)


def to_odd(rounded: Tensor, error: Tensor) -> Tensor:
    """Turn round-to-nearest into round-to-odd. `error` is the exact value minus `rounded`; only its sign matters.

    An inexact result is truncated towards zero, and its last bit is set. A later rounding to a precision of at least
    two bits less then gives the same as rounding the exact value.
    """
    integer = torch.int32 if rounded.dtype == torch.float32 else torch.int64
    bits = rounded.view(integer)
    away_from_zero = (torch.signbit(error) != torch.signbit(rounded)).to(integer)
    return torch.where(error == 0, bits, (bits - away_from_zero) | 1).view(rounded.dtype)


def add_to_odd(a: Tensor, b: Tensor) -> Tensor:
    return to_odd(*two_sum(a, b))


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a + b` rounded, and the error; their sum is exactly `a + b` (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a * b` rounded, and the error; their sum is exactly `a * b` (Dekker; exact above 2^-960)."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, torch.where(product.isfinite(), error, 0.0)


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 number as the sum of two 26-bit halves (Veltkamp)."""
    # The largest numbers are scaled down first, so that the multiplication does not overflow.
    scale = torch.where(value.abs() > 2.0**990, 2.0**-28, 1.0)
    spread = value * scale * (2.0**27 + 1.0)
    high = (spread - (spread - value * scale)) / scale
    return high, value - high


def axis_gain(length: int, parts: Iterable[tuple[Gain, Sequence[Run]]]) -> Gain:
    """The gain of each channel of an axis, combined from the gains of one or more norms.

    Args:
        length: the length of the axis.
        parts: each norm's gain, and the runs of channels that it multiplies; without runs, gain `i` multiplies channel
            `i`. Channels that no norm multiplies have gain 1.

    Returns:
        `length` gains, without rounding.

    Raises:
        ValueError: several norms multiply one channel, and the product of their gains would need rounding.
    """
    total = Gain(torch.ones(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64))
    taken = torch.zeros(length, dtype=torch.bool)
    for gain, runs in parts:
        for axis_start, gain_start, count in runs or ((0, 0, length),):
            here = slice(axis_start, axis_start + count)
            part = Gain(*(half[gain_start : gain_start + count] for half in gain))
            if taken[here].any():
                part = product_of(Gain(total.high[here], total.low[here]), part)
            total.high[here], total.low[here] = part
            taken[here] = True
    return total


def add_products(bias: Tensor, blocks: Iterable[Tensor], betas: Sequence[Tensor]) -> Tensor:
    """`c + W beta` for a weight in blocks of outputs, `[outputs, inputs]`, and one or more `beta`, `[inputs]`."""
    parts, first = [], 0
    for block in blocks:
        of_block = bias[first : first + len(block)]
        parts.append(fold_bias(of_block, [(block, beta) for beta in betas]))
        first += len(block)
    return torch.cat(parts) if parts else bias


def axis_shift(inputs: int, beta: Tensor, runs: Sequence[Run]) -> Tensor:
    """`beta` spread over a weight's input channels, `[inputs]`, by runs as in `axis_gain`; zero in no run."""
    if not runs:
        return beta
    spread = torch.zeros(inputs, dtype=beta.dtype)
    for start, first, count in runs:
        spread[start : start + count] = beta[first : first + count]
    return spread
