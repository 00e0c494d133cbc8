"""Runs a conversion of a handmade checkpoint, and holds its result against the fold of whole tensors."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashnorm.convert.result import ConvertResult
from flashnorm.convert.whole import convert_checkpoint
from handmade import Handmade


def run(source: Handmade, target: Path, **options) -> ConvertResult:
    return convert_checkpoint(source.planned(), target, **options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = (tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def assert_folded(target: Path, source: Handmade, absent: set[str]) -> None:
    written = tensors_of(target)
    assert set(written) == (set(source.tensors) | set(source.names.untied)) - absent
    for name, tensor in written.items():
        if name not in source.names.norms:
            assert same_bits(tensor, source.expected(name)), name
