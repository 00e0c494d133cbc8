"""The kernels against float64, on a GPU or in Triton's interpreter: shapes, strides, dtypes, and what is no number."""

import math
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.decoding.deferred import rotate
from flashnorm.gpu import launch, ops
from flashnorm.gpu.tiling import Tiling, candidates

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXAMPLES = 40 if torch.cuda.is_available() else 12
# Rounding of what is returned, and of an input with its gain; float32 has sums in another order. The interpreter cuts
# bits off where it makes a bfloat16, which is twice as far as rounding.
CUT = 1 if torch.cuda.is_available() else 2
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 * 1.5 * CUT, torch.float16: 2**-11 * 1.5}
ONE, SEVERAL = Tiling(1, 16, 64, 4), Tiling(16, 32, 32, 4, 2)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, eps: float | None) -> Tensor:
    read = x.double()
    read = read if eps is None else read * torch.rsqrt(read.square().mean(-1, keepdim=True) + eps)
    read = read if gain is None else read * gain.double()
    return F.linear(read, weight.double(), None if bias is None else bias.double())


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool(((found.double() - expected).abs() <= tolerance * expected.abs().max()).all())


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    tokens=st.sampled_from([1, 1, 2, 16, 17, 33]),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 70),
    dtype=st.sampled_from(launch.DTYPES),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    stride=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_norm_linear(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, parts: tuple[bool, ...], stride: int, seed: int
) -> None:
    """Random shapes and strides, with poisoned outputs."""
    x = random(tokens, inputs + stride, dtype=dtype, seed=seed)[:, :inputs]
    weight = random(outputs, inputs + stride, dtype=dtype, seed=seed + 1)[:, stride:]
    bias = random(outputs, dtype=dtype, seed=seed + 2) if parts[0] else None
    gain = random(inputs, dtype=dtype, seed=seed + 3) if parts[1] else None
    eps = 1e-5 if parts[2] else None
    y = torch.full((tokens, outputs), math.nan, dtype=dtype, device=DEVICE)
    if tokens == 1:
        launch.matvec(x[0], weight, y[0], ONE, bias=bias, gain=gain, eps=eps)
    else:
        launch.matmul(x, weight, y, SEVERAL, bias, gain, eps)
    assert close(y, exact(x, weight, bias, gain, eps), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 33, 100])
def test_every_tiling(tokens: int, dtype: torch.dtype) -> None:
    """All that may be chosen for so many tokens, on a shape that is a multiple of nothing."""
    x, weight, gain = (random(*shape, dtype=dtype) for shape in ((tokens, 300), (70, 300), (300,)))
    for tiling in candidates(tokens, dtype):
        found = ops.fused(x, weight, None, gain, 1e-5, tiling)
        assert close(found, exact(x, weight, None, gain, 1e-5), TOLERANCE[dtype]), tiling


@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_operator(tokens: int, dtype: torch.dtype) -> None:
    """`ops.norm_linear` takes any leading dimensions and strides; it is what `torch.ops` runs on a GPU."""
    operator = torch.ops.flashnorm.norm_linear if DEVICE.type == "cuda" else ops.norm_linear
    x, weight = random(tokens, 2, 40, dtype=dtype)[:, 1:], random(40, 24, dtype=dtype).T
    before = launch.runs.copy()
    found = operator(x, weight, None, None, 1e-5)
    assert found.shape == (tokens, 1, 24)
    assert found.dtype == dtype
    assert launch.runs != before
    assert close(found, exact(x, weight, None, None, 1e-5), TOLERANCE[dtype])
    for empty in (x[:0], x[..., :0]):
        expected = F.linear(empty, weight[:, : empty.shape[-1]])
        assert torch.equal(ops.norm_linear(empty, weight[:, : empty.shape[-1]]), expected)
    with pytest.raises(ValueError, match=r"expected gain \[40\]"):
        ops.norm_linear(x, weight, None, random(39, dtype=dtype), 1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [1, 20])
def test_what_is_no_number_stays_in_its_token(tokens: int, value: float) -> None:
    x, weight = random(tokens, 70), random(20, 70)
    x[0, 3] = value
    expected = F.linear(F.rms_norm(x, (70,), None, 1e-5), weight)
    found = ops.fused(x, weight, None, None, 1e-5, ONE if tokens == 1 else SEVERAL)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[0].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_weight_that_is_no_number_stays_in_its_output(tokens: int, value: float) -> None:
    x, weight = random(tokens, 70).abs() + 1, random(20, 70)
    weight[5, 7] = value
    found = ops.fused(x, weight, None, None, None, ONE if tokens == 1 else SEVERAL)
    assert torch.equal(found.isfinite(), F.linear(x, weight).isfinite())


