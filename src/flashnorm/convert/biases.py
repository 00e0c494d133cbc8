"""New values of the biases that a fold changes: linear layers' biases that take a norm's, and norms' biases that stay.

* The new bias of a linear layer depends on all of its weight. The weight is read block by block, so that memory does
  not depend on its size.
"""

from torch import Tensor

from flashnorm.arithmetic import add_products, axis_shift, divide_bias, gain_of
from flashnorm.convert.shards import PIECE_BYTES
from flashnorm.files.reader import Checkpoint
from flashnorm.planning.tensors import TensorPlan


def new_bias(checkpoint: Checkpoint, tensors: TensorPlan, name: str) -> Tensor:
    """The value of a bias in the output, in the source's shape and dtype.

    Args:
        checkpoint: the source.
        tensors: the plan in the names of the source's tensors.
        name: a tensor in `tensors.biases` (`c + W beta`) or `tensors.divided` (`beta / g`), perhaps an untied one.

    Raises:
        InputError: the source cannot be read.
    """
    bias = checkpoint.read_tensor(tensors.untied.get(name, name))
    if name in tensors.divided:
        use = tensors.divided[name]
        gain = gain_of(checkpoint.read_tensor(use.norm).flatten(), use.offset)
        return divide_bias(bias.flatten(), gain).view_as(bias)
    fold = tensors.biases[name]
    source = tensors.untied.get(fold.weight, fold.weight)
    betas = {shift.bias: checkpoint.read_tensor(shift.bias).flatten() for shift in fold.shifts}
    inputs = checkpoint.tensors[source].shape[fold.axis]
    spread = [axis_shift(inputs, betas[shift.bias], shift.segments) for shift in fold.shifts]
    blocks = checkpoint.read_outputs(source, fold.axis, PIECE_BYTES)
    return add_products(bias, blocks, spread)
