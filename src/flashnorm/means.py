"""Mean centring, as pure functions on tensors: `V* = V - mean(V)`, over the channels that a weight writes (FlashNorm).

* A *line* is what a mean is taken over: a row of an embedding, a column of a linear layer's weight, a whole bias.
* Sums of lines are exact: an unevaluated sum of a few float64 numbers, by error-free extraction (Rump, Ogita and Oishi,
  "Accurate floating-point summation", 2008). So they can be added up over parts of a line, in any order.
* A centred weight is the exact difference `v - sum / n`, rounded once to nearest, ties to even. Float64 decides nearly
  all of them; what is too near to a rounding boundary is computed again with twice the bits, and then in fractions.
"""

from fractions import Fraction

import torch
from torch import Tensor

from flashnorm.arithmetic import PRECISION, add_to_odd, rounded_once, to_odd, two_product, two_sum

# Bits of float64's significand that rounding to a dtype drops -> how near to a boundary, in units of float64's last
# place, float64 does not decide. For the 16-bit dtypes, PyTorch rounds by way of float32, whose boundaries are in it.
_NEAR = {29: 1 << 12, 42: 1 << 30, 45: 1 << 30}

# If the difference is smaller than this share of the mean, it has lost bits, and float64 does not decide.
_CANCELLED = 2.0**-8

_BLOCK = 1 << 16  # elements: intermediate results stay in the processor's cache


