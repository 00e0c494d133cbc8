"""Operators that no gain passes, and those that nobody knows."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from traced import CHANNELS, traced

from flashnorm.plan import Kind
from flashnorm.trace.rules.reasons import NON_LINEAR, UNKNOWN_OPERATOR

STOPS = {
    "aten.silu": F.silu,
    "aten.exp": torch.exp,
    "aten._softmax": lambda x: x.softmax(-1),
    "aten.topk": lambda x: x.topk(2).values,
    "aten.rsqrt": torch.rsqrt,
    "aten.pow": lambda x: x**2,
    "aten.tanh": torch.tanh,
    "aten.gt": lambda x: x > 0,
}


@pytest.mark.parametrize("operator", STOPS)
def test_a_gain_stops(operator: str) -> None:
    found = traced(lambda inputs: STOPS[operator](inputs.h))
    assert found.escapes() == [(NON_LINEAR, operator)]
    assert not found.value.gains


def test_a_parameter_is_read() -> None:
    found = traced(lambda inputs: inputs.w.exp(), w=(CHANNELS,))
    assert [use.at.operator for use in found.records.uses["w"]] == ["aten.exp"]


# What a norm divides by, and what it is not.
STATISTICS = {
    "rsqrt": (torch.rsqrt, True),
    "sqrt": (torch.sqrt, True),
    "a power": (lambda x: x**-0.5, True),
    "another power": (lambda x: x**3, False),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=-1), True),
    "what is made of one": (lambda x: torch.rsqrt(x).clamp(min=1e-6), True),
    "an exponential": (torch.exp, False),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_remembered(name: str) -> None:
    function, expected = STATISTICS[name]
    assert traced(lambda inputs: function(inputs.x)).value.statistic is expected


def test_tanh_is_a_norm() -> None:
    assert traced(lambda inputs: torch.tanh(inputs.x)).value.normalised
    assert not traced(lambda inputs: torch.sigmoid(inputs.x)).value.normalised


def test_what_does_not_depend_on_the_elements_stops_nothing() -> None:
    found = traced(lambda inputs: torch.ones_like(inputs.h))
    assert not found.escapes()
    assert not found.value.gains
    assert traced(lambda inputs: inputs.h.new_zeros(3)).value.zero


def test_an_unknown_operator_is_an_escape_and_a_use() -> None:
    found = traced(lambda inputs: torch.where(inputs.x > 0, inputs.h, inputs.w), w=(CHANNELS,))
    assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.where")]
    assert [use.at.kind for use in found.records.uses["w"]] == [Kind.UNKNOWN]
    assert found.value.unknown


def test_an_unknown_operator_on_nothing_of_interest_is_none_of_our_business() -> None:
    found = traced(lambda inputs: torch.relu(inputs.x))
    assert not found.value.unknown
    assert not found.escapes()


def test_in_place_is_as_out_of_place() -> None:
    found = traced(lambda inputs: inputs.h.mul_(2))
    assert found.channels()[0] == [0, 1, 2, 3]
    assert traced(lambda inputs: inputs.h.exp_()).escapes() == [(NON_LINEAR, "aten.exp_")]
