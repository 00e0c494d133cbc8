"""The exact check of products, against plain rational arithmetic that tries the neighbours."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashnorm.verify.formats import FORMATS, Format, decode
from flashnorm.verify.gains import ExactGain
from flashnorm.verify.products import correct, differing

TAGS = tuple(FORMATS)


def patterns(tag: str) -> st.SearchStrategy[int]:
    """Bit patterns of a format, the awkward ones often: zeros, subnormals, powers of two, infinities, NaN."""
    form = FORMATS[tag]
    width = form.precision + form.exponent
    one = (2 ** (form.exponent - 1) - 1) << (form.precision - 1)
    awkward = [0, 1, 2, one, one + 1, one - 1, form.infinity, form.infinity - 1, form.infinity + 1, form.infinity // 2]
    signed = [value | sign for value in awkward for sign in (0, form.sign)]
    near_one = st.integers(-(40 << (form.precision - 1)), 40 << (form.precision - 1)).map(lambda step: one + step)
    return st.one_of(
        st.sampled_from(signed),
        st.integers(0, 2**width - 1),
        near_one.filter(lambda pattern: 0 <= pattern < form.infinity),
    )


def value_of(tag: str, pattern: int) -> float:
    return float(decode(tag, np.array([pattern], FORMATS[tag].bits))[0])


def is_nearest(form: Format, tag: str, pattern: int, exact: Fraction) -> bool:
    """Whether no neighbour of a finite or infinite `pattern` is nearer to `exact`, and a tie went to the even one."""

    def size_of(magnitude: int) -> Fraction:
        if magnitude < form.infinity:
            return abs(Fraction(value_of(tag, magnitude)))
        # Infinity stands where the next power of two would: half way to it is where rounding turns to infinity.
        return Fraction(2) ** (2 ** (form.exponent - 1)) if magnitude == form.infinity else Fraction(0)

    if (exact < 0) != bool(pattern & form.sign):
        return False
    magnitude = pattern & (form.sign - 1)
    if magnitude > form.infinity:
        return False
    size = abs(exact)
    if magnitude == form.infinity:
        return size - size_of(magnitude - 1) >= size_of(magnitude) - size
    distance = abs(size - size_of(magnitude))
    neighbours = [m for m in (magnitude - 1, magnitude + 1) if m >= 0]
    distances = [abs(size - size_of(m)) for m in neighbours]
    return all(distance < d or (distance == d and magnitude % 2 == 0) for d in distances)


def one(tag: str, weight: int, stored: int, gain: ExactGain) -> bool:
    """Whether the check accepts `stored` in the middle of a line that has other gains, too."""
    bits = FORMATS[tag].bits
    length = len(gain.values)
    found = differing(tag, np.full((1, length), weight, bits), np.full((1, length), stored, bits), gain)
    return 0 not in found


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "gain_tag"), list(itertools.product(TAGS, TAGS)))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_accepts_the_nearest_value_and_nothing_else(tag: str, gain_tag: str, data: st.DataObject) -> None:
    form = FORMATS[tag]
    weight = data.draw(patterns(tag))
    stored_gain = data.draw(patterns(gain_tag))
    offset = data.draw(st.sampled_from([0.0, 1.0]))
    w, g = value_of(tag, weight), value_of(gain_tag, stored_gain)
    gain = ExactGain.of(np.array([g, 0.5, 3e-39]), offset, 3)
    right = correct(tag, weight, gain.values[0])
    assert one(tag, weight, right, gain)
    assert not one(tag, weight, right ^ (1 << data.draw(st.integers(0, form.precision + form.exponent - 1))), gain) or (
        math.isnan(value_of(tag, right))
    )
    if math.isfinite(w) and math.isfinite(g):
        exact = Fraction(w) * (Fraction(g) + Fraction(offset))
        if exact:
            assert is_nearest(form, tag, right, exact)
        else:
            assert value_of(tag, right) == 0
            plain = math.copysign(1.0, w) * math.copysign(1.0, g if not offset else float(1 + Fraction(g)))
            assert math.copysign(1.0, value_of(tag, right)) == plain
    else:
        expected = w * (g + offset if offset else g)
        if offset and not math.isfinite(w) and math.isfinite(g):
            expected = w * float(np.sign(float(Fraction(g) + 1)))
        assert np.array_equal(value_of(tag, right), expected, equal_nan=True)


@pytest.mark.parametrize("tag", TAGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_product_of_two_gains(tag: str, data: st.DataObject) -> None:
    weight, first, second = (data.draw(patterns(tag)) for _ in range(3))
    numbers = [value_of(tag, pattern) for pattern in (weight, first, second)]
    gains = [ExactGain.of(np.array([number, 1.0]), 0.0, 2) for number in numbers[1:]]
    gain = gains[0] * gains[1]
    right = correct(tag, weight, gain.values[0])
    assert one(tag, weight, right, gain)
    if all(math.isfinite(number) and number for number in numbers):
        exact = Fraction(numbers[0]) * Fraction(numbers[1]) * Fraction(numbers[2])
        assert is_nearest(FORMATS[tag], tag, right, exact)
        wrong = right + 1 if right & (FORMATS[tag].sign - 1) < FORMATS[tag].infinity else right - 1
        assert not one(tag, weight, wrong, gain)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("tag", TAGS)
def test_finds_exactly_the_places_that_differ(tag: str, offset: float) -> None:
    """Over many blocks, both layouts, real-looking numbers: what was changed is found, nothing else."""
    rng = np.random.default_rng(7)
    form = FORMATS[tag]
    channels, lines = 24, 1 << 14
    weight = _encode(tag, rng.standard_normal((32, channels)) * 0.02)
    gain = ExactGain.of(decode(tag, _encode(tag, rng.standard_normal(channels))), offset, channels)
    exact = [[correct(tag, int(w), g) for w, g in zip(row, gain.values, strict=True)] for row in weight]
    right = np.tile(np.array(exact, form.bits), (lines // 32, 1))
    weight = np.tile(weight, (lines // 32, 1))
    assert not differing(tag, weight, right, gain).size

    places = np.sort(rng.choice(right.size, 50, replace=False))
    flipped = right.copy()
    for place in places:
        flipped.reshape(-1)[place] ^= form.bits(1) << form.bits(rng.integers(form.precision + form.exponent))
    assert differing(tag, weight, flipped, gain).tolist() == places.tolist()

    # The same tensor with the folded axis first, given in two runs of lines.
    by_channel, by_channel_flipped = weight.T.copy(), flipped.T.copy()
    first = differing(tag, by_channel[:10], by_channel_flipped[:10], gain, 0, lines)
    second = differing(tag, by_channel[10:], by_channel_flipped[10:], gain, 10, lines) + 10 * lines
    expected = sorted((place % channels) * lines + place // channels for place in places.tolist())
    assert [*first.tolist(), *second.tolist()] == expected


@pytest.mark.parametrize("weight", [0.0, 1.0, math.inf, 2.0**1000])
def test_a_gain_that_no_float_can_hold(weight: float) -> None:
    tiny = ExactGain.of(np.array([2.0**-1074]), 0.0, 1)
    gain = tiny * tiny
    (pattern,) = np.array([weight]).view(np.uint64).tolist()
    right = correct("F64", pattern, gain.values[0])
    assert value_of("F64", right) == (math.inf if weight == math.inf else 0.0)
    assert one("F64", pattern, right, gain)
    assert not one("F64", pattern, right ^ 1, gain)
    assert not one("F64", pattern, 1 << 62, gain)


def _encode(tag: str, numbers: np.ndarray) -> np.ndarray:
    form = FORMATS[tag]
    flat = [correct(tag, correct(tag, _one(tag), 1.0), Fraction(x)) for x in numbers.reshape(-1).tolist()]
    return np.array(flat, form.bits).reshape(numbers.shape)


def _one(tag: str) -> int:
    return (2 ** (FORMATS[tag].exponent - 1) - 1) << (FORMATS[tag].precision - 1)
