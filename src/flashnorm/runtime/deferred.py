"""The identities that are used at run time, as pure functions: what a layer computes when its norms are deferred.

They are the reference for the kernels, and they are what a layer is compared with before it is replaced. Everything is
computed in the dtype of its arguments. Numbers are those of arXiv 2407.09577 where it has them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`1 / r(x) = 1 / sqrt(mean(x^2) + eps)`: `[..., n]` -> `[..., 1]`."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def inverse_rms_of_sum(x: Tensor, eps: float) -> Tensor:
    """The same without the division by `n` inside: `sqrt(n) / sqrt(sum(x^2) + n eps)`."""
    n = x.shape[-1]
    return math.sqrt(n) * torch.rsqrt(x.square().sum(-1, keepdim=True) + n * eps)


def deferred_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`W (x s) + c = (W x) s + c`, any `s` that is one number a token (proposition 1; figure 2).

    Args:
        x: `[..., n]`, before its norm.
        weight: `[m, n]`, with the norm's gain folded into it.
        scale: `[..., 1]`.
        bias: `[m]`.
    """
    y = F.linear(x, weight) * scale
    return y if bias is None else y + bias


def norm_after_norm(q: Tensor, eps: float, scale: Tensor) -> Tensor:
    """`RMSNorm(q s)` of a scaled `q` without scaling it: `q / sqrt(mean(q^2) + eps / s^2)`.

    The first norm's division cancels in the second one, exactly: only eps has to know of it.

    Args:
        q: `[..., heads, head_dim]`, a projection of what is not normalised.
        eps: of the second norm.
        scale: `[..., 1, 1]`, the first norm's `1 / r(x)`.
    """
    return q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps / scale.square())


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the first `2 half` channels: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    It is linear: tables that carry a scale, one for each token, scale the result (section 3 of the paper).

    Args:
        q: `[..., tokens, heads, head_dim]`.
        cos, sin: `[..., tokens, 1, half]`.
    """
    half = cos.shape[-1]
    a, b, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def tables_with_gain(cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tables that rotate `g q`, given `q`: each channel's cosine carries its own gain, its sine its partner's.

    Args:
        cos, sin: `[..., half]`.
        gain: `[2 half]`, of a norm right before the rotation.

    Returns:
        `(cos_a, sin_b, cos_b, sin_a)` for `(a cos_a - b sin_b, b cos_b + a sin_a)`.
    """
    a, b = gain.chunk(2)
    return cos * a, sin * b, cos * b, sin * a


def rotate_with(q: Tensor, tables: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Rotate all channels of `[..., head_dim]` with the tables of `tables_with_gain`."""
    cos_a, sin_b, cos_b, sin_a = tables
    a, b = q.chunk(2, -1)
    return torch.cat([a * cos_a - b * sin_b, b * cos_b + a * sin_a], -1)


def joint_gain(q_gain: Tensor, k_gain: Tensor) -> Tensor:
    """`g_q g_k`, on either side: `(g_q q) . (g_k k) = (g_q g_k q) . k`, for channels that are not rotated."""
    return q_gain * k_gain


def deferred_glu(
    gate: Tensor, up: Tensor, scale: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """`D (f(s gate) * (s up)) = s D (f(s gate) * up)`: the up projection's scale moves past the down projection.

    Args:
        gate, up: `[..., inner]`, projections of what is not normalised, without biases.
        scale: `[..., 1]`.
        down: `[n, inner]`.
    """
    return F.linear(activation(gate * scale) * up, down) * scale


def bilinear_glu(
    gate: Tensor, up: Tensor, scale: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """The same for an activation with `f(s x) = s f(x)` (ReLU, or none): one factor `s^2`, past the down projection."""
    return F.linear(activation(gate) * up, down) * scale.square()


@dataclass(frozen=True)
class LayerWeights:
    """A decoder layer that normalises before attention and before its gated MLP.

    Attributes:
        q: `[heads head_dim, hidden]`.
        k, v: `[kv_heads head_dim, hidden]`.
        output: `[hidden, heads head_dim]`.
        gate, up: `[inner, hidden]`.
        down: `[hidden, inner]`.
        q_bias, k_bias, v_bias, output_bias, gate_bias, up_bias, down_bias: or None.
        attention_gain, mlp_gain: `[hidden]`, of norms that are not folded, or None.
        q_gain, k_gain: `[head_dim]`, of the norms of each head, or None.
        window: positions that a token sees, itself included; None: all.
        rotates: whether queries and keys are rotated.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    attention_gain: Tensor | None = None
    mlp_gain: Tensor | None = None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    window: int | None = None
    rotates: bool = True


@dataclass(frozen=True)
class LayerSettings:
    """Numbers that all layers share."""

    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    eps: float
    qk_eps: float
    attention_scale: float
    residual_scale: float


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def decoder_layer(x: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, settings: LayerSettings) -> Tensor:
    """A whole decoder layer with both norms deferred, for the first tokens of a text.

    Args:
        x: `[batch, tokens, hidden]`, the residual stream.
        cos, sin: `[tokens, half]`.
    """
    tokens, d = x.shape[-2], settings.head_dim
    scale = inverse_rms(x, settings.eps)
    read = x if weights.attention_gain is None else x * weights.attention_gain
    cancels = weights.q_bias is None and weights.k_bias is None
    left = scale if cancels else torch.ones_like(scale)  # what q and k are still to be scaled by
    q = deferred_linear(read, weights.q, scale / left, weights.q_bias).unflatten(-1, (-1, d))
    k = deferred_linear(read, weights.k, scale / left, weights.k_bias).unflatten(-1, (-1, d))
    v = deferred_linear(read, weights.v, scale, weights.v_bias).unflatten(-1, (-1, d))
    left = left.unsqueeze(-1)
    if weights.q_gain is not None and weights.k_gain is not None:
        q = norm_after_norm(q, settings.qk_eps, left) * weights.q_gain
        k = norm_after_norm(k, settings.qk_eps, left) * weights.k_gain
    else:
        q, k = q * left, k * left
    if weights.rotates:
        q, k = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
    groups = settings.heads // settings.kv_heads
    k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * settings.attention_scale
    at = torch.arange(tokens)
    seen = at[None] <= at[:, None]
    if weights.window is not None:
        seen &= at[None] > at[:, None] - weights.window
    read = torch.einsum("...hqk,...khd->...qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(-2)
    x = x + settings.residual_scale * F.linear(read, weights.output, weights.output_bias)
    scale = inverse_rms(x, settings.eps)
    read = x if weights.mlp_gain is None else x * weights.mlp_gain
    activation = ACTIVATIONS[settings.activation]
    gate, up = F.linear(read, weights.gate), F.linear(read, weights.up)
    if weights.gate_bias is None and weights.up_bias is None and weights.down_bias is None:
        return x + settings.residual_scale * deferred_glu(gate, up, scale, weights.down, activation)
    gate, up = (
        y * scale if bias is None else y * scale + bias
        for y, bias in ((gate, weights.gate_bias), (up, weights.up_bias))
    )
    return x + settings.residual_scale * F.linear(activation(gate) * up, weights.down, weights.down_bias)
