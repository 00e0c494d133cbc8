"""Contractions: where a gain folds, along which axis of the weight, and where it cannot."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from traced import CHANNELS, TOKENS, Traced, traced

from flashnorm.trace.records import Use
from flashnorm.trace.rules.reasons import MIXES, TWICE, UNKNOWN_OPERATOR, WITHOUT
from flashnorm.trace.values import UNKNOWN

CHANNEL = [0, 1, 2, 3]


def use_of(found: Traced, name: str = "w") -> Use:
    (use,) = found.records.uses[name]
    return use


class TestMatrixProducts:
    def test_a_linear_takes_the_gain_along_its_columns(self) -> None:
        found = traced(lambda inputs: F.linear(inputs.h, inputs.w), w=(5, CHANNELS))
        assert use_of(found).axis == 1
        assert use_of(found).channels["g"].tolist() == CHANNEL
        assert use_of(found).touched.all()
        assert not found.value.gains
        assert not found.escapes()

    def test_a_weight_that_is_stored_transposed_takes_it_along_its_rows(self) -> None:
        assert use_of(traced(lambda inputs: inputs.h @ inputs.w, w=(CHANNELS, 5))).axis == 0
        assert use_of(traced(lambda inputs: inputs.w @ inputs.h.T, w=(5, CHANNELS))).axis == 1

    def test_experts_take_it_along_their_own_axis(self) -> None:
        found = traced(lambda inputs: inputs.h.expand(2, TOKENS, CHANNELS) @ inputs.w, w=(2, CHANNELS, 5))
        assert use_of(found).axis == 1

    def test_a_part_of_the_weight_is_touched(self) -> None:
        found = traced(lambda inputs: F.linear(inputs.h[:, 1:3], inputs.w[:, 4:]), w=(5, 6))
        assert use_of(found).channels["g"].tolist() == [*[UNKNOWN] * 4, 1, 2]
        assert use_of(found).touched.tolist() == [*[False] * 4, True, True]

    def test_channels_without_the_gain_take_nothing(self) -> None:
        found = traced(lambda inputs: F.linear(torch.cat([inputs.x, inputs.h], -1), inputs.w), w=(5, 2 * CHANNELS))
        assert use_of(found).channels["g"].tolist() == [*[UNKNOWN] * 4, *CHANNEL]

    def test_an_activation_without_the_gain_is_another_use(self) -> None:
        found = traced(lambda inputs: F.linear(inputs.x, inputs.w), w=(5, CHANNELS))
        assert use_of(found).axis is None
        assert use_of(found).at.reason == "it also reads an activation that does not carry the gain"

    def test_zeros_are_no_use(self) -> None:
        found = traced(lambda inputs: torch.zeros_like(inputs.x) @ inputs.w, w=(CHANNELS, 5))
        assert not found.records.uses["w"]

    def test_without_a_weight_the_gain_is_mixed(self) -> None:
        assert traced(lambda inputs: inputs.h @ inputs.x.T).escapes() == [(MIXES, "aten.mm")]
        assert traced(lambda inputs: inputs.h @ inputs.h.T).escapes() == [(TWICE, "aten.mm")] * 2

    def test_over_tokens_it_comes_out(self) -> None:
        found = traced(lambda inputs: inputs.x[:, :TOKENS] @ inputs.h)
        assert found.channels() == [CHANNEL] * TOKENS

    def test_one_weight_element_cannot_take_two_channels(self) -> None:
        found = traced(lambda inputs: inputs.h @ inputs.w.expand(CHANNELS, 5), w=(1, 5))
        assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.mm")]

    def test_a_weight_that_is_computed_with_takes_nothing(self) -> None:
        found = traced(lambda inputs: inputs.h @ (inputs.w * 2), w=(CHANNELS, 5))
        assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.mm")]
        assert use_of(found).axis is None

    def test_a_contraction_over_two_axes_is_not_understood(self) -> None:
        found = traced(lambda inputs: inputs.h @ inputs.w.reshape(CHANNELS, 5), w=(2, 2, 5))
        assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.mm")]


class TestBiases:
    def test_a_linear_s_bias_is_noted_with_it(self) -> None:
        found = traced(lambda inputs: F.linear(inputs.h, inputs.w, inputs.c), w=(5, CHANNELS), c=(5,))
        assert use_of(found).bias == "c"
        assert use_of(found, "c").adds_to == "w"

    def test_a_norm_s_bias_arrives_with_the_gain(self) -> None:
        found = traced(lambda inputs: (inputs.h + inputs.beta) @ inputs.w, w=(CHANNELS, 5), beta=(CHANNELS,))
        assert use_of(found).shifts["beta"].tolist() == CHANNEL

    @pytest.mark.parametrize("change", [lambda c: c.flip(0), lambda c: 1 + c])
    def test_a_bias_that_is_not_the_linear_s_own_is_another_use(self, change) -> None:
        found = traced(lambda inputs: F.linear(inputs.h, inputs.w, change(inputs.c)), w=(5, CHANNELS), c=(5,))
        assert use_of(found).bias is None
        assert [use.adds_to for use in found.records.uses["c"]] == [None]

    def test_what_is_added_stops_a_gain_that_comes_out(self) -> None:
        found = traced(lambda inputs: torch.addmm(inputs.x, inputs.x[:, :TOKENS], inputs.h))
        assert found.escapes() == [(WITHOUT, "aten.addmm")]


class TestConvolutions:
    def test_a_full_one_takes_the_gain_along_its_input_channels(self) -> None:
        found = traced(lambda inputs: F.conv1d(inputs.h.T[None], inputs.w), w=(5, CHANNELS, 2))
        assert use_of(found).axis == 1
        assert use_of(found).channels["g"].tolist() == CHANNEL
        found = traced(lambda inputs: F.conv_transpose1d(inputs.h.T[None], inputs.w), w=(CHANNELS, 5, 2))
        assert use_of(found).axis == 0

    def test_filters_of_single_channels_take_theirs(self) -> None:
        found = traced(lambda inputs: F.conv1d(inputs.h.T[None], inputs.w, groups=CHANNELS), w=(2 * CHANNELS, 1, 2))
        assert use_of(found).axis == 0
        assert use_of(found).channels["g"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]

    def test_groups_of_channels_are_not_understood(self) -> None:
        found = traced(lambda inputs: F.conv1d(inputs.h.T[None], inputs.w, groups=2), w=(CHANNELS, 2, 2))
        assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.convolution")]

    def test_one_over_the_channels_as_if_they_were_places(self) -> None:
        found = traced(lambda inputs: F.conv1d(inputs.h[:, None], inputs.w), w=(5, 1, 2))
        assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.convolution")]

    def test_an_activation_without_the_gain_is_another_use(self) -> None:
        found = traced(lambda inputs: F.conv1d(inputs.x.T[None], inputs.w, inputs.c), w=(5, CHANNELS, 2), c=(5,))
        assert use_of(found).axis is None
        assert use_of(found, "c").axis is None
