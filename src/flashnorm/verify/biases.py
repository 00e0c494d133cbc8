"""Are the biases that a fold changes correctly rounded? Decided exactly, in NumPy, without `arithmetic.py`.

* A linear layer's bias that takes a norm's bias is the sum `c + W beta`. A lower and an upper bound of the sum are
  computed in float64. Rounding is monotonic, so if both bounds round to the same value, that value is right; the few
  other sums are computed in rational numbers.
* The bias of a folded norm that is not moved into the linear layers is the quotient `beta / g`, a rational number.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import torch

from flashnorm.files.reader import Checkpoint
from flashnorm.planning.tensors import BiasFold, GainUse, TensorPlan
from flashnorm.verify.findings import Finding
from flashnorm.verify.formats import FORMATS, Array, Scratch, decode, nearest
from flashnorm.verify.gains import ExactGain

_BLOCK = 8 << 20  # bytes of a weight


def check_biases(
    source: Checkpoint, converted: Checkpoint, tensors: TensorPlan, report: Callable[[Finding], None]
) -> int:
    """Check every bias that the plan changes.

    Args:
        source, converted: the checkpoints. Other checks report tensors that are absent or of another dtype or shape.
        tensors: the plan, in tensor names.
        report: called with one `Finding` for each tensor that differs.

    Returns:
        How many biases are right.

    Raises:
        InputError: a file cannot be read.
    """
    right = 0
    for name in (*tensors.biases, *tensors.divided):
        original = tensors.untied.get(name, name)
        if name not in converted.tensors or original not in source.tensors:
            continue
        info = converted.tensors[name]
        if (info.dtype, info.shape) != (source.tensors[original].dtype, source.tensors[original].shape):
            continue
        if odd := _unreadable(source, tensors, name):
            report(Finding("tensor", name, f"was changed, in a dtype that cannot be checked: {odd}"))
            continue
        stored = np.frombuffer(converted.read_bytes(name), FORMATS[info.dtype].bits)
        if name in tensors.biases:
            expected, problem = _sums(source, tensors, name, tensors.biases[name]), "is not the rounded sum c + W beta"
        else:
            expected, problem = _quotients(source, name, tensors.divided[name]), "is not the rounded quotient beta / g"
        places = np.flatnonzero((stored != expected) & ~(_is_nan(info.dtype, stored) & _is_nan(info.dtype, expected)))
        if not places.size:
            right += 1
            continue
        values = [decode(info.dtype, bits[places[:1]])[0] for bits in (stored, expected)]
        report(
            Finding(
                kind="tensor",
                name=name,
                problem=problem,
                index=tuple(int(i) for i in np.unravel_index(places[0], info.shape)),
                stored=f"{values[0]:.9g}",
                expected=f"{values[1]:.9g}",
                differing=int(places.size),
                elements=math.prod(info.shape),
            )
        )
    return right


def _unreadable(source: Checkpoint, tensors: TensorPlan, name: str) -> str | None:
    """The first dtype without a `Format` among the tensors that a bias is computed from; None if all have one."""
    made_of = [tensors.untied.get(name, name)]
    if name in tensors.biases:
        fold = tensors.biases[name]
        made_of += [tensors.untied.get(fold.weight, fold.weight), *(shift.bias for shift in fold.shifts)]
    else:
        made_of.append(tensors.divided[name].norm)
    dtypes = [source.tensors[tensor].dtype for tensor in made_of]
    return next((dtype for dtype in dtypes if dtype not in FORMATS), None)


def _is_nan(tag: str, bits: Array) -> Array:
    return np.isnan(decode(tag, bits))


def _values(checkpoint: Checkpoint, name: str) -> Array:
    tag = checkpoint.tensors[name].dtype
    return decode(tag, np.frombuffer(checkpoint.read_bytes(name), FORMATS[tag].bits))


def _quotients(source: Checkpoint, name: str, use: GainUse) -> Array:
    """Bit patterns of `beta / g` for the norm whose bias is `name`."""
    tag = source.tensors[name].dtype
    bits = np.frombuffer(source.read_bytes(name), FORMATS[tag].bits).copy()
    betas = decode(tag, bits)
    gains = ExactGain.of(_values(source, use.norm), use.offset, len(betas), use.segments).values
    for i, (beta, gain) in enumerate(zip(betas.tolist(), gains, strict=True)):
        if beta:
            bits[i] = nearest(FORMATS[tag], Fraction(beta) / Fraction(gain))
    return bits


def _sums(source: Checkpoint, tensors: TensorPlan, name: str, fold: BiasFold) -> Array:
    """Bit patterns of `c + W beta` for the linear layer whose bias is `name`."""
    original = tensors.untied.get(name, name)
    tag = source.tensors[original].dtype
    form, scratch = FORMATS[tag], Scratch()
    added = _values(source, original)
    expected = np.empty(added.shape, form.bits)
    weight_name = tensors.untied.get(fold.weight, fold.weight)
    beta = _spread(source, fold, source.tensors[weight_name].shape[fold.axis])
    first = 0
    for weight in _blocks(source, weight_name, fold.axis):
        rows = slice(first, first + len(weight))
        first += len(weight)
        with np.errstate(all="ignore"):
            total = added[rows] + weight @ beta
            size = np.abs(added[rows]) + np.abs(weight) @ np.abs(beta)
            # Twice the error bound of n additions and n products, each of which is off by at most half an epsilon.
            error = size * (2 * (len(beta) + 2) * np.finfo(np.float64).eps) + 2.0**-1000
            low, high = np.empty((2, len(total)), form.bits)
            form.encode(total - error, low, scratch)
            form.encode(total + error, high, scratch)
            form.encode(total, expected[rows], scratch)
        open_rows = np.isfinite(total) & ((low != high) | (tag == "F64"))
        for row in np.flatnonzero(open_rows):
            exact = Fraction(added[first - len(weight) + row])
            exact += sum(Fraction(w) * Fraction(b) for w, b in zip(weight[row].tolist(), beta.tolist(), strict=True))
            expected[first - len(weight) + row] = nearest(form, exact) if exact else 0
    return expected


def _spread(source: Checkpoint, fold: BiasFold, inputs: int) -> Array:
    """For each input channel, the sum of the norm biases that reach it."""
    total = np.zeros(inputs)
    for shift in fold.shifts:
        beta = _values(source, shift.bias)
        for start, first, count in shift.segments or ((0, 0, inputs),):
            total[start : start + count] += beta[first : first + count]
    return total


def _blocks(source: Checkpoint, name: str, axis: int) -> Iterator[Array]:
    """A weight as float64, in blocks `[outputs, inputs]` of some of its outputs."""
    tag = source.tensors[name].dtype
    for block in source.read_outputs(name, axis, _BLOCK):
        yield decode(tag, block.contiguous().view(torch.uint8).numpy().view(FORMATS[tag].bits))
