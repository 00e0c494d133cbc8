"""The proof by numbers says what is known of models whose symmetries are known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import flashnorm
import tiny
from architectures.proof import Proof, prove
from flashnorm.plan import FoldPlan, Kept, Linear
from flashnorm.trace.solve import segments_of

CHANNELS = 8
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def logits(model: PreTrainedModel, seed: int) -> Tensor:
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    ids = torch.randint(0, tiny.SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, use_cache=False).logits


def keep_all(plan: FoldPlan) -> FoldPlan:
    return plan.keep({fold.norm: Kept("to see that it could be folded") for fold in plan.folds})


# --- models of transformers: what folds is possible, with the weights of the plan; what does not is not


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "overrides", "impossible"),
    [
        ("llama", {"tie_word_embeddings": False}, set()),
        ("llama", {"tie_word_embeddings": True}, {"model.norm.weight"}),
        ("qwen3", {}, {"q_norm.weight", "k_norm.weight"}),
        ("gemma2", {}, {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight", "model.norm.weight"}),
        (
            "olmo2",
            {},
            {"q_norm.weight", "k_norm.weight", "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"},
        ),
        ("mixtral", tiny.EXPERTS, set()),
        ("deepseek_v3", tiny.EXPERTS | LATENT, set()),
        ("stablelm", {}, set()),
        ("gpt2", {}, {"transformer.ln_f.weight"}),
    ],
)
def test_agrees_with_the_plan(model_type: str, overrides: dict[str, object], impossible: set[str]) -> None:
    model = tiny.model(tiny.config(model_type, **overrides), torch.float64)
    plan = flashnorm.plan(model)
    proofs = prove(model, keep_all(plan), logits)

    assert {proofs[norm].verdict for norm in plan.kept} <= {"impossible"}
    assert all(any(norm.endswith(name) for name in impossible) for norm in plan.kept)
    assert all(any(norm.endswith(name) for norm in plan.kept) for name in impossible)
    for fold in plan.folds:
        proof = proofs[fold.norm]
        assert proof.verdict == "possible", proof
        assert slices(proof.into) == slices(fold.linears)
        assert f"gain {fold.offset:g} + w" in proof.note


def slices(linears: tuple[Linear, ...]) -> set[tuple[object, ...]]:
    return {(linear.name, linear.axis, linear.segments) for linear in linears}


# --- models made by hand: every verdict, every kind of slices


class Toy(nn.Module):
    """A gain on something normalised, and what is made of it."""

    def __init__(self, rest: Callable[["Toy", Tensor, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rest = rest
        for name, shape in {"gain": (CHANNELS,), **shapes}.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values))

    def normalised(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self, self.gain * self.normalised(x), x)


def judge(rest: Callable[[Toy, Tensor, Tensor], Tensor], **shapes: tuple[int, ...]) -> Proof:
    toy = Toy(rest, **shapes)
    before = {name: parameter.detach().clone() for name, parameter in toy.named_parameters()}

    def run(model: nn.Module, seed: int) -> Tensor:
        return model(torch.randn(7, CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    proof = prove(toy, FoldPlan("toy", kept={"gain": Kept("to be seen")}), run)["gain"]  # type: ignore[arg-type]
    assert all(torch.equal(parameter, before[name]) for name, parameter in toy.named_parameters())
    return proof


def test_finds_a_gain_that_is_repeated() -> None:
    proof = judge(lambda toy, y, x: torch.cat([y, x, y], dim=-1) @ toy.a, a=(3 * CHANNELS, 5))
    assert proof.verdict == "possible"
    assert proof.into == (Linear("a", 0, ((0, 0, CHANNELS), (2 * CHANNELS, 0, CHANNELS))),)


def test_finds_groups_of_equal_channels() -> None:
    proof = judge(lambda toy, y, x: y.repeat_interleave(2, dim=-1) @ toy.a, a=(2 * CHANNELS, 5))
    assert proof.into == (Linear("a", 0, segments_of(torch.arange(CHANNELS).repeat_interleave(2), CHANNELS)),)


def test_finds_weights_that_share_a_gain() -> None:
    half = CHANNELS // 2
    proof = judge(lambda toy, y, x: y[:, :half] @ toy.a + (y[:, half:] @ toy.b).tanh(), a=(half, 5), b=(half, 5))
    assert proof.verdict == "possible"
    assert proof.into == (Linear("a", 0, ((0, 0, half),)), Linear("b", 0, ((0, half, half),)))


def test_finds_one_of_two_places() -> None:
    """Either weight may take it: the rows of one, or the columns of the other."""
    proof = judge(lambda toy, y, x: (y * (x @ toy.a)) @ toy.b, a=(CHANNELS, CHANNELS), b=(CHANNELS, 5))
    assert proof.verdict == "possible"
    assert len(proof.into) == 1


def test_a_residual_is_impossible() -> None:
    assert judge(lambda toy, y, x: y + (y @ toy.a).tanh(), a=(CHANNELS, CHANNELS)).verdict == "impossible"


def test_the_same_weight_elsewhere_is_impossible() -> None:
    proof = judge(lambda toy, y, x: (y @ toy.a).tanh() + x @ toy.a, a=(CHANNELS, 5))
    assert proof.verdict == "impossible"
    assert not proof.vectors


def test_another_gain_is_no_weight() -> None:
    proof = judge(lambda toy, y, x: (y * toy.other * x.tanh()).sum(-1), other=(CHANNELS,))
    assert proof.verdict == "impossible"
    assert proof.vectors == ("other",)


def test_division_is_told_apart() -> None:
    proof = judge(lambda toy, y, x: (y + toy.table[:7]) @ toy.a, table=(9, CHANNELS), a=(CHANNELS, 5))
    assert proof.verdict == "possible by division"
    assert (proof.into, proof.divided) == ((Linear("a", 0),), (Linear("table", 1),))


def test_no_effect() -> None:
    assert judge(lambda toy, y, x: x @ toy.a, a=(CHANNELS, 5)).verdict == "no effect"


class OnZeros(nn.Module):
    """A norm of zeros, of which only the bias is left."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(torch.zeros_like(x)) + x)


