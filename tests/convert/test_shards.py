"""Tensors are folded in slices, wherever they lie in memory."""

from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversion import run
from flashnorm.arithmetic import fold_weight, gain_of
from flashnorm.convert.shards import fold_slices
from flashnorm.errors import InputError
from flashnorm.planning.tensors import GainUse, TensorFold
from handmade import CHANNELS, make, write

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(shape=shapes, limit=st.integers(1, 60), data=st.data())
def test_slices_cover_a_tensor_once_and_in_order(shape: tuple[int, ...], limit: int, data: st.DataObject):
    axis = data.draw(st.integers(0, len(shape) - 1))
    channel_of = torch.arange(shape[axis]).view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    flat = channel_of.reshape(-1)
    position = 0
    for first, (outer, channels, inner), which in fold_slices(shape, axis, limit):
        assert first == position
        assert outer * channels * inner <= limit
        expected = torch.arange(shape[axis])[which].view(1, -1, 1).expand(outer, channels, inner)
        position += outer * channels * inner
        assert torch.equal(flat[first:position].view(outer, channels, inner), expected)
    assert position == prod(shape)


def test_a_product_that_cannot_be_held_is_refused(tmp_path: Path):
    source = make(tmp_path / "source")
    both = (GainUse("layer.norm.weight", 0.0), GainUse("layer.offset_norm.weight", 1.0, ((0, 0, 6),)))
    source.names.folds["layer.parts.weight"] = TensorFold(1, both)
    tiny = {"layer.offset_norm.weight": torch.full((CHANNELS // 2,), 1e-30).bfloat16()}
    write(source.folder, source.tensors | tiny)
    with pytest.raises(InputError, match=r"layer\.parts\.weight cannot be folded: .*106 bits"):
        run(source, tmp_path / "out")


def test_folding_needs_no_aligned_memory():
    """Tensors of another writer may lie at odd offsets in the file."""
    raw = bytearray(2 * 12 + 1)
    weight = torch.randn(3, 4).bfloat16()
    memoryview(raw)[1:] = weight.view(torch.uint8).numpy().tobytes()
    odd = torch.frombuffer(memoryview(raw)[1:], dtype=torch.uint8).view(torch.bfloat16).view(3, 4)
    gain = gain_of(torch.tensor([1.0, 2, 3, 4]))
    assert torch.equal(fold_weight(odd, gain, 1), weight * torch.tensor([1, 2, 3, 4]))
