"""Operators that ask a meta tensor for values: it has none, so they get guesses (see `inputs/numbers.py`)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Guess(NamedTuple):
    """Answers to questions that a meta tensor cannot answer.

    Attributes:
        number: the value of an element; any number but zero also answers that something is true, or equal.
        all_hits: whether `nonzero` finds every element, so that code that loops over its result (over experts that have
            tokens, say) covers them all. If not, the result has the same size and unknown values.
    """

    number: int
    all_hits: bool


# Code may branch on an answer: a trace that asks runs with all of these guesses, and what any of the runs shows counts.
GUESSES = (Guess(1, True), Guess(1, False), Guess(0, True), Guess(2**31 - 1, False))


def _item(guess: Guess, tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return bool(guess.number)
    return float(guess.number) if tensor.dtype.is_floating_point else guess.number


def _equal(guess: Guess, a: Tensor, b: Tensor) -> bool:
    return bool(guess.number)


def _nonzero(guess: Guess, tensor: Tensor) -> Tensor:
    if guess.all_hits:
        return torch.ones(tensor.shape, dtype=torch.bool, device="cpu").nonzero()
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.long, device=tensor.device)


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense: _item,
    aten.equal: _equal,
    aten.nonzero: _nonzero,
}


def fitting_sizes(operator: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of an operator; if it splits a tensor into sizes that were guessed and do not fit, others that do.

    What the pieces are is unknown, and their number stays: the tokens of each expert, say.
    """
    if operator.overloadpacket is not aten.split_with_sizes:
        return args
    tensor, sizes, *dim = args
    whole, pieces = tensor.shape[dim[0] if dim else 0], len(sizes)
    if sum(sizes) == whole or not pieces:
        return args
    return tensor, [whole // pieces + (piece < whole % pieces) for piece in range(pieces)], *dim
