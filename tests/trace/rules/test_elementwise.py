"""Products, quotients and sums."""

import pytest
import torch
from traced import CHANNELS, TOKENS, normalised, traced

from flashnorm.plan import Kind
from flashnorm.trace.rules.reasons import DIFFERENT, NON_LINEAR, TWICE, UNKNOWN_OPERATOR, WITHOUT
from flashnorm.trace.values import ZERO

CHANNEL = [[0, 1, 2, 3]] * TOKENS


class TestProducts:
    def test_a_parameter_times_something_normalised_is_a_norm_s_gain(self) -> None:
        found = traced(lambda inputs: normalised(inputs.x) * inputs.g)
        assert found.channels() == CHANNEL
        assert found.records.gains["g"].is_norm
        assert found.records.gains["g"].offsets == {0.0}

    def test_a_parameter_times_anything_else_is_a_gain_that_is_no_norm_s(self) -> None:
        found = traced(lambda inputs: inputs.x * inputs.scale, scale=(CHANNELS,))
        assert found.channels("scale") == CHANNEL
        assert not found.records.gains["scale"].is_norm

    def test_a_factor_without_the_gain_leaves_it(self) -> None:
        assert traced(lambda inputs: 2 * inputs.h * inputs.x).channels() == CHANNEL

    def test_a_product_carries_the_gains_of_both(self) -> None:
        found = traced(lambda inputs: inputs.h * (inputs.x * inputs.scale), scale=(CHANNELS,))
        assert found.value.gains.keys() == {"g", "scale"}

    def test_the_gain_squared_escapes(self) -> None:
        assert traced(lambda inputs: inputs.h * inputs.h).escapes() == [(TWICE, "aten.mul")]
        assert traced(lambda inputs: inputs.h * inputs.g).escapes() == [(TWICE, "aten.mul")]

    def test_one_learned_number_is_no_gain(self) -> None:
        found = traced(lambda inputs: inputs.h * inputs.number, number=(1,))
        assert found.channels() == CHANNEL
        assert "number" not in found.records.gains
        assert len(found.records.uses["number"]) == 1

    def test_a_multiple_of_a_parameter_is_no_view(self) -> None:
        found = traced(lambda inputs: inputs.w * 2, w=(CHANNELS,))
        assert [use.at.kind for use in found.records.uses["w"]] == [Kind.UNKNOWN]


class TestQuotients:
    def test_what_is_divided_keeps_its_gain(self) -> None:
        assert traced(lambda inputs: inputs.h / inputs.x).channels() == CHANNEL

    def test_a_divisor_s_gain_escapes(self) -> None:
        assert traced(lambda inputs: inputs.x / inputs.h).escapes() == [(NON_LINEAR, "aten.div")]

    def test_a_division_by_a_norm_normalises(self) -> None:
        found = traced(lambda inputs: inputs.x / torch.linalg.vector_norm(inputs.x, dim=-1, keepdim=True))
        assert found.value.normalised
        assert traced(lambda inputs: 1 / inputs.x.pow(2).mean(-1).sqrt()).value.statistic
        assert not traced(lambda inputs: inputs.x / 2).value.normalised


class TestSums:
    def test_a_parameter_plus_one_is_an_offset_gain(self) -> None:
        found = traced(lambda inputs: normalised(inputs.x) * (1 + inputs.w), w=(CHANNELS,))
        assert found.records.gains["w"].offsets == {1.0}

    @pytest.mark.parametrize("change", [lambda w: w + 2, lambda w: 1 + (1 + w), lambda w: w - 1])
    def test_any_other_offset_is_unknown(self, change) -> None:
        found = traced(lambda inputs: change(inputs.w), w=(CHANNELS,))
        assert found.value.view is None
        assert [use.at.kind for use in found.records.uses["w"]] == [Kind.UNKNOWN]

    def test_a_number_stops_the_gain_unless_it_is_zero(self) -> None:
        assert traced(lambda inputs: inputs.h + 1.0).escapes() == [(WITHOUT, "aten.add")]
        assert traced(lambda inputs: inputs.h + 0).channels() == CHANNEL

    def test_the_same_channels_add_up(self) -> None:
        assert traced(lambda inputs: inputs.h + inputs.h.roll(1, 0)).channels() == CHANNEL
        assert traced(lambda inputs: inputs.h - inputs.h.roll(1, 0)).channels() == CHANNEL

    def test_other_channels_do_not(self) -> None:
        assert traced(lambda inputs: inputs.h + inputs.h.flip(-1)).escapes() == [(DIFFERENT, "aten.add")]

    def test_a_residual_stops_the_gain(self) -> None:
        assert traced(lambda inputs: inputs.x + inputs.h).escapes() == [(WITHOUT, "aten.add")]

    def test_what_is_not_understood_is_no_proof(self) -> None:
        found = traced(lambda inputs: inputs.h + torch.relu(inputs.h))
        assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.relu"), (UNKNOWN_OPERATOR, "aten.add")]

    def test_zeros_carry_any_gain(self) -> None:
        assert traced(lambda inputs: inputs.h + torch.zeros_like(inputs.h)).channels() == CHANNEL

    def test_a_norm_s_bias_is_a_shift(self) -> None:
        found = traced(lambda inputs: inputs.h + inputs.beta, beta=(CHANNELS,))
        assert found.channels() == CHANNEL
        assert found.value.shifts["beta"].tolist() == CHANNEL
        assert found.records.gains["g"].biases == {"beta"}
        assert [use.adds_to for use in found.records.uses["beta"]] == ["g"]

    def test_a_shift_is_lost_where_it_is_computed_with(self) -> None:
        assert traced(lambda inputs: (inputs.h + inputs.beta).T, beta=(CHANNELS,)).value.shifts
        assert not traced(lambda inputs: -(inputs.h + inputs.beta), beta=(CHANNELS,)).value.shifts

    @pytest.mark.parametrize(
        "add", [lambda h, beta: h + beta.flip(-1), lambda h, beta: h - beta, lambda h, beta: h.add(beta, alpha=2)]
    )
    def test_another_sum_with_a_parameter_is_no_shift(self, add) -> None:
        found = traced(lambda inputs: add(inputs.h, inputs.beta), beta=(CHANNELS,))
        assert [reason for reason, _ in found.escapes()] == [WITHOUT]
        assert [use.adds_to for use in found.records.uses["beta"]] == [None]


def test_a_mask_of_zeros_leaves_the_gain() -> None:
    assert traced(lambda inputs: inputs.h.masked_fill(inputs.x > 0, 0.0)).channels() == CHANNEL
    found = traced(lambda inputs: inputs.h.masked_fill(inputs.x > 0, 1.0))
    assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.masked_fill")]


def test_a_zero_of_the_sum_has_the_other_s_channels() -> None:
    def add(inputs):
        padded = torch.nn.functional.pad(inputs.h[:, :3], (1, 0))
        assert CHANNELS == 4
        return padded, padded + torch.nn.functional.pad(inputs.h[:, :1], (0, 3))

    padded, total = traced(add).values
    assert padded.gains["g"][0].tolist() == [ZERO, 0, 1, 2]
    assert total.gains["g"][0].tolist() == [0, 0, 1, 2]