def exact_sums(lines: Tensor) -> Tensor:
    """The exact sum of each line.

    Args:
        lines: `[lines, terms]`, of a dtype in `PRECISION`; finite. What this function returns is a line of terms, too.

    Returns:
        `[lines, parts]`, float64; the exact sum of the parts of a line is the exact sum of its terms.

    Raises:
        ValueError: a number is infinite or NaN, or too large for the sum to be held.
    """
    if not lines.isfinite().all():
        raise ValueError("numbers that are infinite or NaN")
    step = max(1, _BLOCK // max(1, lines.shape[1]))
    blocks = [_exact_sums(lines[first : first + step].double()) for first in range(0, len(lines), step)]
    most = max((block.shape[1] for block in blocks), default=1)
    padded = [torch.nn.functional.pad(block, (0, most - block.shape[1])) for block in blocks]
    return torch.cat(padded) if padded else torch.zeros(0, 1, dtype=torch.float64)


def _exact_sums(rest: Tensor) -> Tensor:
    parts = [rest.new_zeros(len(rest))]
    bits = (rest.shape[1] + 1).bit_length() + 1  # 2^bits is at least two more than the number of terms
    while rest.numel() and (largest := rest.abs().amax(1, keepdim=True)).any():
        exponent = torch.frexp(largest).exponent + bits
        if exponent.max() > 1023:
            raise ValueError("numbers that are too large to be added up")
        # The sum with this power of two keeps the bits above a common unit; so few of them are added up exactly.
        common = torch.ldexp(torch.ones_like(largest), exponent)
        high = (rest + common) - common
        parts.append(high.sum(1))
        rest = rest - high
    return torch.stack(parts[1:] or parts, 1)


def centre(lines: Tensor, sums: Tensor, count: int) -> Tensor:
    """`v - sum / count`: the exact difference, rounded once to nearest, ties to even. An exact zero is +0.

    Args:
        lines: `[lines, terms]`, of a dtype in `PRECISION`; finite. They may be parts of lines.
        sums: `[lines, parts]`, the exact sums of the whole lines, as `exact_sums` gives them.
        count: how many terms a whole line has, below 2^24.

    Returns:
        `[lines, terms]`, of the dtype of `lines`.

    Raises:
        ValueError: a difference does not fit the dtype.
    """
    out = torch.empty_like(lines)
    main, side, error = _as_two(sums)
    step = max(1, _BLOCK // max(1, lines.shape[1]))
    for first in range(0, len(lines), step):
        rows = slice(first, first + step)
        total = tuple(part[rows, None] for part in (main, side, error))
        wide = lines[rows].double()
        mean = total[0] / count
        difference = wide - mean
        out[rows] = difference + 0.0  # turns -0 into +0
        unsure = _unsure(difference, mean, lines.dtype)
        if unsure.any():
            at = unsure.nonzero(as_tuple=True)
            of_line = [part.expand_as(wide)[at] for part in total]
            exact = (sums[rows], at[0])
            out[rows][at] = _with_twice_the_bits(wide[at], of_line, exact, count, lines.dtype)
    if not out.isfinite().all():
        raise ValueError(f"a difference that is too large for {str(lines.dtype).removeprefix('torch.')}")
    return out


def is_centred(weight: Tensor, axis: int, stored: torch.dtype) -> bool:
    """Whether the mean of a weight over an axis is zero, but for what rounding each number to its dtype can do.

    Args:
        weight: a weight with values, of any shape.
        axis: the axis.
        stored: the dtype that it had when it was centred; it may have been cast to its own dtype since.
    """
    dtypes = (weight.dtype, stored)
    if weight.is_meta or not {*dtypes} <= PRECISION.keys():
        return False
    terms, weight = weight.shape[axis], weight.detach()
    # Rounding moves a number by at most this share of it, or by half of the smallest subnormal number.
    share = sum(2.0 ** -PRECISION[dtype] for dtype in dtypes)
    smallest = sum(torch.finfo(dtype).smallest_normal * 2.0 ** -PRECISION[dtype] for dtype in dtypes)
    size = torch.linalg.vector_norm(weight, 1, axis, dtype=torch.float64)
    total = weight.sum(axis, dtype=torch.float64).abs()
    return bool((total <= size * (share * (1 + share) + terms * 2.0**-52) + 2 * terms * smallest).all())


def _as_two(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact sums as two numbers each, and a bound of what these leave out: `[lines]` each."""
    main, side, error = sums[:, 0], torch.zeros_like(sums[:, 0]), torch.zeros_like(sums[:, 0])
    for part in sums.unbind(1)[1:]:
        main, lost = two_sum(main, part)
        side, lost = two_sum(side, lost)
        error = error + 2 * lost.abs()
    return main, side, error


def _unsure(difference: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the float64 difference may not round to what the exact one rounds to."""
    dropped = 53 - PRECISION[dtype]
    if not dropped:
        return torch.ones_like(difference, dtype=torch.bool)
    near, size = _NEAR[dropped], difference.abs()
    boundary = (difference.view(torch.int64) - ((1 << (dropped - 1)) - near)).bitwise_and_((1 << dropped) - 1)
    small = (size < mean.abs() * _CANCELLED) | ((size < torch.finfo(dtype).tiny) & ((size > 0) | (mean != 0)))
    return (boundary <= 2 * near) | small


def _with_twice_the_bits(
    values: Tensor, total: list[Tensor], exact: tuple[Tensor, Tensor], count: int, dtype: torch.dtype
) -> Tensor:
    """`(count * v - sum) / count`, rounded once: a lower and an upper bound, and fractions where they differ.

    Args:
        values: `[numbers]`, float64.
        total: what `_as_two` gives, for each number.
        exact: the exact sums, and which of them belongs to each number.
        count: how many terms a sum has.
        dtype: the dtype of the result.
    """
    main, side, error = total
    wide = torch.tensor(float(count), dtype=torch.float64)
    product, low = two_product(values, wide)
    upper, rest = two_sum(product, -main)
    tail = (rest + low) - side
    quotient = upper / wide
    back, back_low = two_product(quotient, wide)
    residual = (upper - back) - back_low
    correction = (residual + tail) / wide
    lost = 2.0**-50 * (residual.abs() + rest.abs() + low.abs() + side.abs()) + 2 * error
    # Products of numbers so small are not split exactly.
    tiny = (torch.maximum(product.abs(), main.abs()) < 2.0**-900) & ((product != 0) | (main != 0))
    bound = (lost + tiny * 2.0**-800) / wide
    below, above = (_rounded_sum(quotient, correction + end, dtype) for end in (-bound, bound))
    sums, of_line = exact
    for i in (below != above).nonzero().flatten().tolist():
        mean = sum((Fraction(part) for part in sums[of_line[i]].tolist()), Fraction(0)) / count
        below[i] = _nearest(Fraction(values[i].item()) - mean, dtype)
    return below + 0.0


def _rounded_sum(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a + b if dtype == torch.float64 else rounded_once(add_to_odd(a, b), dtype)


def _nearest(value: Fraction, dtype: torch.dtype) -> Tensor:
    """A fraction in a dtype, rounded once to nearest, ties to even. Python's `float` rounds so."""
    number = torch.tensor(float(value), dtype=torch.float64)
    rest = value - Fraction(number.item())
    # Only the sign of what is left counts when it is rounded to odd.
    sign = torch.tensor(float((rest > 0) - (rest < 0)), dtype=torch.float64)
    return number if dtype == torch.float64 else rounded_once(to_odd(number, sign), dtype)
