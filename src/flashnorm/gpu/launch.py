"""Starts the kernels on tensors: sizes, strides and grids. `runs` counts what has run."""

from collections import Counter
from typing import Any

import torch
import triton
from torch import Tensor

from flashnorm.gpu import kernels as _kernels
from flashnorm.gpu.tiling import Tiling

kernels: Any = _kernels  # Triton's types say nothing of sizes and tiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Blocks of tokens that share the weights in the L2 cache.
_GROUP = 8

# How often each kernel was started in this process; a CUDA graph's replays do not count here. Proofs and tests read it.
runs: Counter[str] = Counter()


def matvec(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    tiling: Tiling,
    *,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    eps: float | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
    dependent: bool = False,
) -> None:
    """`y = residual + factor (W RMSNorm(x) + bias)` for one token.

    Args:
        x: `[inputs]`, contiguous.
        weight: `[outputs, inputs]`, whose rows are contiguous.
        y: `[outputs]`, contiguous; may be `residual`.
        tiling: for one token.
        bias: `[outputs]`.
        gain: `[inputs]`, the norm's weight, to which `gain_offset` is added; None: 1.
        eps: the norm's eps; None: there is no norm.
        residual: `[outputs]`; None: zeros.
        factor: see the formula.
        dependent: whether the kernel may start before the one ahead of it has ended.
    """
    outputs, inputs = weight.shape
    runs["matvec"] += 1
    kernels.matvec[(triton.cdiv(outputs, tiling.rows),)](
        x,
        gain,
        weight,
        bias,
        residual,
        y,
        outputs,
        weight.stride(0),
        gain_offset,
        eps or 0.0,
        factor,
        INPUTS=inputs,
        NORM=eps is not None,
        **_tiles(tiling, inputs, dependent),
    )


def three_matvecs(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    y: Tensor,
    tiling: Tiling,
    *,
    gain: Tensor | None,
    gain_offset: float,
    eps: float,
    dependent: bool = False,
) -> None:
    """Queries, keys and values of one token, `[(heads + 2 kv_heads) head_dim]`: one product of three matrices.

    The arguments are those of `matvec`; the second and third matrix have the same shape.
    """
    rows, kv_rows, inputs = len(weights[0]), len(weights[1]), weights[0].shape[1]
    runs["three_matvecs"] += 1
    kernels.three_matvecs[(triton.cdiv(rows, tiling.rows) + 2 * triton.cdiv(kv_rows, tiling.rows),)](
        x,
        gain,
        *weights,
        *biases,
        y,
        rows,
        kv_rows,
        *(weight.stride(0) for weight in weights),
        gain_offset,
        eps,
        INPUTS=inputs,
        NORM=True,
        **_tiles(tiling, inputs, dependent),
    )


def gated_matvec(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    y: Tensor,
    tiling: Tiling,
    *,
    gain: Tensor | None,
    gain_offset: float,
    eps: float,
    dependent: bool = False,
) -> None:
    """`silu(gate(RMSNorm(x))) * up(RMSNorm(x))` of one token; the arguments are those of `matvec`."""
    outputs, inputs = gate.shape
    runs["gated_matvec"] += 1
    kernels.gated_matvec[(triton.cdiv(outputs, tiling.rows),)](
        x,
        gain,
        gate,
        up,
        gate_bias,
        up_bias,
        y,
        outputs,
        gate.stride(0),
        up.stride(0),
        gain_offset,
        eps,
        INPUTS=inputs,
        NORM=True,
        **_tiles(tiling, inputs, dependent),
    )


