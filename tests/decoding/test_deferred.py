"""The run-time identities, in float64: each against the computation that it replaces."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.decoding import deferred
from flashnorm.decoding.deferred import LayerSettings, LayerWeights

TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, EPS, QK_EPS = 7, 24, 40, 4, 2, 8, 1e-5, 1e-3


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


X = random(TOKENS, HIDDEN)
SMALL = [1.0, 1e-3, 1e-8]  # sizes of the activation; eps is all that counts for the last


@pytest.mark.parametrize("size", SMALL)
def test_inverse_rms(size: float) -> None:
    assert_same(size * X * deferred.inverse_rms(size * X, EPS), rms_norm(size * X))
    assert_same(size * X * deferred.inverse_rms_of_sum(size * X, EPS), rms_norm(size * X))


@pytest.mark.parametrize("bias", [None, random(INNER)])
def test_a_scale_after_the_linear(bias: Tensor | None) -> None:
    weight = random(INNER, HIDDEN)
    found = deferred.deferred_linear(X, weight, deferred.inverse_rms(X, EPS), bias)
    assert_same(found, F.linear(rms_norm(X), weight, bias))


@pytest.mark.parametrize("size", SMALL)
def test_a_norm_after_a_norm_needs_no_first_division(size: float) -> None:
    x, weight = size * X, random(HEADS * HEAD_DIM, HIDDEN)
    heads = F.linear(x, weight).unflatten(-1, (HEADS, HEAD_DIM))
    scale = deferred.inverse_rms(x, EPS)[..., None]
    expected = rms_norm(F.linear(rms_norm(x), weight).unflatten(-1, (HEADS, HEAD_DIM)), QK_EPS)
    assert_same(deferred.norm_after_norm(heads, QK_EPS, scale), expected)
    # With the second eps as it is, it would be another number.
    assert (rms_norm(heads, QK_EPS) - expected).abs().max() > 1e-6 * expected.abs().max()


def rotated(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    angles = random(TOKENS, 1, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    both_cos, both_sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    a, b = q.chunk(2, -1)
    return q * both_cos + torch.cat([-b, a], -1) * both_sin, cos, sin


def test_tables_that_carry_the_scale() -> None:
    q, scale = random(TOKENS, HEADS, HEAD_DIM), deferred.inverse_rms(X, EPS)[..., None]
    expected, cos, sin = rotated(q * scale)
    assert_same(deferred.rotate(q, cos * scale, sin * scale), expected)


def test_channels_that_are_not_rotated_stay() -> None:
    q = random(TOKENS, HEADS, HEAD_DIM + 3)
    expected, cos, sin = rotated(q[..., :HEAD_DIM])
    assert_same(deferred.rotate(q, cos, sin), torch.cat([expected, q[..., HEAD_DIM:]], -1))


def test_tables_that_carry_the_gain() -> None:
    q, gain = random(TOKENS, HEADS, HEAD_DIM), random(HEAD_DIM)
    expected, cos, sin = rotated(q * gain)
    assert_same(deferred.rotate_with(q, deferred.tables_with_gain(cos, sin, gain)), expected)


def test_one_gain_for_queries_and_keys() -> None:
    q, k = random(TOKENS, HEAD_DIM), random(TOKENS, HEAD_DIM, seed=1)
    g, h = random(HEAD_DIM), random(HEAD_DIM, seed=1)
    assert_same((q * deferred.joint_gain(g, h)) @ k.T, (q * g) @ (k * h).T)


@pytest.mark.parametrize("activation", deferred.ACTIVATIONS)
def test_the_up_projection_is_scaled_after_the_down_projection(activation: str) -> None:
    f, gate, up = deferred.ACTIVATIONS[activation], random(INNER, HIDDEN), random(INNER, HIDDEN, seed=1)
    down, scale = random(HIDDEN, INNER), deferred.inverse_rms(X, EPS)
    expected = F.linear(f(F.linear(rms_norm(X), gate)) * F.linear(rms_norm(X), up), down)
    assert_same(deferred.deferred_glu(F.linear(X, gate), F.linear(X, up), scale, down, f), expected)
    bilinear = deferred.bilinear_glu(F.linear(X, gate), F.linear(X, up), scale, down, f)
    if activation == "relu":
        assert_same(bilinear, expected)
    else:
        assert (bilinear - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_layer_with_experts(count: int, shared: bool, renormalises: bool) -> None:
    experts, q_size, kv_size = 5, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    of_attention = {
        "q": random(q_size, HIDDEN),
        "k": random(kv_size, HIDDEN, seed=1),
        "v": random(kv_size, HIDDEN, seed=2),
        "output": random(HIDDEN, q_size),
    }
    mlp = {"gate": random(INNER, HIDDEN), "up": random(INNER, HIDDEN, seed=1), "down": random(HIDDEN, INNER)}
    w = LayerWeights(
        **of_attention,
        **(mlp | {"shared_gate": random(1, HIDDEN)} if shared else {}),
        router=random(experts, HIDDEN),
        experts_in=random(experts, 2 * INNER, HIDDEN),
        experts_out=random(experts, HIDDEN, INNER),
        mlp_gain=random(HIDDEN, seed=1),
        experts_per_token=count,
        renormalises=renormalises,
    )
    settings = LayerSettings(HEADS, KV_HEADS, HEAD_DIM, "silu", EPS, QK_EPS, 0.3, 0.7)
    angles = random(TOKENS, HEAD_DIM // 2)
    found = deferred.decoder_layer(X, angles.cos(), angles.sin(), w, settings)
    # Attention alone: an MLP that adds nothing.
    nothing = LayerWeights(**of_attention, **{name: torch.zeros_like(weight) for name, weight in mlp.items()})
    x = deferred.decoder_layer(X, angles.cos(), angles.sin(), nothing, settings)
    assert_same(found, x + settings.residual_scale * plain_experts(rms_norm(x) * random(HIDDEN, seed=1), w))


def plain_experts(read: Tensor, w: LayerWeights) -> Tensor:
    """As models are written: one token and one expert at a time."""
    assert w.router is not None
    assert w.experts_in is not None
    assert w.experts_out is not None
    rows = []
    for x in read:
        scores = torch.softmax(w.router @ x, -1)
        chosen = sorted(range(len(scores)), key=lambda expert: -float(scores[expert]))[: w.experts_per_token]
        total = scores[chosen].sum() if w.renormalises else 1
        row = torch.zeros_like(x)
        for expert in chosen:
            gate, up = (w.experts_in[expert] @ x).chunk(2)
            row += scores[expert] / total * (w.experts_out[expert] @ (F.silu(gate) * up))
        if w.gate is not None and w.up is not None and w.down is not None and w.shared_gate is not None:
            row += torch.sigmoid(w.shared_gate @ x) * (w.down @ (F.silu(w.gate @ x) * (w.up @ x)))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize(("window", "rotates"), [(None, True), (3, True), (None, False)])
def test_a_decoder_layer(biased: bool, normalised: bool, gains: bool, window: int | None, rotates: bool) -> None:
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    biases = {"q": q_size, "k": kv_size, "v": kv_size, "output": HIDDEN, "gate": INNER, "up": INNER, "down": HIDDEN}
    w = LayerWeights(
        q=random(q_size, HIDDEN),
        k=random(kv_size, HIDDEN, seed=1),
        v=random(kv_size, HIDDEN, seed=2),
        output=random(HIDDEN, q_size),
        gate=random(INNER, HIDDEN),
        up=random(INNER, HIDDEN, seed=1),
        down=random(HIDDEN, INNER),
        attention_gain=random(HIDDEN) if gains else None,
        mlp_gain=random(HIDDEN, seed=1) if gains else None,
        q_gain=random(HEAD_DIM) if normalised else None,
        k_gain=random(HEAD_DIM, seed=1) if normalised else None,
        window=window,
        rotates=rotates,
        **{f"{name}_bias": random(size, seed=2) for name, size in biases.items() if biased},
    )
    settings = LayerSettings(HEADS, KV_HEADS, HEAD_DIM, "silu", EPS, QK_EPS, 0.3, 0.7)
    angles = random(TOKENS, HEAD_DIM // 2)
    found = deferred.decoder_layer(X, angles.cos(), angles.sin(), w, settings)
    assert_same(found, plain_layer(X, angles, w, settings))


def plain_layer(x: Tensor, angles: Tensor, w: LayerWeights, s: LayerSettings) -> Tensor:
    """As models are written: norms first, one head at a time."""
    one = torch.ones(HIDDEN, dtype=x.dtype)
    read = rms_norm(x) * (one if w.attention_gain is None else w.attention_gain)
    projections = ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    qkv = torch.cat([F.linear(read, weight, bias) for weight, bias in projections], -1).unflatten(-1, (-1, HEAD_DIM))
    cos, sin = (torch.cat([table, table], -1) for table in (angles.cos(), angles.sin()))
    heads = []
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        q, k, v = qkv[:, head], qkv[:, HEADS + kv], qkv[:, HEADS + KV_HEADS + kv]
        if w.q_gain is not None and w.k_gain is not None:
            q, k = rms_norm(q, QK_EPS) * w.q_gain, rms_norm(k, QK_EPS) * w.k_gain
        if w.rotates:
            q, k = (y * cos + torch.cat([-y[:, HEAD_DIM // 2 :], y[:, : HEAD_DIM // 2]], -1) * sin for y in (q, k))
        rows = []
        for t in range(TOKENS):
            first = 0 if w.window is None else max(0, t + 1 - w.window)
            weights = torch.softmax(k[first : t + 1] @ q[t] * s.attention_scale, 0)
            rows.append(weights @ v[first : t + 1])
        heads.append(torch.stack(rows))
    x = x + s.residual_scale * F.linear(torch.cat(heads, -1), w.output, w.output_bias)
    read = rms_norm(x) * (one if w.mlp_gain is None else w.mlp_gain)
    inner = F.silu(F.linear(read, w.gate, w.gate_bias)) * F.linear(read, w.up, w.up_bias)
    return x + s.residual_scale * F.linear(inner, w.down, w.down_bias)
