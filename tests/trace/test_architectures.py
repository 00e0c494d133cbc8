"""Plans of known architectures, from their configs alone."""

import collections
import json
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoConfig

import flashnorm
import tiny
from architectures import families
from flashnorm.errors import InputError
from flashnorm.plan import Kind
from flashnorm.trace.build import meta_model

QWEN3_8B = {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


def by_kind(names: list[str]) -> dict[str, int]:
    return dict(collections.Counter(name.removesuffix(".weight").rpartition(".")[2] for name in names))


def test_qwen3_8b() -> None:
    plan = flashnorm.plan(AutoConfig.for_model("qwen3", **QWEN3_8B))
    assert by_kind([fold.norm for fold in plan.folds]) == {
        "input_layernorm": 36,
        "post_attention_layernorm": 36,
        "norm": 1,
    }
    assert by_kind(list(plan.kept)) == {"q_norm": 36, "k_norm": 36}
    kept = plan.kept["model.layers.7.self_attn.q_norm.weight"]
    assert (kept.reason, kept.operator) == ("it adds channels that carry different elements of the gain", "aten.add")
    assert kept.where is not None
    assert kept.where.startswith("model.layers.7.self_attn (modeling_qwen3.py:")
    linears = {fold.norm: [linear.name for linear in fold.linears] for fold in plan.folds}
    assert linears["model.layers.3.input_layernorm.weight"] == [
        f"model.layers.3.self_attn.{name}_proj.weight" for name in "qkv"
    ]
    assert linears["model.norm.weight"] == ["lm_head.weight"]
    assert all(linear.axis == 1 and not linear.segments for fold in plan.folds for linear in fold.linears)


def test_a_tied_head_keeps_its_norm_unless_untied() -> None:
    config = tiny.config("qwen3", tie_word_embeddings=True)
    plan = flashnorm.plan(config)
    assert "tied" in plan.kept["model.norm.weight"].reason
    assert plan.kept["model.norm.weight"].operator == "aten.embedding"
    untied = flashnorm.plan(config, untie=True)
    assert untied.folds[-1].norm == "model.norm.weight"
    assert [linear.name for linear in untied.folds[-1].linears] == ["lm_head.weight"]
    assert config.tie_word_embeddings  # the caller's config is as it was


def test_a_head_that_is_tied_whatever_the_config_says_cannot_be_untied() -> None:
    with pytest.raises(InputError, match="udop, which ties it"):
        flashnorm.plan(AutoConfig.for_model("udop"), untie=True)


def test_a_model_that_computes_something_else_with_an_untied_head_is_not_untied() -> None:
    config = families.tiny("seq2seq", "switch_transformers")  # it scales what goes into a tied head
    assert config.tie_word_embeddings
    with pytest.raises(InputError, match=r"computes the same .* switch_transformers does not \(aten.mul"):
        flashnorm.plan(config, untie=True)


# Kind of norm -> how it is expected to end, for two layers of each architecture.
EXPECTED = {
    "llama": ({"input_layernorm": 2, "post_attention_layernorm": 2, "norm": 1}, {}, 0.0),
    "phi3": ({"input_layernorm": 2, "post_attention_layernorm": 2, "norm": 1}, {}, 0.0),
    "granite": ({"input_layernorm": 2, "post_attention_layernorm": 2, "norm": 1}, {}, 0.0),
    "mixtral": ({"input_layernorm": 2, "post_attention_layernorm": 2, "norm": 1}, {}, 0.0),
    "gpt_oss": ({"input_layernorm": 2, "post_attention_layernorm": 2, "norm": 1}, {}, 0.0),
    "gemma": ({"input_layernorm": 2, "post_attention_layernorm": 2}, {"norm": 1}, 1.0),
    # The post-norms go into the residual stream.
    "gemma2": (
        {"input_layernorm": 2, "pre_feedforward_layernorm": 2},
        {"post_attention_layernorm": 2, "post_feedforward_layernorm": 2, "norm": 1},
        1.0,
    ),
    "olmo2": (
        {"norm": 1},
        {"q_norm": 2, "k_norm": 2, "post_attention_layernorm": 2, "post_feedforward_layernorm": 2},
        0.0,
    ),
    # One norm feeds attention and feed-forward; the head is tied.
    "cohere2": ({"input_layernorm": 2}, {"norm": 1}, 0.0),
    # MLA: the latents' norms fold as well.
    "deepseek_v3": (
        {"input_layernorm": 2, "q_a_layernorm": 2, "kv_a_layernorm": 2, "post_attention_layernorm": 2, "norm": 1},
        {},
        0.0,
    ),
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_architecture(model_type: str) -> None:
    sizes = {} if model_type == "deepseek_v3" else tiny.SIZES
    plan = flashnorm.plan(AutoConfig.for_model(model_type, **(sizes | {"num_hidden_layers": 2})))
    folded, kept, offset = EXPECTED[model_type]
    assert by_kind([fold.norm for fold in plan.folds]) == folded
    assert by_kind(list(plan.kept)) == kept
    assert not any(kept.kind is Kind.UNKNOWN for kept in plan.kept.values())
    assert {fold.offset for fold in plan.folds} == {offset}


def test_experts_and_router_take_the_gain_along_their_own_axes() -> None:
    plan = flashnorm.plan(tiny.config("gpt_oss", **tiny.EXPERTS))
    fold = next(fold for fold in plan.folds if fold.norm == "model.layers.0.post_attention_layernorm.weight")
    assert {linear.name.removeprefix("model.layers.0.mlp."): linear.axis for linear in fold.linears} == {
        "router.weight": 1,
        "experts.gate_up_proj": 1,  # stored transposed
    }


def test_a_gain_per_head_is_repeated_over_the_heads() -> None:
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    plan = flashnorm.plan(config)
    fold = next(fold for fold in plan.folds if fold.norm == "model.layers.0.linear_attn.norm.weight")
    (linear,) = fold.linears
    heads, size = config.linear_num_value_heads, config.linear_value_head_dim
    assert linear.segments == tuple((head * size, 0, size) for head in range(heads))


def test_a_model_in_memory_has_the_plan_of_its_config() -> None:
    config = tiny.config("qwen3")
    model = tiny.model(config).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert flashnorm.plan(model) == flashnorm.plan(config)
    assert model.training
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    with pytest.raises(InputError, match="from_the_future"):
        flashnorm.plan(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        flashnorm.plan(tmp_path)


def test_a_module_needs_example_inputs() -> None:
    with pytest.raises(InputError, match="example_inputs"):
        flashnorm.plan(nn.Linear(2, 2))


def test_a_forward_that_fails_on_meta_says_so() -> None:
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("no such luck")

    with pytest.raises(InputError, match=r"Fails.*no such luck"):
        flashnorm.plan(Fails(), (None,))


def test_meta_models_hold_no_memory() -> None:
    model = meta_model(AutoConfig.for_model("qwen3", **QWEN3_8B))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_sizes_that_code_computes_from_its_own_numbers() -> None:
    """Mimi holds the strides of its convolutions in buffers, and pads by what it computes from them."""
    plan = flashnorm.plan(families.tiny("plain", "mimi_encoder"))
    assert len(plan.folds) == plan.norms == 4
    assert plan == flashnorm.plan(families.build("plain", "mimi_encoder"))