def matmul(
    x: Tensor, weight: Tensor, y: Tensor, tiling: Tiling, bias: Tensor | None, gain: Tensor | None, eps: float | None
) -> None:
    """`y = W RMSNorm(x) + bias`.

    Args:
        x: `[tokens, inputs]`, whose rows are contiguous.
        weight: `[outputs, inputs]`, whose rows are contiguous.
        y: `[tokens, outputs]`, contiguous.
        tiling: for several tokens.
        bias, gain, eps: as in `matvec`.
    """
    tokens, (outputs, inputs) = len(x), weight.shape
    runs["matmul"] += 1
    kernels.matmul[(triton.cdiv(tokens, tiling.tokens) * triton.cdiv(outputs, tiling.rows),)](
        x,
        gain,
        weight,
        bias,
        y,
        tokens,
        outputs,
        x.stride(0),
        weight.stride(0),
        eps or 0.0,
        INPUTS=inputs,
        NORM=eps is not None,
        TOKENS=tiling.tokens,
        ROWS=tiling.rows,
        BLOCK=tiling.block,
        GROUP=_GROUP,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """`RMSNorm(x)` of `[tokens, inputs]`, whose rows are contiguous; the gain `[inputs]` may be absent."""
    y, (tokens, inputs) = x.new_empty(x.shape), x.shape
    block = triton.next_power_of_2(inputs)
    runs["rms_norm"] += 1
    kernels.rms_norm[(tokens,)](
        x, gain, y, x.stride(0), eps, INPUTS=inputs, BLOCK=block, num_warps=4 if block <= 2048 else 8
    )
    return y


def embed(table: Tensor, token: Tensor, position: Tensor, x: Tensor, scale: float) -> None:
    """`x = scale table[token]`, and `position += 1`; tensors `[vocabulary, hidden]`, `[1]`, `[1]` and `[hidden]`."""
    hidden = table.shape[1]
    runs["embed"] += 1
    kernels.embed[(1,)](
        table, token, position, x, scale, table.stride(0), HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden)
    )


class Attention:
    """Attention of one token over a cache, and the memory that it needs in between.

    Args:
        heads, kv_heads, head_dim: sizes.
        device: of all tensors.
        parts: into how many parts the cache is divided, which are worked on at the same time.
    """

    BLOCK = 64  # positions that are read at a time

    def __init__(self, heads: int, kv_heads: int, head_dim: int, device: torch.device, parts: int):
        self._heads, self._kv_heads, self._head_dim, self._parts = heads, kv_heads, head_dim, parts
        # The tensor cores take no fewer than 16.
        self._group = max(16, triton.next_power_of_2(heads // kv_heads))
        self._dims = max(16, triton.next_power_of_2(head_dim))
        self._partial = torch.empty(kv_heads * parts * self._group * (self._dims + 2), device=device)
        self._arrived = torch.zeros(kv_heads, dtype=torch.int32, device=device)

    def __call__(
        self,
        projected: Tensor,
        gains: tuple[Tensor, Tensor] | None,
        tables: tuple[Tensor, Tensor],
        position: Tensor,
        keys: Tensor,
        values: Tensor,
        y: Tensor,
        *,
        gain_offset: float,
        qk_eps: float,
        scale: float,
        dependent: bool = False,
    ) -> None:
        """See `kernels.attend`; `gains` are the weights of both norms, `tables` cosines and sines."""
        q_gain, k_gain = gains or (None, None)
        runs["attend"] += 1
        kernels.attend[(self._kv_heads, self._parts)](
            projected,
            q_gain,
            k_gain,
            *tables,
            position,
            keys,
            values,
            self._partial,
            self._arrived,
            y,
            keys.shape[-2],
            gain_offset,
            qk_eps,
            scale,
            HEADS=self._heads,
            KV_HEADS=self._kv_heads,
            HEAD_DIM=self._head_dim,
            HALF=tables[0].shape[-1],
            GROUP=self._group,
            DIMS=self._dims,
            BLOCK=self.BLOCK,
            PARTS=self._parts,
            num_warps=4,
            **_dependent(dependent),
        )


def _tiles(tiling: Tiling, inputs: int, dependent: bool) -> dict[str, object]:
    block = min(tiling.block, triton.next_power_of_2(inputs))
    return {"ROWS": tiling.rows, "BLOCK": block, "num_warps": tiling.warps, **_dependent(dependent)}


def _dependent(dependent: bool) -> dict[str, object]:
    return {"DEPENDENT": dependent, **({"launch_pdl": True} if dependent else {})}
