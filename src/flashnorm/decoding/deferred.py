"""What a layer computes when its norms are deferred: the paper's identities as pure functions.

`decoder_layer` and what it calls is the reference for the kernels: `formula.py` compares each kind of layer with it
before layers are replaced. Tests compare the other identities with what they replace. Everything is computed in the
dtype of the arguments. "The paper" is arXiv 2407.09577, and numbers of propositions, figures and sections are those of
the paper.
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
    """`1 / r(x)` without a division by `n` under the root: `sqrt(n) / sqrt(sum(x^2) + n eps)`."""
    n = x.shape[-1]
    return math.sqrt(n) * torch.rsqrt(x.square().sum(-1, keepdim=True) + n * eps)


def deferred_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`W (x s) + c = (W x) s + c` for any `s` that is one number for each token (proposition 1; figure 2).

    Args:
        x: `[..., n]`, the norm's input.
        weight: `[m, n]`, with the norm's gain folded into it.
        scale: `[..., 1]`.
        bias: `[m]`.
    """
    y = F.linear(x, weight) * scale
    return y if bias is None else y + bias


def norm_after_norm(q: Tensor, eps: float, scale: Tensor) -> Tensor:
    """`RMSNorm(q s)` computed from the unscaled `q`: `q / sqrt(mean(q^2) + eps / s^2)`.

    The first norm's division cancels exactly in the second norm if `eps` is divided by `s^2`.

    Args:
        q: `[..., heads, head_dim]`, a projection of activations that are not normalised.
        eps: the second norm's eps.
        scale: `[..., 1, 1]`, the first norm's `1 / r(x)`.
    """
    return q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps / scale.square())


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first `2 half` channels: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    RoPE is linear, so if a token's tables are multiplied by a scale, so is the result (section 3 of the paper).

    Args:
        q: `[..., tokens, heads, head_dim]`.
        cos, sin: `[..., tokens, 1, half]`.
    """
    half = cos.shape[-1]
    a, b, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def tables_with_gain(cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RoPE tables that rotate `g q`, given `q`: a cosine is multiplied by its channel's gain, a sine by the partner's.

    Args:
        cos, sin: `[..., half]`.
        gain: `[2 half]`, the gain of a norm right before the rotation.

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
    """`g_q g_k` as one gain of `q` or of `k`: `(g_q q) . (g_k k) = (g_q g_k q) . k`, for channels without RoPE."""
    return q_gain * k_gain


def deferred_glu(
    gate: Tensor, up: Tensor, scale: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """`D (f(s gate) * (s up)) = s D (f(s gate) * up)`: the up projection's scale moves past the down projection.

    Args:
        gate, up: `[..., intermediate]`, projections of activations that are not normalised, without biases.
        scale: `[..., 1]`.
        down: `[n, intermediate]`.
    """
    return F.linear(activation(gate * scale) * up, down) * scale


def bilinear_glu(
    gate: Tensor, up: Tensor, scale: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """`deferred_glu` for an activation with `f(s x) = s f(x)` (ReLU, or none): `D (f(gate) * up) s^2`."""
    return F.linear(activation(gate) * up, down) * scale.square()


def chosen_experts(scores: Tensor, count: int, renormalises: bool) -> Tensor:
    """The weight of each expert for each token, 0 for those that are not chosen: `[..., experts]` of both.

    Args:
        scores: `[..., experts]`, the router's outputs.
        count: how many experts with the largest scores are chosen.
        renormalises: whether the weights of the chosen experts, the softmax of all scores, are divided by their sum.
    """
    found, chosen = scores.softmax(-1).topk(count)
    found = found / found.sum(-1, keepdim=True) if renormalises else found
    return torch.zeros_like(scores).scatter(-1, chosen, found)


@dataclass(frozen=True)
class LayerWeights:
    """A decoder layer with attention and a gated MLP, experts, or both. It normalises before or after these, or both.

    The gain of a norm is `LayerSettings.gain_offset` plus its weight. The outputs of MLP and experts are added up.

    Attributes:
        q: `[heads head_dim, hidden]`.
        k, v: `[kv_heads head_dim, hidden]`.
        output: `[hidden, heads head_dim]`.
        gate, up: `[intermediate, hidden]`; None if there are only experts.
        down: `[hidden, intermediate]`; None if there are only experts.
        router: `[experts, hidden]`, whose outputs are the scores of the experts; None if there are none.
        experts_in: `[experts, 2 intermediate, hidden]`, each expert's gate and then its up; None if there are none.
        experts_out: `[experts, hidden, intermediate]`; None if there are none.
        shared_gate: `[1, hidden]`: beside experts, the MLP is multiplied by the sigmoid of its output; None: by 1.
        q_bias, k_bias, v_bias, output_bias, gate_bias, up_bias, down_bias: `[outputs]`, or None.
        attention_gain, mlp_gain: `[hidden]`, the weights of the norms before attention and MLP; None if folded, or if
            there are no such norms.
        attention_after, mlp_after: `[hidden]`, the weights of the norms of what attention and MLP add to the residual
            stream; None if there are no such norms.
        q_gain, k_gain: the weights of the norms of queries and keys, `[head_dim]` or, if all heads of a token are
            normalised together, `[heads head_dim]` and `[kv_heads head_dim]`; None if there are no such norms.
        window: how many positions a token sees, itself included; None: all.
        rotates: whether RoPE rotates queries and keys.
        table: which of the decoder's RoPE tables rotates them.
        experts_per_token, renormalises: which experts are chosen, and with which weights: see `chosen_experts`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    gate: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    router: Tensor | None = None
    experts_in: Tensor | None = None
    experts_out: Tensor | None = None
    shared_gate: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    attention_gain: Tensor | None = None
    mlp_gain: Tensor | None = None
    attention_after: Tensor | None = None
    mlp_after: Tensor | None = None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    window: int | None = None
    rotates: bool = True
    table: int = 0
    experts_per_token: int = 0
    renormalises: bool = False


