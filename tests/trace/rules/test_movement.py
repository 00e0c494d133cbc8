"""Operators that move elements: the gain's channels move with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from traced import CHANNELS, META, TOKENS, Inputs, traced

from flashnorm.trace.rules import movement
from flashnorm.trace.rules.reasons import UNKNOWN_OPERATOR
from flashnorm.trace.values import UNKNOWN, ZERO

CHANNEL = torch.arange(CHANNELS).expand(TOKENS, CHANNELS)  # of the gain, at every element of `h`

# What moves elements without any number of theirs: the same, done to the channels, gives the result's channels.
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.T,
    "slice": lambda x: x[1:, ::2],
    "select": lambda x: x[:, 2],
    "view": lambda x: x.view(TOKENS, 2, 2),
    "reshape that copies": lambda x: x.T.reshape(-1),
    "expand": lambda x: x[None].expand(5, TOKENS, CHANNELS),
    "repeat": lambda x: x.repeat(2, 1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "diagonal": lambda x: x.diagonal(),
    "clone": lambda x: x.clone(),
}


@pytest.mark.parametrize("name", MOVES)
def test_channels_move_with_the_elements(name: str) -> None:
    move = MOVES[name]
    found = traced(lambda inputs: move(inputs.h))
    assert found.channels() == move(CHANNEL).tolist()
    assert not found.escapes()
    assert found.value.normalised


def test_every_piece_has_its_channels() -> None:
    found = traced(lambda inputs: inputs.h.split([1, 3], dim=-1))
    assert [value.gains["g"][0].tolist() for value in found.values] == [[0], [1, 2, 3]]


def test_a_parameter_that_is_moved_is_a_view_of_it() -> None:
    found = traced(lambda inputs: inputs.w.T[1:], w=(2, 3))
    assert found.value.view is not None
    assert found.value.view.name == "w"
    assert [index.tolist() for index in found.value.view.coordinates] == [[[0, 1], [0, 1]], [[1, 1], [2, 2]]]
    assert not found.records.uses["w"]


def test_a_cast_to_integers_is_an_escape() -> None:
    assert traced(lambda inputs: inputs.h.bfloat16()).channels() == CHANNEL.tolist()
    assert traced(lambda inputs: inputs.h.long()).escapes() == [(UNKNOWN_OPERATOR, "aten._to_copy")]


def test_the_negative_carries_the_gain() -> None:
    assert traced(lambda inputs: -inputs.h).channels() == CHANNEL.tolist()


def test_padding_is_zero_and_carries_any_gain() -> None:
    assert traced(lambda inputs: F.pad(inputs.h, (1, 0))).channels()[0] == [ZERO, 0, 1, 2, 3]
    found = traced(lambda inputs: F.pad(inputs.h, (1, 0), value=1.0))
    assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.constant_pad_nd")]


def test_patches_without_padding() -> None:
    def patches(inputs: Inputs, padding: int) -> Tensor:
        return F.unfold(inputs.h.T.reshape(1, CHANNELS, TOKENS, 1), 1, padding=padding)

    assert traced(lambda inputs: patches(inputs, 0)).channels() == [CHANNEL.T.tolist()]
    assert traced(lambda inputs: patches(inputs, 1)).escapes() == [(UNKNOWN_OPERATOR, "aten.im2col")]


NUMBERS = torch.zeros(2, dtype=torch.long, device=META)
# What chooses by numbers that are not known -> its results along tokens, and along channels.
CHOICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "index": lambda x, dim: x[NUMBERS] if dim == 0 else x[:, NUMBERS],
    "index_select": lambda x, dim: x.index_select(dim, NUMBERS),
    "gather": lambda x, dim: x.gather(dim, NUMBERS.expand(2, 2)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_tokens_keeps_the_channels(name: str) -> None:
    found = traced(lambda inputs: CHOICES[name](inputs.h, 0))
    assert found.channels() == CHANNEL[:2, : found.value.gains["g"].shape[1]].tolist()


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_channels_is_an_escape(name: str) -> None:
    found = traced(lambda inputs: CHOICES[name](inputs.h, 1))
    assert found.escapes() == [(UNKNOWN_OPERATOR, f"aten.{name}")]
    assert found.value.unknown


def test_a_choice_of_an_expert_is_a_view_of_all_of_them() -> None:
    found = traced(lambda inputs: inputs.experts[NUMBERS], experts=(8, 2, 3))
    assert found.value.view is not None
    expert, row, _ = found.value.view.coordinates
    assert expert.unique().tolist() == [UNKNOWN]
    assert row[0].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_choice_by_two_indices_keeps_the_channels_along_which_nothing_is_chosen() -> None:
    batch, token = NUMBERS[:, None, None], NUMBERS.expand(2, 6, 2)
    grouped = traced(lambda inputs: inputs.h.expand(2, TOKENS, CHANNELS)[batch, token])
    assert grouped.channels() == CHANNEL[0].expand(2, 6, 2, CHANNELS).tolist()


def test_a_choice_by_two_indices_of_channels_or_of_dimensions_apart_is_an_escape() -> None:
    for choose in (
        lambda x: x.expand(2, TOKENS, CHANNELS)[:, NUMBERS, NUMBERS],
        lambda x: x.expand(2, TOKENS, CHANNELS)[NUMBERS, :, NUMBERS],
        lambda x: x.expand(2, 2, TOKENS, CHANNELS)[NUMBERS, :, NUMBERS],
    ):
        found = traced(lambda inputs, choose=choose: choose(inputs.h))
        assert found.escapes() == [(UNKNOWN_OPERATOR, "aten.index")]


def test_rows_by_token_are_another_use() -> None:
    ids = torch.zeros(5, dtype=torch.long, device=META)
    found = traced(lambda inputs: F.embedding(ids, inputs.w), w=(9, CHANNELS))
    assert [use.at.operator for use in found.records.uses["w"]] == ["aten.embedding"]
    assert found.value.view is None


def test_an_index_that_is_too_large_is_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "LARGEST_INDEX", TOKENS * CHANNELS - 1)
    for move in (lambda x: x.repeat(2, 1), lambda x: x.T.reshape(-1)):
        found: Any = traced(lambda inputs, move=move: move(inputs.h))
        assert [reason for reason, _ in found.escapes()] == [UNKNOWN_OPERATOR]
