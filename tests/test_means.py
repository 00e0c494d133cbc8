"""Centring is exact: the difference from the exact mean, rounded once to nearest. Compared with rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashnorm.arithmetic import PRECISION
from flashnorm.means import centre, exact_sums
from test_arithmetic import numbers, rounded


def exact(line: Tensor) -> Fraction:
    return sum(map(Fraction, line.double().tolist()), Fraction(0))


def expected(lines: Tensor) -> Tensor:
    """The centred lines, in fractions."""
    result = torch.empty_like(lines)
    for i, line in enumerate(lines):
        mean = exact(line) / len(line)
        for j, value in enumerate(line.tolist()):
            result[i, j] = float(rounded(Fraction(value) - mean, lines.dtype))
    return result


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Also the signs of zeros: an exact zero is +0, one that is rounded to keeps its sign, which is not looked at."""
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", PRECISION)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sums_are_exact(data: st.DataObject, dtype: torch.dtype) -> None:
    terms = data.draw(st.integers(1, 9))
    lines = data.draw(numbers(dtype, 3 * terms)).view(3, terms)
    sums = exact_sums(lines)
    assert [exact(parts) for parts in sums] == [exact(line) for line in lines]
    cut = data.draw(st.integers(0, terms))
    halves = torch.cat([exact_sums(lines[:, :cut]), exact_sums(lines[:, cut:])], 1)
    assert [exact(parts) for parts in exact_sums(halves)] == [exact(line) for line in lines]


@pytest.mark.parametrize("dtype", PRECISION)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_rounds_the_exact_difference_once(data: st.DataObject, dtype: torch.dtype) -> None:
    terms = data.draw(st.integers(1, 9))
    lines = data.draw(numbers(dtype, 2 * terms)).view(2, terms)
    assert same_bits(centre(lines, exact_sums(lines), terms), expected(lines))


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("terms", [3, 64, 768])
def test_lines_like_those_of_models(dtype: torch.dtype, terms: int) -> None:
    """Random weights around a mean, over many magnitudes, and with means that the differences nearly cancel."""
    generator = torch.Generator().manual_seed(terms)
    noise = torch.randn(8, terms, generator=generator)
    scale = torch.tensor([1.0, 1e-3, 1e-7, 1.0, 1.0, 0.0, 30.0, 1.0])[:, None]
    mean = torch.tensor([0.0, 1.0, 1.0, 1e-3, -0.5, 0.25, 0.0, 1e-30])[:, None]
    lines = (noise * scale * (noise.abs() < 2.5) + mean).to(dtype)
    assert same_bits(centre(lines, exact_sums(lines), terms), expected(lines))


@pytest.mark.parametrize("dtype", PRECISION)
def test_boundaries(dtype: torch.dtype) -> None:
    """Differences at and beside the middle between two numbers, where a second rounding would show."""
    unit = 2.0 ** (1 - PRECISION[dtype])
    tiny = {torch.float16: 2.0**-24}.get(dtype, 2.0**-40)
    rows = [[1 + k * unit, 0.0, 0.0, step * tiny] for k in range(4) for step in (-3, -1, 0, 1, 3)]
    rows += [[1 + k * unit, -2 * unit * j, unit, 0.0] for k in range(4) for j in range(4)]
    lines = torch.tensor(rows, dtype=torch.float64).to(dtype)
    assert same_bits(centre(lines, exact_sums(lines), 4), expected(lines))


@pytest.mark.parametrize("dtype", PRECISION)
def test_parts_of_lines_and_empty_ones(dtype: torch.dtype) -> None:
    lines = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = centre(lines, exact_sums(lines), 7)
    assert torch.equal(centre(lines[:, 2:5], exact_sums(lines), 7), whole[:, 2:5])
    assert centre(lines[:0], exact_sums(lines[:0]), 7).shape == (0, 7)


def test_zeros_are_positive() -> None:
    lines = torch.tensor([[-0.0, -0.0], [3.0, 3.0]])
    assert not torch.signbit(centre(lines, exact_sums(lines), 2)).any()


def test_what_cannot_be_centred() -> None:
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="infinite or NaN"):
            exact_sums(torch.tensor([[value, 1.0]]))
    with pytest.raises(ValueError, match="too large to be added up"):
        exact_sums(torch.tensor([[1e308, 1e308]], dtype=torch.float64))
    lines = torch.tensor([[65504.0, -65504.0, -65504.0, -65504.0]], dtype=torch.float16)
    with pytest.raises(ValueError, match="too large for float16"):
        centre(lines, exact_sums(lines), 4)
