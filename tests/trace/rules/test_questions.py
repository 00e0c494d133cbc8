"""Questions that a meta tensor cannot answer."""

import pytest
import torch
from torch import Tensor, nn

from flashnorm.trace.rules import GUESSES, Guess, fitting_sizes
from flashnorm.trace.tracer import Tracer

META = torch.device("meta")


def asked(question, guess: Guess, *tensors: Tensor):
    """The answer under a guess; the tracer notes that it was one."""
    tracer = Tracer(nn.Module(), {})
    tracer.guess = guess
    with tracer:
        answer = question(*tensors)
    assert tracer.guessed
    assert not tracer.guess_matters  # no gain was under way
    return answer


@pytest.mark.parametrize("guess", GUESSES)
def test_items(guess: Guess) -> None:
    assert asked(torch.Tensor.item, guess, torch.empty((), dtype=torch.long, device=META)) == guess.number
    assert asked(bool, guess, torch.empty((), dtype=torch.bool, device=META)) is bool(guess.number)
    answer = asked(torch.Tensor.item, guess, torch.empty((), device=META))
    assert isinstance(answer, float)
    assert answer == guess.number


@pytest.mark.parametrize("guess", GUESSES)
def test_equality(guess: Guess) -> None:
    numbers = torch.empty(2, device=META)
    assert asked(torch.equal, guess, numbers, numbers) is bool(guess.number)


def test_hits() -> None:
    mask = torch.empty(2, 3, dtype=torch.bool, device=META)
    everywhere = asked(torch.nonzero, Guess(1, True), mask)
    assert everywhere.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    somewhere = asked(torch.nonzero, Guess(1, False), mask)
    assert somewhere.is_meta
    assert somewhere.shape == everywhere.shape


def test_each_truth_and_both_kinds_of_hits_are_tried() -> None:
    assert {bool(guess.number) for guess in GUESSES} == {True, False}
    assert {guess.all_hits for guess in GUESSES} == {True, False}


def test_sizes_that_do_not_fit_are_replaced_by_as_many_that_do() -> None:
    split, tensor = torch.ops.aten.split_with_sizes.default, torch.empty(7, 5, device=META)
    assert fitting_sizes(split, (tensor, [1, 1, 1]))[1] == [3, 2, 2]
    assert fitting_sizes(split, (tensor, [2**31 - 1, 0], 1))[1:] == ([3, 2], 1)
    assert fitting_sizes(split, (tensor, [6, 1]))[1] == [6, 1]
    assert fitting_sizes(torch.ops.aten.add.Tensor, (tensor, tensor)) == (tensor, tensor)