@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products_of_a_layer(dtype: torch.dtype, biased: bool) -> None:
    """Queries, keys and values at once; SwiGLU; and the residual stream, in place."""
    x, gain = random(90), random(90, dtype=dtype)
    weights = tuple(random(rows, 90, dtype=dtype, seed=rows) for rows in (40, 24, 24))
    biases: Any = tuple(random(len(w), dtype=dtype, seed=7) if biased else None for w in weights)
    normed: Any = {"gain": gain, "gain_offset": 0.5, "eps": 1e-5}
    y = torch.full((88,), math.nan, device=DEVICE)
    launch.three_matvecs(x, weights, biases, y, ONE, **normed)
    parts = [exact(x, w, b, gain.double() + 0.5, 1e-5) for w, b in zip(weights, biases, strict=True)]
    assert close(y, torch.cat(parts), TOLERANCE[torch.float32])
    y = torch.full((24,), math.nan, device=DEVICE)
    launch.gated_matvec(x, *weights[1:], *biases[1:], y, ONE, **normed)
    assert close(y, F.silu(parts[1]) * parts[2], TOLERANCE[torch.float32])
    stream = random(40, seed=9)
    expected = stream.double() + 0.3 * exact(x, weights[0], biases[0], None, None)
    launch.matvec(x, weights[0], stream, ONE, bias=biases[0], residual=stream, factor=0.3)
    assert close(stream, expected, TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize(
    ("sizes", "parts", "at", "normed"),
    [
        ((9, 3, 64, 32), 4, 300, False),
        ((4, 2, 48, 16), 3, 5, True),  # fewer positions than one part has
        ((2, 2, 16, 4), 1, 70, True),  # some channels are not rotated
        ((8, 1, 128, 64), 8, 0, True),  # the first token
        ((6, 2, 20, 10), 3, 63, False),  # no power of two
        ((4, 4, 32, 16), 2, 64, True),  # the new token begins a block
    ],
)
def test_attention(dtype: torch.dtype, sizes: tuple[int, int, int, int], parts: int, at: int, normed: bool) -> None:
    heads, kv, dims, half = sizes
    projected, cos, sin = random((heads + 2 * kv) * dims), random(320, half, seed=1), random(320, half, seed=2)
    q_gain, k_gain = random(dims, dtype=dtype, seed=3), random(dims, dtype=dtype, seed=4)
    keys, values = random(kv, 320, dims, dtype=dtype, seed=5), random(kv, 320, dims, dtype=dtype, seed=6)
    keys[:, at:], values[:, at:] = math.nan, math.nan  # what is not written yet must not be read
    y = torch.full((heads * dims,), math.nan, device=DEVICE)
    q, k, v = projected.double().view(-1, dims).split([heads, kv, kv])
    if normed:
        q, k = (
            one * torch.rsqrt(one.square().mean(-1, keepdim=True) + 1e-6) * (gain.double() + 0.5)
            for one, gain in ((q, q_gain), (k, k_gain))
        )
    q, k = (rotate(one, cos[at].double(), sin[at].double()) for one in (q, k))
    all_keys = torch.cat([keys[:, :at].double(), k[:, None].to(dtype).double()], 1)
    all_keys = all_keys.repeat_interleave(heads // kv, 0)
    all_values = torch.cat([values[:, :at].double(), v[:, None].to(dtype).double()], 1).repeat_interleave(
        heads // kv, 0
    )
    scores = 0.3 * torch.einsum("hd,hld->hl", q.to(dtype).double(), all_keys)
    expected = torch.einsum("hl,hld->hd", scores.softmax(-1), all_values).flatten()
    attention = launch.Attention(heads, kv, dims, DEVICE, parts)
    gains, position = (q_gain, k_gain) if normed else None, torch.tensor([at], device=DEVICE)
    for _ in range(2):  # the second time shows that it left its counters as they were
        attention(projected, gains, (cos, sin), position, keys, values, y, gain_offset=0.5, qk_eps=1e-6, scale=0.3)
        # Chances are rounded to the dtype, and sums of scores may differ by an ulp of a query.
        assert close(y, expected, 3e-6 if dtype == torch.float32 else 3 * TOLERANCE[dtype])
        assert close(keys[:, at], k, TOLERANCE[dtype])
        assert close(values[:, at], v, TOLERANCE[dtype])
        assert keys[:, at + 1 :].isnan().all()
        y.fill_(math.nan)


@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_plain_way(tokens: int, dtype: torch.dtype) -> None:
    """A norm of its own and a product: rounded in between, so with the rounding of an input more."""
    x, weight, gain = random(tokens, 90, dtype=dtype)[:, 3:], random(20, 87, dtype=dtype), random(87, dtype=dtype)
    for part in (None, gain):
        assert close(ops.plain(x, weight, None, part, 1e-5), exact(x, weight, None, part, 1e-5), 2 * TOLERANCE[dtype])


def test_the_embedding_moves_on() -> None:
    table, x = random(7, 70, dtype=torch.bfloat16), torch.full((70,), math.nan, device=DEVICE)
    position = torch.tensor([4], device=DEVICE)
    launch.embed(table, torch.tensor([3], device=DEVICE), position, x, 1.5)
    assert torch.equal(x, table[3].float() * 1.5)
    assert position.item() == 5
