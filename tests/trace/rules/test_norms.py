"""Norms that are one operator."""

import pytest
from torch.nn import functional as F  # noqa: N812
from traced import CHANNELS, TOKENS, traced

from flashnorm.trace.records import unknown
from flashnorm.trace.rules.reasons import NON_LINEAR

CHANNEL = [[0, 1, 2, 3]] * TOKENS


@pytest.mark.parametrize("offset", [0, 1])
def test_the_weight_is_a_norm_s_gain(offset: int) -> None:
    found = traced(
        lambda inputs: F.layer_norm(inputs.x, (CHANNELS,), inputs.w + 1 if offset else inputs.w), w=(CHANNELS,)
    )
    assert found.channels("w") == CHANNEL
    assert found.records.gains["w"].is_norm
    assert found.records.gains["w"].offsets == {offset}


def test_the_bias_is_a_shift() -> None:
    found = traced(
        lambda inputs: F.layer_norm(inputs.x, (CHANNELS,), inputs.w, inputs.beta), w=(CHANNELS,), beta=(CHANNELS,)
    )
    assert found.value.shifts["beta"].tolist() == CHANNEL
    assert found.records.gains["w"].biases == {"beta"}


def test_a_bias_on_other_channels_is_not_understood() -> None:
    found = traced(
        lambda inputs: F.layer_norm(inputs.x, (CHANNELS,), inputs.w, inputs.beta.flip(0)),
        w=(CHANNELS,),
        beta=(CHANNELS,),
    )
    ((reason, operator),) = found.escapes("w")
    assert reason == unknown("its bias and its gain do not go with the same channels")
    assert operator == "aten.native_layer_norm"
    assert len(found.records.uses["beta"]) == 1


def test_a_norm_without_a_weight_normalises() -> None:
    found = traced(lambda inputs: F.layer_norm(inputs.x, (CHANNELS,)) * inputs.w, w=(CHANNELS,))
    assert found.records.gains["w"].is_norm


def test_a_gain_that_arrives_stops_there() -> None:
    found = traced(lambda inputs: F.layer_norm(inputs.h, (CHANNELS,), inputs.w), w=(CHANNELS,))
    assert found.escapes("g") == [(NON_LINEAR, "aten.native_layer_norm")]
    assert not found.escapes("w")


def test_a_weight_that_is_computed_is_no_gain() -> None:
    found = traced(lambda inputs: F.layer_norm(inputs.x, (CHANNELS,), inputs.w.exp()), w=(CHANNELS,))
    assert "w" not in found.records.gains
