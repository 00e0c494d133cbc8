"""The operators, against torch in float64: all shapes, dtypes and instruction sets, and numbers that are no numbers."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.cpu import ops
from flashnorm.cpu.kernels import native
from flashnorm.decoding.deferred import LayerSettings, LayerWeights, decoder_layer

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")

# Rounding of what is read and of what is returned, both to the dtype, and sums in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8 * 1.5, torch.float16: 2**-11 * 1.5}


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    native.choose(native.instruction_sets()[-1])


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain, eps)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 40),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 90),
    dtype=st.sampled_from(list(native.DTYPES)),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    instruction_set=st.sampled_from(native.instruction_sets() or [""]),
    seed=st.integers(0, 99),
)
def test_norm_linear(
    tokens: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    parts: tuple[bool, bool, bool],
    instruction_set: str,
    seed: int,
) -> None:
    native.choose(instruction_set)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight = random(tokens, inputs), random(outputs, inputs)
    bias, gain = random(outputs) if parts[0] else None, random(inputs) if parts[1] else None
    eps = 1e-5 if parts[2] else None
    read = x.double() if gain is None or eps is not None else x.double() * gain.double()
    read = read if eps is None else rms_norm(read, None if gain is None else gain.double(), eps)
    exact = F.linear(read, weight.double(), None if bias is None else bias.double())
    size = F.linear(read.abs(), weight.double().abs()) + (0 if bias is None else bias.double().abs())
    found = ops.norm_linear(x, weight, bias, gain, eps)
    assert found.dtype == dtype
    assert found.shape == (tokens, outputs)
    assert ((found.double() - exact).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_in_its_token(dtype: torch.dtype, tokens: int, value: float) -> None:
    for name in native.instruction_sets():
        native.choose(name)
        x, weight = torch.randn(tokens, 64).to(dtype), torch.randn(48, 64).to(dtype)
        x[0, 3] = value
        expected = F.linear(rms_norm(x.float(), None, 1e-5).to(dtype), weight)
        found = ops.norm_linear(x, weight, None, None, 1e-5)
        assert torch.equal(found.isnan(), expected.isnan())
        assert found[0].isnan().all()


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_weight_that_is_no_number_stays_in_its_output(tokens: int) -> None:
    for name, value in itertools.product(native.instruction_sets(), (math.nan, math.inf)):
        native.choose(name)
        x, weight = torch.rand(tokens, 64) + 1, torch.randn(48, 64)
        weight[5, 7] = value
        found = ops.norm_linear(x, weight)
        assert torch.equal(found.isfinite(), F.linear(x, weight).isfinite())


@pytest.mark.parametrize("tokens", [1, 13])
def test_denormal_numbers(tokens: int) -> None:
    x, weight = torch.full((tokens, 64), 1e-41), torch.full((16, 64), 2.0)
    for name in native.instruction_sets():
        native.choose(name)
        assert torch.equal(ops.norm_linear(x, weight), F.linear(x, weight))


def _layer(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, hidden: int, inner: int, after: bool, together: bool
) -> LayerWeights:
    """Random weights: with norms after attention and MLP, and with norms over all heads, if wanted."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).mul(shape[-1] ** -0.5).to(dtype)

    return LayerWeights(
        q=random(heads * head_dim, hidden),
        k=random(kv_heads * head_dim, hidden),
        v=random(kv_heads * head_dim, hidden),
        output=random(hidden, heads * head_dim),
        gate=random(inner, hidden),
        up=random(inner, hidden),
        down=random(hidden, inner),
        q_bias=random(heads * head_dim) if inner % 2 else None,
        attention_gain=random(hidden),
        attention_after=random(hidden) if after else None,
        mlp_after=random(hidden) if after else None,
        q_gain=random(heads * head_dim if together else head_dim),
        k_gain=random(kv_heads * head_dim if together else head_dim),
    )


# A norm of what is almost zero, as an MLP of one channel may be, enlarges rounding errors by up to eps ** -0.5.
LARGE_EPS = 1e-2


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 30),
    groups=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    head_dim=st.sampled_from([16, 64, 80, 128, 256]),
    hidden=st.integers(1, 6).map(lambda n: 16 * n),
    inner=st.integers(1, 120),
    norms=st.sampled_from(["before", "after", "before and after"]),
    together=st.booleans(),
    gain_offset=st.sampled_from([0.0, 1.0]),
    instruction_set=st.sampled_from(native.instruction_sets() or [""]),
)
def test_the_parts_of_a_layer(
    tokens: int,
    groups: tuple[int, int],
    head_dim: int,
    hidden: int,
    inner: int,
    norms: str,
    together: bool,
    gain_offset: float,
    instruction_set: str,
) -> None:
    native.choose(instruction_set)
    torch.manual_seed(0)
    kv_heads, heads = groups[0], groups[0] * groups[1]
    weights = _layer(torch.float32, heads, kv_heads, head_dim, hidden, inner, "after" in norms, together)
    before = "before" in norms
    shared = LayerSettings(
        heads,
        kv_heads,
        head_dim,
        "silu",
        LARGE_EPS,
        1e-6,
        head_dim**-0.5,
        0.7,
        norm_before=before,
        norm_all_heads=together,
        gain_offset=gain_offset,
    )
    x, angles = torch.randn(tokens, hidden), torch.randn(tokens, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    given = [getattr(weights, name) for name in ops.ATTENTION_INPUTS]
    projected = ops.attention_inputs(
        x, cos, sin, given, heads, kv_heads, LARGE_EPS, 1e-6, True, before, together, gain_offset
    )
    q, k, v = projected.view(tokens, -1, head_dim).transpose(0, 1).split([heads, kv_heads, kv_heads])
    attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    rest = [getattr(weights, name) for name in ops.AFTER_ATTENTION]
    attended = attended.transpose(0, 1).reshape(tokens, -1)
    found = ops.after_attention(x, attended, rest, "silu", LARGE_EPS, 0.7, before, gain_offset)
    doubles = {name: value.double() for name, value in vars(weights).items() if isinstance(value, Tensor)}
    exact = decoder_layer(x[None].double(), cos.double(), sin.double(), LayerWeights(**doubles), shared)[0]
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_operators_are_what_torch_expects() -> None:
    """Schemas, fake implementations, and that no argument is written to."""
    weights = _layer(torch.float32, 4, 2, 16, 32, 40, after=True, together=False)
    x, table = torch.randn(5, 32), torch.randn(5, 8)
    inputs = [getattr(weights, name) for name in ops.ATTENTION_INPUTS]
    rest = [getattr(weights, name) for name in ops.AFTER_ATTENTION]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (ops.norm_linear, (x, weights.q, None, weights.attention_gain, 1e-5)),
        (ops.attention_inputs, (x, table, table, inputs, 4, 2, 1e-5, 1e-6, True)),
        (ops.after_attention, (x, torch.randn(5, 64), rest, "silu", 1e-5, 1.0)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=tests)
