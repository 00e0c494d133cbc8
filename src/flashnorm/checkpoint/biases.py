"""New values of the biases that a fold changes: those of linears that take a norm's, and those of norms that stay.

* A linear's bias needs all of its weight, which is read block by block: memory does not depend on its size.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flashnorm.checkpoint.names import CheckpointPlan, ShiftUse
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.checkpoint.shard import PIECE_BYTES
from flashnorm.fold import divide_bias, fold_bias, gain_of


def new_bias(checkpoint: Checkpoint, names: CheckpointPlan, name: str) -> Tensor:
    """The value of a bias in the output, of the source's shape and dtype.

    Args:
        checkpoint: the source.
        names: its plan.
        name: a tensor in `names.biases` (`c + W beta`) or `names.divided` (`beta / g`).

    Raises:
        InputError: the source cannot be read.
    """
    bias = checkpoint.read_tensor(name)
    if name in names.divided:
        use = names.divided[name]
        gain = gain_of(checkpoint.read_tensor(use.norm).flatten(), use.offset)
        return divide_bias(bias.flatten(), gain).view_as(bias)
    fold = names.biases[name]
    source = names.untied.get(fold.weight, fold.weight)
    betas = {shift.bias: checkpoint.read_tensor(shift.bias).flatten() for shift in fold.shifts}
    inputs = checkpoint.tensors[source].shape[fold.axis]
    spread = [axis_shift(inputs, shift, betas[shift.bias]) for shift in fold.shifts]
    blocks = checkpoint.read_outputs(source, fold.axis, PIECE_BYTES)
    return add_products(bias, blocks, spread)


def add_products(bias: Tensor, blocks: Iterable[Tensor], betas: Sequence[Tensor]) -> Tensor:
    """`c + W beta` for a weight in blocks of consecutive outputs, `[outputs, inputs]`, and each `beta`, `[inputs]`."""
    parts, first = [], 0
    for block in blocks:
        of_block = bias[first : first + len(block)]
        parts.append(fold_bias(of_block, [(block, beta) for beta in betas]))
        first += len(block)
    return torch.cat(parts) if parts else bias


def axis_shift(inputs: int, shift: ShiftUse, beta: Tensor) -> Tensor:
    """`beta` spread over the input channels of a weight, `[inputs]`; zero where it has none."""
    if not shift.segments:
        return beta
    spread = torch.zeros(inputs, dtype=beta.dtype)
    for start, first, count in shift.segments:
        spread[start : start + count] = beta[first : first + count]
    return spread
