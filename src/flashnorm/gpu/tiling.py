"""Which kernel computes a linear layer, and in which tiles: data, and the few candidates that are measured."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiling:
    """A kernel and its tiles.

    Attributes:
        tokens: tokens of a tile; 1: `matvec`, for one token; more: `matmul`.
        rows: rows of the weights, i.e. outputs, of a tile.
        block: inputs that are read at a time.
        warps: warps of a program.
        stages: how many blocks of inputs are under way at a time (`matmul`).
    """

    tokens: int
    rows: int
    block: int
    warps: int
    stages: int = 1


_FOR_ONE = (
    Tiling(1, 16, 256, 4),
    Tiling(1, 4, 1024, 4),
    Tiling(1, 8, 512, 4),
    Tiling(1, 8, 1024, 8),
)
_FOR_FEW = (
    Tiling(16, 16, 256, 4, 3),
    Tiling(16, 32, 128, 4, 4),
    Tiling(16, 64, 128, 4, 4),
)
_FOR_SOME = (
    Tiling(64, 32, 128, 4, 4),
    Tiling(64, 64, 64, 4, 4),
    Tiling(64, 128, 64, 4, 4),
)
_FOR_MANY = (
    Tiling(64, 128, 64, 4, 4),
    Tiling(128, 128, 64, 8, 4),
    Tiling(128, 256, 64, 8, 3),
)
# Float32 has no tensor cores, and its tiles are twice as large in memory.
_IN_FLOAT32 = (Tiling(16, 32, 32, 4, 2), Tiling(64, 64, 32, 4, 2))


def candidates(tokens: int, dtype: torch.dtype) -> tuple[Tiling, ...]:
    """The tilings that are worth measuring for so many tokens, a good guess first."""
    if tokens == 1:
        return _FOR_ONE
    if dtype == torch.float32:
        return _IN_FLOAT32
    return _FOR_FEW if tokens <= 16 else _FOR_SOME if tokens <= 64 else _FOR_MANY
