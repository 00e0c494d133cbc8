"""`cat` and `stack`."""

import torch
from traced import CHANNELS, META, TOKENS, traced

from flashnorm.plan import Kind
from flashnorm.trace.rules.reasons import UNKNOWN_OPERATOR
from flashnorm.trace.values import UNKNOWN, ZERO


def test_channels_of_activations_stand_side_by_side() -> None:
    found = traced(lambda inputs: torch.cat([inputs.h, inputs.x, inputs.h.flip(-1)], dim=-1))
    assert found.channels()[0] == [0, 1, 2, 3, *[UNKNOWN] * CHANNELS, 3, 2, 1, 0]
    assert not found.value.normalised


def test_zeros_carry_any_gain() -> None:
    def join(inputs):
        zeros = inputs.h.new_zeros(TOKENS, CHANNELS)
        return torch.stack([zeros, inputs.h])

    assert traced(join).channels()[0] == [[ZERO] * CHANNELS] * TOKENS


def test_parameters_that_are_joined_are_parts_that_nothing_folds_into() -> None:
    found = traced(lambda inputs: torch.cat([inputs.a, inputs.b]).T[1:], a=(2, 3), b=(1, 3))
    a, b = found.value.parts
    assert (a.name, b.name) == ("a", "b")
    assert a.mask.tolist() == [[True, True, False]] * 2
    assert b.mask.tolist() == [[False, False, True]] * 2
    assert [index[a.mask].tolist() for index in a.coordinates] == [[0, 1, 0, 1], [1, 1, 2, 2]]
    assert [use.at.kind for use in found.records.uses["a"]] == [Kind.UNKNOWN]


def test_stacked_parameters() -> None:
    found = traced(lambda inputs: torch.stack([inputs.a, inputs.b], dim=1), a=(2, 3), b=(2, 3))
    assert [part.mask[0, :, 0].tolist() for part in found.value.parts] == [[True, False], [False, True]]


def test_a_joined_tensor_that_is_computed_with_has_no_parts() -> None:
    found = traced(lambda inputs: torch.cat([inputs.a, inputs.b]) * 2, a=(2, 3), b=(1, 3))
    assert not found.value.parts


def test_a_parameter_among_activations_is_an_escape() -> None:
    found = traced(lambda inputs: torch.cat([inputs.h, inputs.a]), a=(1, CHANNELS))
    assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.cat")]
    assert [use.at.operator for use in found.records.uses["a"]] == ["aten.cat"]


def test_one_parameter_in_two_places_has_no_parts() -> None:
    found = traced(lambda inputs: torch.cat([inputs.a, inputs.a]), a=(1, CHANNELS))
    assert not found.value.parts


def test_an_empty_cache_is_no_reason_to_forget_an_activation() -> None:
    found = traced(lambda inputs: torch.cat([torch.empty(0, CHANNELS, device=META), inputs.h]))
    assert found.channels() == [[0, 1, 2, 3]] * TOKENS
