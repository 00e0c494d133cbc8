"""A plan in the names of a checkpoint's tensors."""

import torch

from flashnorm.planning.tensors import GainUse, TensorFold


def test_the_gain_of_an_axis():
    norms = {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([0.5, -1.0])}
    fold = TensorFold(1, (GainUse("a", 0.0, ((0, 1, 1), (1, 0, 2))), GainUse("b", 1.0, ((2, 0, 2),))))
    gain = fold.gain(6, norms)
    assert gain.high.tolist() == [3, 2, 3 * 1.5, 0, 1, 1]
    assert gain.low.tolist() == [0] * 6
    assert TensorFold(1, (GainUse("a", 0.0),)).gain(2, norms).high.tolist() == [2, 3]
