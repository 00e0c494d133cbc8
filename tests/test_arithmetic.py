"""Folding is exact: the product, rounded once to nearest. Compared with rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashnorm.arithmetic import PRECISION, Gain, divide_bias, fold_bias, fold_weight, gain_of, is_divisible, product_of

SMALLEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126, torch.float64: -1022}

# Exponents at which a product stays within what Dekker's algorithm takes; for the narrow types, all they have.
EXPONENTS = {torch.bfloat16: 60, torch.float16: 20, torch.float32: 60, torch.float64: 100}


def rounded(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The nearest number of a dtype, ties to even, gradual underflow included."""
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value.numerator))) - math.floor(math.log2(value.denominator))
    while Fraction(2) ** exponent > abs(value):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    unit = Fraction(2) ** (max(exponent, SMALLEST_EXPONENT[dtype]) - PRECISION[dtype] + 1)
    return round(value / unit) * unit


@st.composite
def numbers(draw: st.DrawFn, dtype: torch.dtype, count: int) -> Tensor:
    """Numbers of a dtype over many magnitudes, zeros and short significands among them."""
    bits = PRECISION[dtype]
    values = []
    for _ in range(count):
        significand = draw(st.integers(-(2**bits) + 1, 2**bits - 1) | st.integers(-3, 3))
        values.append(math.ldexp(significand, draw(st.integers(-EXPONENTS[dtype], 0)) - bits // 2))
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("gain_dtype", PRECISION)
@pytest.mark.parametrize("dtype", PRECISION)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rounds_the_exact_product_once(
    data: st.DataObject, dtype: torch.dtype, gain_dtype: torch.dtype, offset: float
) -> None:
    weight = data.draw(numbers(dtype, 6)).view(2, 3)
    norm = data.draw(numbers(gain_dtype, 3))
    folded = fold_weight(weight, gain_of(norm, offset), axis=1)
    for row in range(2):
        for channel in range(3):
            gain = Fraction(offset) + Fraction(norm[channel].item())
            expected = rounded(Fraction(weight[row, channel].item()) * gain, dtype)
            found = folded[row, channel].item()
            if abs(expected) > torch.finfo(dtype).max:
                assert found == math.copysign(math.inf, expected)
            else:
                assert Fraction(found) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_two_gains_on_one_channel_are_rounded_once(data: st.DataObject, dtype: torch.dtype) -> None:
    weight, first, second = (data.draw(numbers(dtype, 4)) for _ in range(3))
    folded = fold_weight(weight, product_of(gain_of(first), gain_of(second)), axis=0)
    for channel in range(4):
        exact = Fraction(1)
        for factor in (weight, first, second):
            exact *= Fraction(factor[channel].item())
        assert Fraction(folded[channel].item()) == rounded(exact, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("beta_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", PRECISION)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_bias_takes_the_exact_sum_rounded_once(
    data: st.DataObject, dtype: torch.dtype, beta_dtype: torch.dtype
) -> None:
    bias, weight, other = data.draw(numbers(dtype, 2)), data.draw(numbers(dtype, 6)).view(2, 3), torch.ones(2, 1)
    beta, gamma = data.draw(numbers(beta_dtype, 3)), data.draw(numbers(torch.float16, 1))
    taken = fold_bias(bias, [(weight, beta), (other, gamma)])
    assert taken.dtype == dtype
    for row in range(2):
        exact = Fraction(bias[row].item()) + Fraction(gamma[0].item())
        exact += sum(Fraction(w.item()) * Fraction(b.item()) for w, b in zip(weight[row], beta, strict=True))
        expected = rounded(exact, dtype)
        found = taken[row].item()
        if abs(expected) > torch.finfo(dtype).max:
            assert found == math.copysign(math.inf, expected)
        else:
            assert Fraction(found) == expected


def test_a_bias_is_exact_where_a_float64_sum_is_not() -> None:
    weight = torch.tensor([[2.0**80, 1.0, -(2.0**80)], [1.0, 2.0**-60, 0.0]])
    taken = fold_bias(torch.tensor([0.0, 2.0**-24]), [(weight, torch.ones(3))])
    # The second is just above the middle of two float32 numbers, by less than float64 can see.
    assert taken.tolist() == [1.0, 1.0 + 2.0**-23]
    zero = fold_bias(torch.tensor([-0.0]), [(torch.zeros(1, 2), torch.ones(2))])
    assert not zero.signbit().any()


def test_a_bias_carries_infinities_and_nans() -> None:
    weight = torch.tensor([[math.inf, 1.0], [math.nan, 1.0], [1.0, -math.inf], [math.inf, -math.inf]])
    taken = fold_bias(torch.zeros(4, dtype=torch.bfloat16), [(weight, torch.ones(2))])
    assert taken[0] == math.inf
    assert taken[2] == -math.inf
    assert taken[1].isnan()
    assert taken[3].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("gain_dtype", PRECISION)
@pytest.mark.parametrize("dtype", PRECISION)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_bias_that_stays_is_the_exact_quotient_rounded_once(
    data: st.DataObject, dtype: torch.dtype, gain_dtype: torch.dtype, offset: float
) -> None:
    bias, norm = data.draw(numbers(dtype, 4)), data.draw(numbers(gain_dtype, 4))
    gain = gain_of(norm, offset)
    divided, usable = divide_bias(bias, gain), is_divisible(bias, gain)
    assert divided.dtype == dtype
    for channel in range(4):
        beta, g = Fraction(bias[channel].item()), Fraction(offset) + Fraction(norm[channel].item())
        if beta == 0:
            assert usable[channel]
            assert divided[channel] == 0
            continue
        expected = rounded(beta / g, dtype) if g else None
        limits = torch.finfo(dtype)
        inside = expected is not None and limits.tiny <= abs(expected) <= limits.max
        assert bool(usable[channel]) == inside
        if inside:
            assert Fraction(divided[channel].item()) == expected


def test_ties_and_double_rounding() -> None:
    """1 + 2^-8 + 2^-40 is just above the middle of two bfloat16: through float32 it would become a tie and go down."""
    weight = torch.tensor([1.0], dtype=torch.bfloat16)
    norm = torch.tensor([2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert fold_weight(weight, gain_of(norm, 1.0), 0).item() == 1.0 + 2.0**-7
    tie = torch.tensor([2.0**-8], dtype=torch.float64)
    assert fold_weight(weight, gain_of(tie, 1.0), 0).item() == 1.0


@pytest.mark.parametrize("norm_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_carries_infinities_nans_overflow_and_signed_zeros(norm_dtype: torch.dtype, offset: float) -> None:
    inf, nan = math.inf, math.nan
    weight = torch.tensor([inf, nan, 1e38, -1.0, 0.0, -0.0, -1e-30, 2.0], dtype=torch.bfloat16)
    norm = torch.tensor([1.0, 1.0, 1e30, inf, nan, 2.0, 1e-8, -inf], dtype=norm_dtype)
    folded = fold_weight(weight, gain_of(norm, offset), 0)
    plain = weight.double() * (norm.double() + offset)
    assert torch.equal(folded.isnan(), plain.isnan())
    assert torch.equal(folded.nan_to_num(0.5), plain.to(torch.bfloat16).nan_to_num(0.5))
    assert torch.equal(folded.signbit()[~plain.isnan()], plain.signbit()[~plain.isnan()])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_folds_along_any_axis_and_in_place(axis: int) -> None:
    weight = torch.randn(3, 4, 5, dtype=torch.float64)
    norm = torch.randn(weight.shape[axis], dtype=torch.float64)
    shape = [-1 if dim == axis else 1 for dim in range(3)]
    expected = weight * norm.view(shape)
    assert torch.equal(fold_weight(weight, gain_of(norm), axis), expected)
    assert fold_weight(weight, gain_of(norm), axis, out=weight) is weight
    assert torch.equal(weight, expected)


def test_refuses_what_it_cannot_do_exactly() -> None:
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        fold_weight(torch.ones(2, dtype=torch.float8_e4m3fn), gain_of(torch.ones(2)), 0)
    with pytest.raises(TypeError, match="int8"):
        gain_of(torch.ones(2, dtype=torch.int8))
    with pytest.raises(ValueError, match="3 gains"):
        fold_weight(torch.ones(2, 3), gain_of(torch.ones(2)), 1)
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="106 bits"):
        product_of(Gain(one, one * 2.0**-60), Gain(one, one))