@dataclass(frozen=True)
class LayerSettings:
    """The numbers that all layers share.

    Attributes:
        heads, kv_heads, head_dim: of attention.
        activation: a name in `ACTIVATIONS`.
        eps: of all norms but those of queries and keys.
        qk_eps: of the norms of queries and keys.
        attention_scale: by which attention scores are multiplied.
        residual_scale: by which attention and MLP multiply what they add to the residual stream.
        score_cap: attention scores `s` become `cap tanh(s / cap)`; None: there is no cap.
        norm_before: whether the inputs of attention and MLP are normalised.
        norm_all_heads: whether the queries of all heads of a token are normalised together, and the keys.
        gain_offset: what is added to a norm's weight to make its gain (Gemma: 1).
    """

    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    eps: float
    qk_eps: float
    attention_scale: float
    residual_scale: float
    score_cap: float | None = None
    norm_before: bool = True
    norm_all_heads: bool = False
    gain_offset: float = 0.0


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def decoder_layer(x: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, settings: LayerSettings) -> Tensor:
    """A whole decoder layer with the norms before attention and MLP deferred, for a sequence without past tokens.

    Args:
        x: `[batch, tokens, hidden]`, the residual stream.
        cos, sin: `[tokens, half]`, the layer's own of the decoder's tables.
    """
    tokens, d = x.shape[-2], settings.head_dim
    scale = inverse_rms(x, settings.eps) if settings.norm_before else torch.ones_like(x[..., :1])
    read = x if weights.attention_gain is None else x * (weights.attention_gain + settings.gain_offset)
    cancels = weights.q_bias is None and weights.k_bias is None
    left = scale if cancels else torch.ones_like(scale)  # the scale that q and k still need
    q = deferred_linear(read, weights.q, scale / left, weights.q_bias).unflatten(-1, (-1, d))
    k = deferred_linear(read, weights.k, scale / left, weights.k_bias).unflatten(-1, (-1, d))
    v = deferred_linear(read, weights.v, scale, weights.v_bias).unflatten(-1, (-1, d))
    left = left.unsqueeze(-1)
    if weights.q_gain is not None and weights.k_gain is not None:
        q, k = (
            _norm_of_heads(heads, weight + settings.gain_offset, left, settings)
            for heads, weight in ((q, weights.q_gain), (k, weights.k_gain))
        )
    else:
        q, k = q * left, k * left
    if weights.rotates:
        q, k = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
    groups = settings.heads // settings.kv_heads
    k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * settings.attention_scale
    if settings.score_cap is not None:
        scores = settings.score_cap * (scores / settings.score_cap).tanh()
    at = torch.arange(tokens, device=x.device)
    seen = at[None] <= at[:, None]
    if weights.window is not None:
        seen &= at[None] > at[:, None] - weights.window
    read = torch.einsum("...hqk,...khd->...qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(-2)
    x = x + _added(F.linear(read, weights.output, weights.output_bias), weights.attention_after, settings)
    scale = inverse_rms(x, settings.eps) if settings.norm_before else torch.ones_like(scale)
    read = x if weights.mlp_gain is None else x * (weights.mlp_gain + settings.gain_offset)
    activation = ACTIVATIONS[settings.activation]
    y = _mlp(read, scale, weights, activation) + _experts(read, scale, weights, activation)
    return x + _added(y, weights.mlp_after, settings)


def _mlp(read: Tensor, scale: Tensor, weights: LayerWeights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """What the gated MLP makes of activations without the norm's `scale`; zeros if there is none."""
    if weights.gate is None or weights.up is None or weights.down is None:
        return torch.zeros_like(read)
    factor = 1 if weights.shared_gate is None else deferred_linear(read, weights.shared_gate, scale).sigmoid()
    gate, up = F.linear(read, weights.gate), F.linear(read, weights.up)
    if weights.gate_bias is None and weights.up_bias is None and weights.down_bias is None:
        return factor * deferred_glu(gate, up, scale, weights.down, activation)
    gate, up = (
        y * scale if bias is None else y * scale + bias
        for y, bias in ((gate, weights.gate_bias), (up, weights.up_bias))
    )
    return factor * F.linear(activation(gate) * up, weights.down, weights.down_bias)


def _experts(read: Tensor, scale: Tensor, weights: LayerWeights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """What the experts make of activations without the norm's `scale`; zeros if there are none."""
    y = torch.zeros_like(read)
    if weights.router is None or weights.experts_in is None or weights.experts_out is None:
        return y
    scores = deferred_linear(read, weights.router, scale)
    each = chosen_experts(scores, weights.experts_per_token, weights.renormalises)
    for expert in each.flatten(0, -2).any(0).nonzero()[:, 0].tolist():
        gate, up = F.linear(read, weights.experts_in[expert]).chunk(2, -1)
        y = y + each[..., expert, None] * deferred_glu(gate, up, scale, weights.experts_out[expert], activation)
    return y


def _norm_of_heads(q: Tensor, gain: Tensor, scale: Tensor, settings: LayerSettings) -> Tensor:
    """The norm of queries or keys `[..., heads, head_dim]`: of each head, or of all heads of a token together."""
    if not settings.norm_all_heads:
        return norm_after_norm(q, settings.qk_eps, scale) * gain
    return (norm_after_norm(q.flatten(-2), settings.qk_eps, scale[..., 0]) * gain).view_as(q)


def _added(y: Tensor, after: Tensor | None, settings: LayerSettings) -> Tensor:
    """What is added to the residual stream: `y` times a constant, normalised before that if there is a norm."""
    if after is not None:
        y = y * inverse_rms(y, settings.eps) * (after + settings.gain_offset)
    return settings.residual_scale * y
