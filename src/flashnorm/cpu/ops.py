"""The kernels as torch operators, `torch.ops.flashnorm.*`: a norm with its linear layer, and parts of a decoder layer.

The operators take a model's own tensors (float32, bfloat16 or float16, on the CPU) and compute in float32. They have
fake implementations, so that a model that contains them can be traced and compiled. They have no gradients.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from flashnorm.cpu.kernels import native

# The fields of `LayerWeights` that the two parts of a layer take as `weights`, in this order.
ATTENTION_INPUTS: tuple[str, ...] = ("q", "k", "v", "q_bias", "k_bias", "v_bias", "attention_gain", "q_gain", "k_gain")
AFTER_ATTENTION: tuple[str, ...] = (
    *("output", "gate", "up", "down", "output_bias", "gate_bias", "up_bias", "down_bias"),
    *("attention_after", "mlp_gain", "mlp_after", "router", "experts_in", "experts_out", "shared_gate"),
)


@torch.library.custom_op("flashnorm::norm_linear", mutates_args=(), device_types="cpu")
def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gain: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`W RMSNorm(x) + c`, the norm's division deferred past the product (proposition 1 of arXiv 2407.09577).

    Args:
        x: `[..., n]`.
        weight: `[m, n]`, in the dtype of `x`.
        bias: `[m]`.
        gain: `[n]`, the norm's gain; None if it is folded into `weight`.
        eps: the norm's eps; None: there is no norm.

    Returns:
        `[..., m]`, in the dtype of `x`.
    """
    keep: list[Tensor] = []
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(len(rows), len(weight))
    memory = torch.empty(rows.shape)
    model = native.Model(
        head=native.linear(weight, bias, keep),
        final_gain=native.address(gain, keep),
        final_norm=eps is not None,
        dtype=native.DTYPES[weight.dtype],
        hidden=weight.shape[1],
        eps=eps or 0.0,
    )
    step = native.Step(input=rows.data_ptr(), output=y.data_ptr(), x=memory.data_ptr(), sequences=1, tokens=len(rows))
    native.run(model, step, native.NORM_LINEAR)
    return y.view(*x.shape[:-1], len(weight))


@norm_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: object = None, gain: object = None, eps: object = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("flashnorm::attention_inputs", mutates_args=(), device_types="cpu")
def attention_inputs(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Sequence[Tensor | None],
    heads: int,
    kv_heads: int,
    eps: float,
    qk_eps: float,
    rotates: bool,
    norm_before: bool = True,
    norm_all_heads: bool = False,
    gain_offset: float = 0.0,
) -> Tensor:
    """The inputs of attention: norm, projections, norms of queries and keys, and RoPE.

    Args:
        x: `[tokens, hidden]`, the residual stream.
        cos, sin: `[tokens, half]`, the RoPE tables of each token.
        weights: the weights that `ATTENTION_INPUTS` names, in that order.
        heads, kv_heads: number of query heads, and of key-value heads.
        eps, qk_eps: eps of the layer's norm, and of the norms of queries and keys.
        rotates: whether RoPE is applied.
        norm_before: whether the layer's input is normalised.
        norm_all_heads: whether the queries of all heads of a token are normalised together, and the keys.
        gain_offset: what is added to a norm's weight to make its gain.

    Returns:
        `[tokens, (heads + 2 kv_heads) head_dim]`, queries first, in the dtype of `x`.
    """
    found = dict(zip(ATTENTION_INPUTS, weights, strict=True))
    q = _given(found, "q")
    head_dim = len(q) // heads
    rows, tables = x.float().contiguous(), [table.float().contiguous() for table in (cos, sin)]
    projected = torch.empty(len(rows), (heads + 2 * kv_heads) * head_dim)
    keep: list[Tensor] = []
    layer = native.Layer(rotate=rotates)
    native.fill(layer, found, gain_offset, keep)
    model = _model(layer, q, hidden=x.shape[1], heads=heads, kv_heads=kv_heads, head_dim=head_dim, eps=eps)
    model.qk_eps, model.rotary = qk_eps, 2 * cos.shape[1]
    model.norm_before, model.norm_all_heads = norm_before, norm_all_heads
    past = torch.zeros(1, dtype=torch.int32)  # so that a token's position is its row in the tables
    step = native.Step(
        x=rows.data_ptr(),
        cos=tables[0].data_ptr(),
        sin=tables[1].data_ptr(),
        past=past.data_ptr(),
        sequences=1,
        tokens=len(rows),
        positions=len(tables[0]),
        tables=1,
        projected=projected.data_ptr(),
    )
    native.run(model, step, native.ATTENTION_INPUTS)
    return projected.to(x.dtype)


