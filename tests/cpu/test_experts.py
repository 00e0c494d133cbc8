"""Mixtures of experts on the fused kernels: which way runs, how experts are chosen, and what is refused."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import flashnorm
from decoders import SIZES, build, error, generate, in_float64, logits, text
from flashnorm.cpu import ops
from flashnorm.cpu.fused import FusedDecoder
from flashnorm.cpu.kernels import native
from flashnorm.cpu.optimize import optimize_if_supported
from flashnorm.decoding import guard
from flashnorm.decoding.formula import read_decoder

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")

MIXTURES = ["mixtral", "qwen3_moe, one layer dense", "qwen2_moe, one layer dense", "olmoe", "flex_olmo"]
IDS = text(20)[None]


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What was logged in this test, as if nothing had been before."""
    monkeypatch.setattr(guard, "_said", set())
    caplog.set_level(logging.WARNING, "flashnorm")
    return caplog


@pytest.fixture(autouse=True)
def _best_instruction_set() -> Any:
    yield
    native.choose(native.instruction_sets()[-1])


@pytest.mark.parametrize("name", MIXTURES)
def test_which_way_runs(name: str, said: pytest.LogCaptureFixture) -> None:
    plain, model = build(name), flashnorm.optimize(build(name))
    native.runs.clear()
    assert torch.equal(generate(model), generate(plain))
    assert native.runs == {native.ALL: 24}  # the prompt and 23 steps
    native.runs.clear()
    with torch.no_grad():
        assert error(model(IDS).logits, plain(IDS).logits) <= 1e-5
    assert native.runs == {native.ATTENTION_INPUTS: 3, native.AFTER_ATTENTION: 3}
    assert not said.records
    assert flashnorm.status(model).in_words == "on the fused kernels"


# --- what a layer computes


def after_attention(
    x: Tensor, attended: Tensor, w: dict[str, Tensor | None], count: int, renormalises: bool, gain_offset: float = 0.0
) -> Tensor:
    weights = [w.get(name) for name in ops.AFTER_ATTENTION]
    return ops.after_attention(x, attended, weights, "silu", 1e-5, 0.7, True, gain_offset, count, renormalises)


def exactly(
    x: Tensor, attended: Tensor, weights: dict[str, Tensor | None], count: int, renormalises: bool, offset: float = 0.0
) -> Tensor:
    """As models are written, in float64."""
    w: Any = {name: None if weight is None else weight.double() for name, weight in weights.items()}
    x = x.double() + 0.7 * attended.double() @ w["output"].T
    read = F.rms_norm(x, x.shape[-1:], w["mlp_gain"] + offset, 1e-5)
    each, chosen = (read @ w["router"].T).softmax(-1).topk(count)
    each = each / each.sum(-1, keepdim=True) if renormalises else each
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for weight, expert in zip(each[t], chosen[t], strict=True):
            gate, up = (w["experts_in"][expert] @ read[t]).chunk(2)
            y[t] += weight * (w["experts_out"][expert] @ (F.silu(gate) * up))
    if w.get("gate") is not None:
        shared = (F.silu(read @ w["gate"].T) * (read @ w["up"].T)) @ w["down"].T
        y += shared if w.get("shared_gate") is None else torch.sigmoid(read @ w["shared_gate"].T) * shared
    if w.get("mlp_after") is not None:
        y = F.rms_norm(y, y.shape[-1:], w["mlp_after"] + offset, 1e-5)
    return x + 0.7 * y


