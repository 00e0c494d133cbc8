"""Is a stored weight the correctly rounded product of a source weight and its gain? Decided exactly, in NumPy.

* This module shares nothing with `arithmetic.py`. There, torch multiplies and rounds; here, a lower and an upper bound
  of the exact product are computed. Rounding is monotonic, so if both bounds round to the same value, it is right.
* The first bounds are computed in a fast dtype (float32 for the 16-bit formats), and tighter bounds, where these do not
  decide, in float64 or wider. The few products that are then left (at worst one in thousands) are computed exactly, in
  Python's rational numbers.
* If format and gain have few enough bits, the first product is exact and needs no bounds.
* The functions work on bit patterns (`formats.py`) and exact gains (`gains.py`).
"""

import math
from fractions import Fraction

import numpy as np

from flashnorm.verify.formats import FORMATS, Array, Format, Scratch, decode, nearest
from flashnorm.verify.gains import ExactGain, exact, product_of

# Elements in a block: enough to hide the cost of a call, and few enough that the buffers (20 bytes an element) stay in
# the last-level cache.
BLOCK = 1 << 18

_NOWHERE: Array = np.empty(0, np.int64)


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
        weight: `[lines, width]`, bit patterns of consecutive lines of the source tensor, as unsigned integers. If the
            folded axis is the last one, a line runs along it (`trailing == 1`, `width` channels). Otherwise a line is
            the `width == trailing` numbers of one channel in the axes after it.
        stored: like `weight`, of the converted tensor.
        gain: the gain of every channel of the axis.
        first_line: the number of the first line within the tensor.
        trailing: the product of the sizes of the axes after the folded one.
        scratch: the calling thread's working memory.

    Returns:
        The differing positions in `weight.reshape(-1)`, ascending. NaN equals NaN, and +0 does not equal -0.
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
    """The bit pattern of the correctly rounded product of one weight (given as a bit pattern) and an exact gain."""
    form = FORMATS[tag]
    product = product_of(exact(float(decode(tag, np.array([weight], form.bits))[0])), gain)
    if isinstance(product, Fraction):
        return nearest(form, product)
    if math.isnan(product):
        return form.infinity | 1 << (form.precision - 2)
    return (form.infinity if product else 0) | (form.sign if math.copysign(1.0, product) < 0 else 0)


def _differing_in_block(
    tag: str,
    weight: Array,
    stored: Array,
    gain: ExactGain,
    channels: Array | None,
    scratch: Scratch,
) -> Array:
    """`differing` for one block; `channels` is the channel of each line, or None if a line has all channels."""
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
    """The positions where `stored` is certainly wrong, and the positions where the bounds in `number` do not decide."""
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
        # `not >=` instead of `<`, so that a NaN counts as small and is examined.
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
