"""The distribution of the rounding errors of the folded weights: a sample, in units of the last place.

* One rounding to nearest moves a product by at most half a unit in the last place, and the errors are spread about
  evenly. Rounding twice, or truncation, would show as errors above one half.
* The sample only illustrates; the proof is `products.py`, which checks every weight.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flashnorm.verify.formats import FORMATS, Array, decode

BINS = 40  # over [-1/2, 1/2]

# About as many elements are sampled of each piece of a tensor (8 MB at most).
_PER_PIECE = 4096


@dataclass(frozen=True)
class Rounding:
    """Errors of folded weights, (stored - exact product) in units of the last place.

    Attributes:
        sampled: number of weights in the sample.
        exact: number of sampled products that needed no rounding.
        largest: the largest error without its sign; at most 1/2.
        mean, rms: mean and root mean square of the errors; an even distribution has 0 and 1 / sqrt(12) = 0.289.
        histogram: counts of errors in `BINS` equal steps from -1/2 to 1/2, without the exact products.
        not_finite: number of sampled weights that are infinite or NaN; these have no error.
    """

    sampled: int
    exact: int
    largest: float
    mean: float
    rms: float
    histogram: tuple[int, ...]
    not_finite: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def errors(tag: str, source: Array, stored: Array, gains: Array) -> Array:
    """Rounding errors in units of the last place of the product; NaN where a number is not finite.

    Args:
        tag: a safetensors dtype of at most 24 bits of significand, so that products are exact enough in float64.
        source, stored: bit patterns of source and converted weights, of one shape.
        gains: float64, of the same shape.
    """
    form = FORMATS[tag]
    with np.errstate(all="ignore"):
        product = decode(tag, source) * gains
        unit = np.maximum(np.frexp(product)[1] - form.precision, form.smallest_power)
        # Both are scaled before they are subtracted; float64 can hold even the unit of a subnormal number.
        return np.ldexp(decode(tag, stored), -unit) - np.ldexp(product, -unit)


class RoundingSample:
    """Collects rounding errors, a piece of a tensor at a time."""

    def __init__(self) -> None:
        self._sampled = self._exact = self._not_finite = 0
        self._largest = self._sum = self._squares = 0.0
        self._histogram = np.zeros(BINS, np.int64)

    def take(self, tag: str, source: Array, stored: Array, gains: Array, first: int, trailing: int) -> None:
        """Sample a few thousand elements of a piece.

        Args:
            tag: the tensor's dtype.
            source, stored: bit patterns of the piece, flat.
            gains: `[n]` float64, the gains of the channels of the folded axis.
            first: the position of the piece in the flat tensor.
            trailing: the product of the sizes of the axes after the folded one.
        """
        if FORMATS[tag].precision > 24 or not source.size:
            return
        # The stride is odd, so that it does not hit the same channels again: the number of channels is even.
        places = np.arange(0, source.size, source.size // _PER_PIECE | 1)
        channels = (first + places) // trailing % len(gains)
        found = errors(tag, source[places], stored[places], gains[channels])
        finite = found[np.isfinite(found)]
        rounded = finite[finite != 0]
        self._sampled += found.size
        self._not_finite += found.size - finite.size
        self._exact += finite.size - rounded.size
        self._largest = max(self._largest, float(np.abs(finite).max(initial=0.0)))
        self._sum += float(finite.sum())
        self._squares += float(np.square(finite).sum())
        self._histogram += np.histogram(np.clip(rounded, -0.5, 0.5), BINS, (-0.5, 0.5))[0]

    def result(self) -> Rounding | None:
        """What was collected; None if no weight was sampled (nothing was folded, or only float64 weights)."""
        count = self._sampled - self._not_finite
        if not count:
            return None
        return Rounding(
            sampled=self._sampled,
            exact=self._exact,
            largest=self._largest,
            mean=self._sum / count,
            rms=math.sqrt(self._squares / count),
            histogram=tuple(self._histogram.tolist()),
            not_finite=self._not_finite,
        )