def mixture(
    hidden: int, inner: int, experts: int, dtype: torch.dtype = torch.float32, shared: int = 0, gated: bool = False
) -> dict[str, Tensor | None]:
    """Random weights, as `after_attention` takes them; `shared` is the size of an MLP beside the experts."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).mul(shape[-1] ** -0.5).to(dtype)

    found: dict[str, Tensor | None] = {
        "output": random(hidden, 32),
        "mlp_gain": torch.randn(hidden).to(dtype),
        "router": 4 * random(experts, hidden),
        "experts_in": random(experts, 2 * inner, hidden),
        "experts_out": random(experts, hidden, inner),
    }
    if shared:
        found |= {"gate": random(shared, hidden), "up": random(shared, hidden), "down": random(hidden, shared)}
    return found | {"shared_gate": random(1, hidden)} if gated and shared else found


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 60),
    hidden=st.integers(1, 6).map(lambda n: 16 * n),
    inner=st.integers(1, 60),
    experts=st.integers(1, 20),
    share=st.floats(0, 1),
    renormalises=st.booleans(),
    shared=st.sampled_from([0, 24, 70]),
    gated=st.booleans(),
    after=st.booleans(),
    gain_offset=st.sampled_from([0.0, 1.0]),
    dtype=st.sampled_from(list(native.DTYPES)),
    instruction_set=st.sampled_from(native.instruction_sets() or [""]),
    seed=st.integers(0, 99),
)
def test_experts(
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    share: float,
    renormalises: bool,
    shared: int,
    gated: bool,
    after: bool,
    gain_offset: float,
    dtype: torch.dtype,
    instruction_set: str,
    seed: int,
) -> None:
    native.choose(instruction_set)
    torch.manual_seed(seed)
    count = max(1, round(share * experts))
    w = mixture(hidden, inner, experts, dtype, shared, gated)
    x, attended = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, 32).to(dtype)
    if after:
        w["mlp_after"] = torch.randn(hidden).to(dtype)
    found = after_attention(x, attended, w, count, renormalises, gain_offset)
    expected = exactly(x, attended, w, count, renormalises, gain_offset)
    # A norm of what is nearly zero enlarges rounding, as it does in any order of sums.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * (50 if after else 1)
    assert error(found, expected) <= tolerance


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_all_tokens_on_two_experts_and_none_on_the_others(tokens: int) -> None:
    torch.manual_seed(0)
    w: Any = mixture(64, 40, 7)
    x, attended = torch.randn(tokens, 64), torch.randn(tokens, 32)
    x[:, 0] = 30
    w["mlp_gain"][0] = 1
    w["router"][:, 0] = torch.tensor([-1.0, 2, -1, -1, 2, -1, -1])
    for name in native.instruction_sets():
        native.choose(name)
        found = after_attention(x, attended, w, 2, True)
        assert error(found, exactly(x, attended, w, 2, True)) <= 1e-5
        without = w | {"experts_in": w["experts_in"].clone()}
        without["experts_in"][[0, 2, 3, 5, 6]] = torch.nan  # whose weights are not read
        assert torch.equal(after_attention(x, attended, without, 2, True), found)


@pytest.mark.parametrize("tokens", [1, 4, 5, 70, 400])
def test_the_number_of_threads_changes_no_bit(tokens: int) -> None:
    torch.manual_seed(0)
    w = mixture(112, 72, 10, shared=40, gated=True)
    x, attended = torch.randn(tokens, 112), torch.randn(tokens, 32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(after_attention(x, attended, w, 3, False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_number_of_threads_changes_no_bit_of_a_decoder(name: str) -> None:
    decoder, found = read_decoder(build(name)), []
    for threads in (1, 2, 3):
        fused = FusedDecoder(decoder, threads=threads)
        found.append(torch.cat([fused.extend(text(30), 30), fused.step(text(1))]))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("tokens", [2, 30])
def test_what_is_no_number_stays_in_its_token(tokens: int) -> None:
    torch.manual_seed(0)
    w = mixture(64, 40, 6)
    x, attended = torch.randn(tokens, 64), torch.randn(tokens, 32)
    x[1, 5] = torch.nan
    found = after_attention(x, attended, w, 2, True)
    assert torch.equal(found.isnan().any(-1), torch.arange(tokens) == 1)


def test_of_equal_scores_the_first_are_chosen() -> None:
    torch.manual_seed(0)
    w: Any = mixture(64, 40, 6)
    w["router"].zero_()
    x, attended = torch.randn(9, 64), torch.randn(9, 32)
    found = after_attention(x, attended, w, 3, True)
    first = w | {name: w[name][:3] for name in ("router", "experts_in", "experts_out")}
    assert error(found, exactly(x, attended, first, 3, True)) <= 1e-5


def test_rounding_chooses_another_expert_no_more_often_than_in_transformers() -> None:
    """With few bits a near tie falls either way; then a token is off by much more than by rounding alone."""
    theirs = ours = 0
    for seed in range(4):
        model = build("qwen3_moe, one layer dense", torch.bfloat16)
        generator = torch.Generator().manual_seed(seed)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.weight.data.copy_(torch.randn(9, 64, generator=generator))
        reference = logits(in_float64(model))
        plain, fused = logits(model), FusedDecoder(read_decoder(model)).extend(text(), len(text()))
        theirs, ours = (
            count + int(((found - reference).norm(dim=-1) > 0.05 * reference.norm(dim=-1)).sum())
            for count, found in ((theirs, plain), (ours, fused))
        )
    assert ours < theirs


# --- what a call may ask for


@pytest.mark.parametrize("name", MIXTURES)
def test_router_logits_are_those_of_the_models_own_code(name: str) -> None:
    plain, model = build(name), flashnorm.optimize(build(name))
    for wanted, fused in ((True, 0), (False, 3), (True, 0)):
        native.runs.clear()
        with torch.no_grad():
            found, expected = (one(IDS, labels=IDS, output_router_logits=wanted) for one in (model, plain))
        assert error(found.logits, expected.logits) <= 1e-5
        assert error(found.loss[None], expected.loss[None]) <= 1e-5
        assert native.runs[native.AFTER_ATTENTION] == fused
        assert (found.router_logits is None) == (not wanted)
        for ours, theirs in zip(found.router_logits or (), expected.router_logits or (), strict=True):
            assert error(ours, theirs) <= 1e-5


def test_a_config_that_asks_for_router_logits_changes_no_text() -> None:
    plain, model = build("mixtral", output_router_logits=True), build("mixtral", output_router_logits=True)
    assert optimize_if_supported(model) is None
    native.runs.clear()
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(generate(model, **options), generate(plain, **options))
    assert native.runs == {native.ALL: 24}  # with beams, Transformers' own loop asks each layer for them
    with torch.no_grad():
        assert error(model(IDS).aux_loss[None], plain(IDS).aux_loss[None]) <= 1e-5


# --- what is done to a model after it was optimised


def write_into_an_expert(layer: Any) -> None:
    layer.mlp.experts.down_proj.data[0] *= -3


def replace_the_experts_weights(layer: Any) -> None:
    layer.mlp.experts.gate_up_proj = nn.Parameter(layer.mlp.experts.gate_up_proj.detach().flip(0))


def write_into_the_router(layer: Any) -> None:
    layer.mlp.gate.weight.data *= -1


def choose_more(layer: Any) -> None:
    layer.mlp.gate.top_k = 3


def double_the_outputs(layer: Any) -> None:
    layer.mlp.experts.register_forward_hook(lambda module, args, output: 2 * output)


def shift_the_scores(layer: Any) -> None:
    layer.mlp.gate.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def take_another_activation(layer: Any) -> None:
    layer.mlp.experts.act_fn = nn.ReLU()


def take_another_method(layer: Any) -> None:
    layer.mlp.experts._apply_gate = lambda y: y[..., : y.shape[-1] // 2]


@pytest.mark.parametrize(
    ("change", "is_fused"),
    [
        (write_into_an_expert, True),
        (replace_the_experts_weights, True),
        (write_into_the_router, True),
        (choose_more, False),
        (double_the_outputs, False),
        (shift_the_scores, False),
        (take_another_activation, False),
        (take_another_method, False),
    ],
)
def test_a_change_counts(change: Callable[[Any], None], is_fused: bool) -> None:
    plain, model = build("mixtral"), flashnorm.optimize(build("mixtral"))
    before = generate(model)
    for one in (plain, model):
        change(one.model.layers[1])
    native.runs.clear()
    found = generate(model)
    assert torch.equal(found, generate(plain))
    assert not torch.equal(found, before)
    assert bool(native.runs[native.ALL]) == is_fused
    native.runs.clear()
    with torch.no_grad():
        assert error(model(IDS).logits, plain(IDS).logits) <= 1e-5
    assert native.runs[native.AFTER_ATTENTION] == (3 if is_fused else 2)


def test_a_weight_whose_memory_is_gone_is_no_crash() -> None:
    w = mixture(64, 40, 6)
    x, attended = torch.randn(3, 64), torch.randn(3, 32)
    for name in ("router", "experts_in", "experts_out"):
        weights: Any = w | {name: w[name].clone()}  # type: ignore[union-attr]
        weights[name].untyped_storage().resize_(weights[name].untyped_storage().nbytes() - 4)
        with pytest.raises(ValueError, match="an expert's weight has another size"):
            after_attention(x, attended, weights, 2, True)
    for count in (0, 7):
        with pytest.raises(ValueError, match="more experts than there are"):
            after_attention(x, attended, w, count, True)
    with pytest.raises(ValueError, match="beside the experts has another size"):
        after_attention(x, attended, w | {"shared_gate": torch.randn(1, 64)}, 2, True)


# --- what is refused


def refusal(model: Any) -> str:
    reason = optimize_if_supported(model)
    assert reason is not None
    assert "generate" not in vars(model)
    return str(reason)


@pytest.mark.parametrize("name", ["n_group", "routed_scaling_factor", "limit"])
def test_settings_that_are_not_known_are_refused(name: str) -> None:
    for part in ("gate", "experts"):
        model: Any = build("mixtral")
        setattr(getattr(model.model.layers[2].mlp, part), name, 1)
        assert f"without other settings, found {name}" in refusal(model)


def test_a_bias_of_the_choice_is_refused() -> None:
    model: Any = build("qwen3_moe, one layer dense")
    model.model.layers[0].mlp.gate.register_buffer("e_score_correction_bias", torch.zeros(9))
    assert "without buffers, found gate.e_score_correction_bias" in refusal(model)


def test_biases_of_experts_are_refused() -> None:
    model: Any = build("mixtral")
    model.model.layers[0].mlp.experts.gate_up_proj_bias = nn.Parameter(torch.zeros(5, 208))
    assert "without other weights, found mlp.experts.gate_up_proj_bias" in refusal(model)


class Clipped(nn.Module):
    """What is clipped only where numbers are large."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.clamp(max=30))


