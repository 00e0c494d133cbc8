"""The distribution of the rounding errors of the folded weights: a sample, in units of the last place.

* One rounding to nearest moves a product by at most half a unit in the last place, and the errors are spread about
  evenly. Rounding twice, or truncation, would show as errors above one half.
* The sample only illustrates; the proof is `products.py`, which checks every weight.
"""

import math
from dataclasses import asdict, dataclass, field
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


@dataclass
class RoundingSample:
    """Collects rounding errors, a piece of a tensor at a time. Samples add up to the same in any order.

    Attributes:
        sampled, exact, not_finite, largest, histogram: as in `Rounding`.
        sums, squares: the sum of the errors, and of their squares, in each piece.
    """

    sampled: int = 0
    exact: int = 0
    not_finite: int = 0
    largest: float = 0.0
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)

    def __add__(self, other: "RoundingSample") -> "RoundingSample":
        return RoundingSample(
            self.sampled + other.sampled,
            self.exact + other.exact,
            self.not_finite + other.not_finite,
            max(self.largest, other.largest),
            self.sums + other.sums,
            self.squares + other.squares,
            [mine + its for mine, its in zip(self.histogram, other.histogram, strict=True)],
        )

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
        self.sampled += found.size
        self.not_finite += found.size - finite.size
        self.exact += finite.size - rounded.size
        self.largest = max(self.largest, float(np.abs(finite).max(initial=0.0)))
        self.sums.append(float(finite.sum()))
        self.squares.append(float(np.square(finite).sum()))
        counts = np.histogram(np.clip(rounded, -0.5, 0.5), BINS, (-0.5, 0.5))[0].tolist()
        self.histogram = [before + more for before, more in zip(self.histogram, counts, strict=True)]

    def result(self) -> Rounding | None:
        """What was collected; None if no weight was sampled (nothing was folded, or only float64 weights)."""
        count = self.sampled - self.not_finite
        if not count:
            return None
        return Rounding(
            sampled=self.sampled,
            exact=self.exact,
            largest=self.largest,
            mean=math.fsum(self.sums) / count,  # `fsum` rounds once, so that the order of the pieces does not matter
            rms=math.sqrt(math.fsum(self.squares) / count),
            histogram=tuple(self.histogram),
            not_finite=self.not_finite,
        )
