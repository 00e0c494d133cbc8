"""The picture of the rounding errors, against exact rational numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest

from flashnorm.verify.formats import FORMATS, decode, nearest
from flashnorm.verify.rounding import BINS, RoundingSample, errors

PRECISION = {"BF16": 8, "F16": 11, "F32": 24}


def random_patterns(tag: str, count: int, seed: int) -> np.ndarray:
    """Finite numbers of all magnitudes, subnormals among them."""
    bits = FORMATS[tag].bits
    patterns = np.random.default_rng(seed).integers(0, np.iinfo(bits).max, count, dtype=bits, endpoint=True)
    return patterns[np.isfinite(decode(tag, patterns))]


@pytest.mark.parametrize("tag", PRECISION)
def test_errors_are_those_of_exact_arithmetic(tag: str) -> None:
    source = random_patterns(tag, 2000, 1)
    gains = np.random.default_rng(2).uniform(0.2, 3, source.size).astype(np.float32).astype(np.float64)
    products = [Fraction(float(w)) * Fraction(float(g)) for w, g in zip(decode(tag, source), gains, strict=True)]
    stored = np.array([nearest(FORMATS[tag], product) for product in products], FORMATS[tag].bits)
    finite = np.isfinite(decode(tag, stored))
    smallest = Fraction(2) ** FORMATS[tag].smallest_power
    for found, product, value in zip(
        errors(tag, source, stored, gains)[finite],
        np.array(products)[finite],
        decode(tag, stored)[finite],
        strict=True,
    ):
        power = math.frexp(float(product))[1] - PRECISION[tag] if product else -9999
        unit = max(Fraction(2) ** power, smallest)
        # A product of 24 and 24 bits is exact in float64; all that is rounded is the error itself.
        assert found == pytest.approx(float((Fraction(float(value)) - product) / unit), abs=1e-12)
        assert abs(found) <= 0.5


def test_a_sample_reaches_every_channel_and_finds_truncation() -> None:
    channels, lines = 64, 4096
    weights = np.random.default_rng(3).standard_normal(channels * lines).astype(np.float32)
    gains = np.linspace(0.5, 1.9, channels)
    exact = weights.astype(np.float64) * np.tile(gains, lines)
    rounded, cut = RoundingSample(), RoundingSample()
    toward_zero = exact.astype(np.float32)
    beyond = np.abs(toward_zero) > np.abs(exact)
    toward_zero[beyond] = np.nextafter(toward_zero[beyond], np.float32(0))
    for sample, stored in ((rounded, exact.astype(np.float32)), (cut, toward_zero)):
        sample.take("F32", weights.view(np.uint32), stored.view(np.uint32), gains, 0, 1)
    healthy, wrong = rounded.result(), cut.result()
    assert healthy
    assert wrong
    assert healthy.sampled == wrong.sampled == 4033  # of 262144, an odd step apart
    assert sum(healthy.histogram) + healthy.exact == healthy.sampled
    assert len(healthy.histogram) == BINS
    assert healthy.largest <= 0.5
    assert healthy.rms == pytest.approx(1 / math.sqrt(12), rel=0.03)
    assert wrong.largest > 0.9
    assert RoundingSample().result() is None


def test_numbers_that_are_not_finite_are_counted_apart() -> None:
    sample = RoundingSample()
    weights = np.array([1.0, np.inf, np.nan, 2.0], np.float32).view(np.uint32)
    sample.take("F32", weights, weights, np.ones(4), 0, 1)
    result = sample.result()
    assert result
    assert (result.sampled, result.exact, result.not_finite, result.largest) == (4, 2, 2, 0.0)