def test_a_limit_that_numbers_of_ordinary_size_do_not_reach_is_refused() -> None:
    model: Any = build("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = Clipped()
    assert "computes something else" in refusal(model)
    assert "computes something else" in refusal(build("olmoe", clip_qkv=100.0))


@pytest.mark.parametrize(
    "of_scores", [torch.sigmoid, lambda scores: scores.clamp(-30, 30).softmax(-1)], ids=["sigmoid", "clipped"]
)
def test_other_scores_are_refused(monkeypatch: pytest.MonkeyPatch, of_scores: Callable[[Tensor], Tensor]) -> None:
    model: Any = build("mixtral")
    kind = type(model.model.layers[0].mlp.gate)

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        found, chosen = of_scores(scores).topk(self.top_k)
        return scores, found / found.sum(-1, keepdim=True), chosen

    monkeypatch.setattr(kind, "forward", forward)
    assert "computes something else" in refusal(model)


@pytest.mark.parametrize("kind", ["GptOss", "DeepseekV3", "Ernie4_5_Moe", "Phimoe", "GraniteMoe"])
def test_other_mixtures_run_their_own_code(kind: str) -> None:
    config: Any = getattr(transformers, f"{kind}Config")(**SIZES | {"intermediate_size": 64})
    config.moe_intermediate_size = 32
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert refusal(model).startswith("expected")
