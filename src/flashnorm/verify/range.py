"""Products that leave the range of their dtype: infinity is wrong, and what is lost at the small end is measured.

* Infinity may be the correctly rounded product, but no model is the same with it. Such a norm stays, and whether one
  that stays must is decided here: exactly, and apart from `fold.py`.
* Infinities and NaN that the source's weights or gains hold are none of the conversion's doing.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from flashnorm.checkpoint.direct_io import DirectReader, buffers
from flashnorm.checkpoint.header import TORCH_DTYPES
from flashnorm.checkpoint.names import CheckpointPlan, TensorFold
from flashnorm.checkpoint.overflow import too_large_reason
from flashnorm.checkpoint.reader import CONFIG_FILE, Checkpoint
from flashnorm.checkpoint.state import listed_norms
from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan, Kept
from flashnorm.verify.products import BLOCK, FORMATS, Array, ExactGain, decode, nearest

PIECE = 8 << 20  # bytes


@dataclass(frozen=True)
class Underflow:
    """Folded weights below the smallest normal number of their dtype, though the source's was not, nor the gain zero.

    Attributes:
        products: how many there are.
        zeros: of them, how many became zero: all their bits are lost.
        largest_error: the largest relative error among them; 1 for a zero.
    """

    products: int = 0
    zeros: int = 0
    largest_error: float = 0.0

    def __add__(self, other: "Underflow") -> "Underflow":
        return Underflow(
            self.products + other.products,
            self.zeros + other.zeros,
            max(self.largest_error, other.largest_error),
        )

    def __str__(self) -> str:
        return (
            f"{self.products:,} folded weights are below the normal numbers of their dtype, {self.zeros:,} are zero, "
            f"as the exact product is that small; the largest relative error is {self.largest_error:.2g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


NO_UNDERFLOW = Underflow()


def out_of_range(
    tag: str, source: Array, stored: Array, gain: ExactGain, first: int, trailing: int
) -> tuple[Array, Underflow]:
    """Which products of a piece became infinite from finite numbers, and what was lost at the small end.

    Args:
        tag: the tensor's dtype.
        source, stored: bit patterns, flat.
        gain: of every channel of the folded axis.
        first: the piece's place in the flat tensor.
        trailing: elements of the tensor for each step along the folded axis.

    Returns:
        The places of the infinities, ascending; and the products that lost bits.
    """
    form = FORMATS[tag]
    normal = 1 << (form.precision - 1)
    infinite, lost = [np.empty(0, np.int64)], NO_UNDERFLOW
    for start in range(0, stored.size, BLOCK):
        # Doubled, a pattern has lost its sign; what is out of range is then below or above.
        doubled = np.left_shift(stored[start : start + BLOCK], 1)
        if doubled.size and doubled.min() >= 2 * normal and doubled.max() < 2 * form.infinity:
            continue
        places = np.flatnonzero((doubled < 2 * normal) | (doubled == 2 * form.infinity))
        doubled = doubled[places]
        weight, product = source[start + places], stored[start + places]
        channels = (first + start + places) // trailing % len(gain.values)
        size = weight & (form.sign - 1)
        fair = (size < form.infinity) & ~(gain.special & ~gain.zero)[channels]
        infinite.append(start + places[fair & (doubled == 2 * form.infinity)])
        small = fair & (doubled < 2 * normal) & (size >= normal) & ~gain.zero[channels]
        lost += _underflow(tag, weight[small], product[small], gain.high[channels[small]])
    return np.concatenate(infinite), lost


def _underflow(tag: str, weight: Array, stored: Array, gains: Array) -> Underflow:
    """What products lost that are all subnormal or zero: bit patterns, and float64 gains."""
    values = decode(tag, stored)
    # Scaled, so that products below float64's own range can be told: neither factor is large then.
    with np.errstate(all="ignore"):
        exact = np.ldexp(decode(tag, weight), 550) * np.ldexp(gains, 550)
        error = np.abs(np.ldexp(values, 1100) / exact - 1)
    error = np.where(values == 0, 1.0, np.where(np.isfinite(error), error, 0.0))
    return Underflow(values.size, int((values == 0).sum()), float(error.max(initial=0.0)))


def without_too_large(
    measured: Checkpoint, result: Checkpoint, plan: FoldPlan, names: CheckpointPlan
) -> tuple[FoldPlan, CheckpointPlan]:
    """The plan that a conversion must follow: without the norms that it keeps, where their products do not fit.

    Args:
        measured: holds the weights and norms: the source, or else the converted checkpoint itself.
        result: the converted checkpoint. Its config says which norms it keeps; their linears are read.
        plan: a fresh plan, made without weights.
        names: the same in the names of tensors.

    Raises:
        InputError: a file cannot be read.
    """
    try:
        listed = listed_norms(result.config, result.folder / CONFIG_FILE)
    except InputError:
        listed = None
    if listed is None:  # a finding of its own
        return plan, names
    weightless = {names.parameters.get(name, name) for name in listed}
    folds = {fold.norm: fold for fold in plan.folds if fold.norm not in weightless}
    kept = names.tensors_of(folds)
    # A converted checkpoint's weights have taken the other gains already.
    open_names = names.without(names.norms.keys() - kept) if measured is result else names
    reasons = too_large_norms(measured, open_names, kept)
    staying = {names.parameters.get(name, name): Kept(reason) for name, reason in reasons.items()}
    leaving = {name for norm in staying for name in folds[norm].leaving}
    return plan.keep(staying), names.without(names.tensors_of(leaving))


def too_large_norms(checkpoint: Checkpoint, names: CheckpointPlan, norms: Collection[str]) -> dict[str, str]:
    """Of some norm tensors, those with which a finite weight becomes infinite, and how. Their linears are read.

    A norm is one of these if its gain makes a channel's weights larger, and the product of the largest of them with
    this gain, and all others there that do so, is infinite when it is rounded.

    Args:
        checkpoint: holds the weights and the norms.
        names: what folds into what.
        norms: the norm tensors in question.

    Raises:
        InputError: a file cannot be read.
    """
    found: dict[str, str] = {}
    for name, fold in names.folds.items():
        tensor = names.untied.get(name, name)
        asked = {use.norm for use in fold.gains} & set(norms) - found.keys()
        if asked and _can_be_read(checkpoint, tensor, fold):
            reasons = _too_large(checkpoint, name, tensor, fold)
            found |= {norm: reason for norm, reason in reasons.items() if norm in asked}
    return found


def _can_be_read(checkpoint: Checkpoint, tensor: str, fold: TensorFold) -> bool:
    there = [tensor, *(use.norm for use in fold.gains)]
    return all(name in checkpoint.tensors and checkpoint.tensors[name].dtype in FORMATS for name in there)


def _too_large(checkpoint: Checkpoint, name: str, tensor: str, fold: TensorFold) -> dict[str, str]:
    """The norms whose gains make the largest finite weight of a channel infinite: of `name`, which `tensor` holds."""
    info = checkpoint.tensors[tensor]
    form, length = FORMATS[info.dtype], info.shape[fold.axis]
    gains = []
    for use in fold.gains:
        tag = checkpoint.tensors[use.norm].dtype
        stored = decode(tag, np.frombuffer(checkpoint.read_bytes(use.norm), FORMATS[tag].bits))
        gains.append(ExactGain.of(stored, use.offset, length, use.segments).values)
    largest = decode(info.dtype, _largest(checkpoint, tensor, fold.axis)).tolist()
    found: dict[str, str] = {}
    for channel, (weight, *of_channel) in enumerate(zip(largest, *gains, strict=True)):
        larger = {use.norm: abs(gain) for use, gain in zip(fold.gains, of_channel, strict=True) if abs(gain) > 1}
        finite = all(isinstance(gain, Fraction) or gain == 0 for gain in of_channel)
        product = math.prod(larger.values(), start=Fraction(weight)) if finite else Fraction(0)
        if product and nearest(form, product) == form.infinity:
            for norm, gain in larger.items():
                found.setdefault(norm, too_large_reason(float(gain), channel, weight, name, TORCH_DTYPES[info.dtype]))
    return found


def _largest(checkpoint: Checkpoint, tensor: str, axis: int) -> Array:
    """The bit pattern of the largest finite magnitude in each channel of an axis, 0 where there is none."""
    info = checkpoint.tensors[tensor]
    form, channels, trailing = FORMATS[info.dtype], info.shape[axis], math.prod(info.shape[axis + 1 :])
    largest = np.zeros(channels, form.bits)
    for first, bits in pieces(checkpoint, tensor):
        size = bits & (form.sign - 1)
        size[size >= form.infinity] = 0
        np.maximum.at(largest, (first + np.arange(size.size)) // trailing % channels, size)
    return largest


def pieces(checkpoint: Checkpoint, tensor: str) -> Iterator[tuple[int, Array]]:
    """A tensor's bit patterns, flat, a piece at a time, each with the place of its first element."""
    info = checkpoint.tensors[tensor]
    bits = FORMATS[info.dtype].bits
    ring = buffers(1, PIECE)
    with DirectReader(checkpoint.folder / info.file) as file:
        for first in range(0, info.nbytes, PIECE):
            data = file.read(info.start + first, min(PIECE, info.nbytes - first), next(ring))
            yield first // np.dtype(bits).itemsize, np.frombuffer(data, bits)


def infinities(checkpoint: Checkpoint, tensor: str, advance: Callable[[int], object]) -> tuple[int, int]:
    """How many infinite numbers a tensor holds, and the place of the first in the flat tensor (-1 if there is none).

    Args:
        checkpoint: holds the tensor.
        tensor: its name; of a dtype in `FORMATS`.
        advance: called with the number of bytes done since the last call.
    """
    form = FORMATS[checkpoint.tensors[tensor].dtype]
    count, at = 0, -1
    for first, bits in pieces(checkpoint, tensor):
        places = np.flatnonzero(bits & (form.sign - 1) == form.infinity)
        if places.size and at < 0:
            at = first + int(places[0])
        count += places.size
        advance(bits.nbytes)
    return count, at
