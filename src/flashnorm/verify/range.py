"""Products outside of the range of their dtype: infinite ones are wrong, and the loss in tiny ones is measured.

* A correctly rounded product can be infinite, but the model would be broken. The norm must then be kept. This module
  decides whether that is so for a kept norm: exactly, and without `arithmetic.py`.
* Infinities and NaN in the source's own weights or gains are not counted against the conversion.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from flashnorm.errors import InputError
from flashnorm.files.direct_io import DirectReader, buffers
from flashnorm.files.header import TORCH_DTYPES
from flashnorm.files.reader import CONFIG_FILE, Checkpoint
from flashnorm.format import listed_norms
from flashnorm.plan import Kept, Kind
from flashnorm.planning.overflow import too_large_reason
from flashnorm.planning.tensors import TensorFold, TensorPlan
from flashnorm.verify.formats import FORMATS, Array, decode, nearest
from flashnorm.verify.gains import ExactGain
from flashnorm.verify.products import BLOCK

if TYPE_CHECKING:  # it imports Transformers, which takes seconds, and workers need none
    from flashnorm.planning.planned import PlannedCheckpoint

PIECE = 8 << 20  # bytes


@dataclass(frozen=True)
class Underflow:
    """Folded weights below the smallest normal number of their dtype, where source weight is normal and gain nonzero.

    Attributes:
        products: how many such weights there are.
        zeros: how many of them became zero, which loses all bits.
        largest_error: the largest relative error among them; it is 1 if a weight became zero.
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
        source, stored: bit patterns of the piece, flat.
        gain: the gain of every channel of the folded axis.
        first: the position of the piece in the flat tensor.
        trailing: the product of the sizes of the axes after the folded one.

    Returns:
        The positions of the infinities within the piece, ascending; and the products that lost bits.
    """
    form = FORMATS[tag]
    normal = 1 << (form.precision - 1)
    infinite, lost = [np.empty(0, np.int64)], NO_UNDERFLOW
    for start in range(0, stored.size, BLOCK):
        # Doubling a pattern drops its sign bit, so two comparisons find what is out of range.
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
    """The `Underflow` of products that are all subnormal or zero, given bit patterns and float64 gains."""
    values = decode(tag, stored)
    # Both factors are scaled up, so that products below float64's own range are exact enough; neither factor is large.
    with np.errstate(all="ignore"):
        exact = np.ldexp(decode(tag, weight), 550) * np.ldexp(gains, 550)
        error = np.abs(np.ldexp(values, 1100) / exact - 1)
    error = np.where(values == 0, 1.0, np.where(np.isfinite(error), error, 0.0))
    return Underflow(values.size, int((values == 0).sum()), float(error.max(initial=0.0)))


def without_too_large(planned: "PlannedCheckpoint", result: Checkpoint) -> "PlannedCheckpoint":
    """The plan that a conversion must follow: a norm that it keeps is kept here too, if its product does not fit.

    Args:
        planned: a fresh plan, made without weights, of the source or else of the converted checkpoint itself.
        result: the converted checkpoint. Its config says which norms it keeps; the weights that would take their gains
            are read.

    Raises:
        InputError: a file cannot be read.
    """
    try:
        listed = listed_norms(result.config, result.folder / CONFIG_FILE)
    except InputError:
        listed = None
    if listed is None:  # other checks report this
        return planned
    measured, plan, tensors = planned.checkpoint, planned.plan, planned.tensors
    weightless = {tensors.parameters.get(name, name) for name in listed}
    folds = {fold.norm: fold for fold in plan.folds if fold.norm not in weightless}
    kept = tensors.tensors_of(folds)
    # The weights of a converted checkpoint have taken the gains of the removed norms already.
    open_names = tensors.without(tensors.norms.keys() - kept) if measured is result else tensors
    reasons = too_large_norms(measured, open_names, kept)
    return planned.keep(
        {tensors.parameters.get(name, name): Kept(reason, kind=Kind.VALUES) for name, reason in reasons.items()}
    )


def too_large_norms(checkpoint: Checkpoint, tensors: TensorPlan, norms: Collection[str]) -> dict[str, str]:
    """Those of some norm tensors whose gain makes a finite weight infinite -> the reason, in words.

    For each channel, the largest weight is multiplied by all gains there that are larger than one. If the rounded
    product is infinite, each of the norms with these gains is too large. Reads the weights that would take the gains.

    Args:
        checkpoint: the checkpoint that holds the weights and the norms.
        tensors: the plan, in tensor names.
        norms: the norm tensors to judge.

    Raises:
        InputError: a file cannot be read.
    """
    found: dict[str, str] = {}
    for name, fold in tensors.folds.items():
        tensor = tensors.untied.get(name, name)
        asked = {use.norm for use in fold.gains} & set(norms) - found.keys()
        if asked and _can_be_read(checkpoint, tensor, fold):
            reasons = _too_large(checkpoint, name, tensor, fold)
            found |= {norm: reason for norm, reason in reasons.items() if norm in asked}
    return found


def _can_be_read(checkpoint: Checkpoint, tensor: str, fold: TensorFold) -> bool:
    there = [tensor, *(use.norm for use in fold.gains)]
    return all(name in checkpoint.tensors and checkpoint.tensors[name].dtype in FORMATS for name in there)


def _too_large(checkpoint: Checkpoint, name: str, tensor: str, fold: TensorFold) -> dict[str, str]:
    """`too_large_norms` for one weight, `name`, which the checkpoint stores as `tensor`."""
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
    """For each channel of an axis, the bit pattern of the largest finite magnitude; 0 if no number is finite."""
    info = checkpoint.tensors[tensor]
    form, channels, trailing = FORMATS[info.dtype], info.shape[axis], math.prod(info.shape[axis + 1 :])
    largest = np.zeros(channels, form.bits)
    for first, bits in pieces(checkpoint, tensor):
        size = bits & (form.sign - 1)
        size[size >= form.infinity] = 0
        np.maximum.at(largest, (first + np.arange(size.size)) // trailing % channels, size)
    return largest


def pieces(checkpoint: Checkpoint, tensor: str) -> Iterator[tuple[int, Array]]:
    """The flat bit patterns of a tensor in pieces, each with the position of its first element."""
    info = checkpoint.tensors[tensor]
    bits = FORMATS[info.dtype].bits
    ring = buffers(1, PIECE)
    with DirectReader(checkpoint.folder / info.file) as file:
        for first in range(0, info.nbytes, PIECE):
            data = file.read(info.start + first, min(PIECE, info.nbytes - first), next(ring))
            yield first // np.dtype(bits).itemsize, np.frombuffer(data, bits)


def infinities(checkpoint: Checkpoint, tensor: str, advance: Callable[[int], object]) -> tuple[int, int]:
    """How many infinite numbers a tensor holds, and the position of the first in the flat tensor (-1 if none).

    Args:
        checkpoint: the checkpoint that holds the tensor.
        tensor: the tensor's name; its dtype must be in `FORMATS`.
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