@attention_inputs.register_fake
def _(
    x: Tensor, cos: object, sin: object, weights: Sequence[Tensor | None], heads: int, kv_heads: int, *rest: object
) -> Tensor:
    q = _given(dict(zip(ATTENTION_INPUTS, weights, strict=True)), "q")
    return x.new_empty(x.shape[0], q.shape[0] // heads * (heads + 2 * kv_heads))


@torch.library.custom_op("flashnorm::after_attention", mutates_args=(), device_types="cpu")
def after_attention(
    x: Tensor,
    attended: Tensor,
    weights: Sequence[Tensor | None],
    activation: str,
    eps: float,
    residual_scale: float,
    norm_before: bool = True,
    gain_offset: float = 0.0,
    experts_per_token: int = 0,
    renormalises: bool = False,
) -> Tensor:
    """The rest of a layer after attention: output projection, residual, norm, gated MLP or experts, residual.

    If the layer has norms after attention and MLP, they are applied before the residual is added.

    Args:
        x: `[tokens, hidden]`, the residual stream before attention.
        attended: `[tokens, heads head_dim]`, the output of attention.
        weights: the weights that `AFTER_ATTENTION` names, in that order.
        activation: a name in `deferred.ACTIVATIONS`.
        eps: the eps of the norms.
        residual_scale: the factor of what is added to the residual stream.
        norm_before: whether the MLP's input is normalised.
        gain_offset: what is added to a norm's weight to make its gain.
        experts_per_token: how many experts a token has.
        renormalises: whether the weights of a token's experts are divided by their sum.

    Returns:
        `[tokens, hidden]`, the residual stream after the layer, in the dtype of `x`.
    """
    found = dict(zip(AFTER_ATTENTION, weights, strict=True))
    output = _given(found, "output")
    rows = x.float().contiguous()
    rows = rows.clone() if rows.data_ptr() == x.data_ptr() else rows
    read = attended.float().contiguous()
    keep: list[Tensor] = []
    layer = native.Layer(experts_per_token=experts_per_token, renormalise=renormalises)
    native.fill(layer, found, gain_offset, keep)
    model = _model(layer, output, hidden=x.shape[1], heads=1, kv_heads=1, head_dim=attended.shape[1], eps=eps)
    model.residual_scale, model.norm_before = residual_scale, norm_before
    model.activation = native.ACTIVATIONS[activation]
    past = torch.zeros(1, dtype=torch.int32)
    step = native.Step(
        x=rows.data_ptr(), past=past.data_ptr(), sequences=1, tokens=len(rows), projected=read.data_ptr()
    )
    native.run(model, step, native.AFTER_ATTENTION)
    return rows.to(x.dtype)


@after_attention.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


def _model(layer: native.Layer, weight: Tensor, **sizes: float) -> native.Model:
    return native.Model(layers=ctypes.pointer(layer), layer_count=1, dtype=native.DTYPES[weight.dtype], **sizes)


def _given(weights: dict[str, Tensor | None], name: str) -> Tensor:
    weight = weights[name]
    assert weight is not None
    return weight
