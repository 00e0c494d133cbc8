"""What is known of a tensor: its channels, and where the elements of a view come from."""

import pytest
import torch
from torch import Tensor

from flashnorm.trace.values import (
    PLAIN,
    UNKNOWN,
    ZERO,
    Value,
    View,
    along,
    carries,
    collapse,
    constant_along,
    constant_except,
    without_zeros,
    written_once,
)

CHANNEL = torch.arange(4).expand(3, 4)
MIXED = torch.tensor([[0, 1], [1, 0]])


def view(*shape: int) -> View:
    return View.of("w", torch.empty(shape, device="meta"))


def test_a_parameter_is_a_view_of_itself() -> None:
    whole = view(2, 3)
    assert whole.shape == whole.stored_shape == (2, 3)
    assert whole.size == 6
    assert whole.channels().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_view_of_a_gigabyte_costs_kilobytes() -> None:
    whole = view(1 << 15, 1 << 15)
    memory = sum(index.untyped_storage().nbytes() for index in (*whole.coordinates, whole.mask))
    assert memory < 1 << 20
    assert whole.size == 1 << 30


def test_a_view_moves_by_the_operator_itself() -> None:
    def move(index: Tensor) -> list[Tensor]:
        return [index.T[1:]]

    (moved,) = view(2, 3).moved(move)
    assert moved.shape == (2, 3)
    assert moved.stored_shape == (2, 2)
    assert moved.channels().tolist() == [[1, 4], [2, 5]]
    assert moved.size == 4


@pytest.mark.parametrize(
    ("value", "tracked"),
    [
        (PLAIN, False),
        (Value(normalised=True, statistic=True, zero=True, unknown=True), False),
        (Value(shifts={"b": CHANNEL}), False),
        (Value(view=view(2)), True),
        (Value(gains={"g": CHANNEL}), True),
        (Value(parts=(view(2),)), True),
    ],
)
def test_views_gains_and_parts_must_be_accounted_for(value: Value, tracked: bool) -> None:
    assert value.tracked is tracked


def test_expanded_dimensions_are_read_once() -> None:
    assert written_once(CHANNEL).shape == (1, 4)
    assert written_once(CHANNEL, but=0).shape == (3, 4)
    assert collapse(CHANNEL, 0).shape == (1, 4)


def test_where_an_index_varies() -> None:
    assert constant_along(CHANNEL, 0)
    assert not constant_along(CHANNEL, (0, 1))
    assert constant_except(CHANNEL, -1)
    assert not constant_except(CHANNEL, 0)
    assert not constant_along(MIXED, 0)
    assert not constant_except(MIXED, 1)
    assert along(CHANNEL, -1).tolist() == [0, 1, 2, 3]
    assert along(CHANNEL, 0).tolist() == [0, 0, 0]


def test_neither_zeros_nor_the_unknown_carry_a_gain() -> None:
    assert carries(CHANNEL)
    assert not carries(torch.tensor([UNKNOWN, ZERO]))


def test_a_zero_carries_what_its_neighbours_do() -> None:
    padded = torch.tensor([[0, 1, ZERO], [0, 1, ZERO], [0, ZERO, 2]])
    assert without_zeros(padded, 1).tolist() == [[0, 1, 2]] * 3
    unknown = torch.tensor([[0, UNKNOWN], [0, ZERO]])
    assert without_zeros(unknown, 1).tolist() == [[0, UNKNOWN]] * 2
