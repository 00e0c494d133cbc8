"""`norm_linear` for CUDA: the operator `torch.ops.flashnorm.norm_linear` runs it on tensors on a GPU.

One token takes a matrix-vector kernel, several take a tiled product; both defer the norm. Where a norm of its own and
torch's product (cuBLAS) were faster when they were measured, these two run instead.
"""

import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.cpu import ops as _operators  # noqa: F401  (it defines the operator)
from flashnorm.gpu import launch
from flashnorm.gpu.choice import fastest
from flashnorm.gpu.tiling import Tiling, candidates


def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gain: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`W RMSNorm(x) + c`, the norm's division deferred past the product (proposition 1 of arXiv 2407.09577).

    Args:
        x: `[..., inputs]`, bfloat16, float16 or float32.
        weight: `[outputs, inputs]`, in the dtype of `x`.
        bias: `[outputs]`, in the dtype of `x`.
        gain: `[inputs]`, the norm's gain, in the dtype of `x`; None if it is folded into `weight`.
        eps: the norm's eps; None: there is no norm, and `x` is multiplied by the gain only.

    Returns:
        `[..., outputs]`, in the dtype of `x`.

    Raises:
        ValueError: dtypes, devices or sizes do not fit each other.
    """
    _check(x, weight, bias, gain)
    outputs, inputs = weight.shape
    rows = _with_rows(x.reshape(math.prod(x.shape[:-1]), inputs))
    weight, tokens = _with_rows(weight), len(rows)
    bias, gain = (None if part is None else part.contiguous() for part in (bias, gain))
    shape = (*x.shape[:-1], outputs)
    if not (tokens and outputs and inputs):  # nothing to launch
        return plain(rows, weight, bias, gain, eps).view(shape)
    measured_tokens = triton.next_power_of_2(tokens)
    parts = "".join(f" {name}" for name, part in (("bias", bias), ("gain", gain), ("norm", eps)) if part is not None)
    key = f"norm_linear {inputs} x {outputs}, {measured_tokens} tokens, {x.dtype}{parts}"

    def run(way: Tiling | None, rows: Tensor) -> Tensor:
        return plain(rows, weight, bias, gain, eps) if way is None else fused(rows, weight, bias, gain, eps, way)

    def measured() -> Callable[[Tiling | None], Tensor]:
        full = rows[torch.arange(measured_tokens, device=rows.device) % tokens]
        return lambda way: run(way, full)

    # Up to the next power of two all numbers of tokens count as the same, and that one is measured.
    way = fastest(key, candidates(measured_tokens, x.dtype), measured, rows.device, plain=True)
    return run(way, rows).view(shape)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, eps: float | None) -> Tensor:
    """The same by a norm and torch's product, between which there is a rounding: `[tokens, inputs or outputs]`."""
    launch.runs["plain"] += 1
    if eps is not None:
        x = launch.rms_norm(x, gain, eps) if x.numel() else x
    elif gain is not None:
        x = x * gain
    return F.linear(x, weight, bias)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, eps: float | None, tiling: Tiling
) -> Tensor:
    """The same by a kernel of ours: `[tokens, inputs]` -> `[tokens, outputs]`; see `launch.matmul`."""
    y = x.new_empty(len(x), len(weight))
    if tiling.tokens == 1:
        launch.matvec(x[0], weight, y[0], tiling, bias=bias, gain=gain, eps=eps)
    else:
        launch.matmul(x, weight, y, tiling, bias, gain, eps)
    return y


def _with_rows(matrix: Tensor) -> Tensor:
    """The matrix with rows in one piece of memory each, which may be anywhere."""
    return matrix if matrix.stride(-1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> None:
    if x.dtype not in launch.DTYPES:
        raise ValueError(f"expected bfloat16, float16 or float32, found {x.dtype}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected x [..., inputs] and weight [outputs, inputs], found {x.shape} and {weight.shape}")
    for name, tensor, shape in (("weight", weight, weight.shape), ("bias", bias, weight.shape[:1]),
                                ("gain", gain, weight.shape[1:])):  # fmt: skip
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device or tensor.shape != shape):
            raise ValueError(
                f"expected {name} {list(shape)} in {x.dtype} on {x.device}, found {list(tensor.shape)} in "
                f"{tensor.dtype} on {tensor.device}"
            )


torch.library.register_kernel("flashnorm::norm_linear", "cuda", norm_linear)