def test_a_gain_of_zeros_has_no_effect_whatever_its_bias_does() -> None:
    kept = FoldPlan("zeros", kept={"norm.weight": Kept("to be seen")})
    proof = prove(OnZeros(), kept, lambda model, seed: model(torch.ones(7, CHANNELS).double()))["norm.weight"]  # type: ignore[arg-type]
    assert proof.verdict == "no effect"


def test_what_passes_positive_numbers_only_takes_magnitudes() -> None:
    proof = judge(lambda toy, y, x: y.relu() @ toy.a, a=(CHANNELS, 5))
    assert proof.verdict == "possible up to signs"
    assert proof.into == (Linear("a", 0),)


def test_magnitudes_alone_are_no_excuse() -> None:
    assert judge(lambda toy, y, x: y.relu() @ toy.a - (-y).relu() @ toy.a, a=(CHANNELS, 5)).verdict == "possible"
    assert judge(lambda toy, y, x: y.relu() + x @ toy.a, a=(CHANNELS, CHANNELS)).verdict == "impossible"


@pytest.mark.parametrize("hide", [lambda y: y, Tensor.detach, torch.no_grad()(lambda y: y * 1)])
def test_choices_are_seen(hide: Callable[[Tensor], Tensor]) -> None:
    def chosen(toy: Toy, y: Tensor, x: Tensor) -> Tensor:
        return x * toy.table[(hide(y) @ toy.a).topk(1).indices[:, 0]]

    proof = judge(chosen, a=(CHANNELS, 5), table=(5, CHANNELS))
    assert proof.verdict == "possible"
    assert proof.into == (Linear("a", 0),)


def test_what_autograd_cannot_see_is_undecided() -> None:
    proof = judge(lambda toy, y, x: (y @ toy.a) * (x @ toy.b).sum().item(), a=(CHANNELS, 5), b=(CHANNELS, 5))
    assert proof.verdict == "undecided"
    assert "gradients say" in proof.note


def test_a_backward_of_its_own_does_not_count() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return 3 * grad * ctx.saved_tensors[0].sign()

    assert judge(lambda toy, y, x: Doubled.apply(y) @ toy.a, a=(CHANNELS, 5)).verdict == "possible"
    assert judge(lambda toy, y, x: Doubled.apply(y) + y.tanh() @ toy.a, a=(CHANNELS, 8)).verdict == "impossible"


def test_a_kink_that_a_difference_steps_over_is_no_contradiction() -> None:
    edges: list[float] = []

    def kinked(toy: Toy, y: Tensor, x: Tensor) -> Tensor:
        edges.extend([] if edges else (toy.kink * (1 + 3e-7)).tolist())
        return y @ toy.a + 1e3 * (toy.kink - torch.tensor(edges)).relu().sum()

    assert judge(kinked, a=(CHANNELS, 5), kink=(1,)).verdict == "possible"


def test_values_that_are_changed_in_place() -> None:
    def accumulated(toy: Toy, y: Tensor, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for row in range(len(x)):
            state[row] = y[row] * x[row].tanh()
            state[0] = state[0].clone() * state[row]
        return state @ toy.a

    assert judge(accumulated, a=(CHANNELS, 5)).verdict == "impossible"
