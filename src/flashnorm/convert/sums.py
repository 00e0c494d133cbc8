"""The exact sums of a weight that is to be centred, where a piece of its shard does not hold all that a sum needs."""

import torch
from torch import Tensor

from flashnorm.convert.shards import PIECE_BYTES, not_centred
from flashnorm.files.reader import Checkpoint
from flashnorm.means import exact_sums


def sums_over(checkpoint: Checkpoint, name: str, axis: int) -> Tensor:
    """The exact sums of a tensor over an axis, `[lines, parts]`; lines are the other axes, in their order.

    The tensor is read block by block, so that memory does not depend on the length of the axis.

    Raises:
        InputError: the tensor cannot be read, or has numbers that cannot be added up.
    """
    try:
        blocks = [exact_sums(block) for block in checkpoint.read_outputs(name, axis, PIECE_BYTES)]
    except ValueError as error:
        raise not_centred(name, error) from error
    most = max(block.shape[1] for block in blocks)
    return torch.cat([torch.nn.functional.pad(block, (0, most - block.shape[1])) for block in blocks])
