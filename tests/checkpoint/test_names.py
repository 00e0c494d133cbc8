"""Plans in the names of stored tensors: what is folded by those names, in a real checkpoint, gives the same model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

import tiny
from architectures import families
from flashnorm.checkpoint.names import StoredNames, checkpoint_plan
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.planning import plan_checkpoint
from flashnorm.trace.models import meta_model
from flashnorm.trace.planner import plan_of


def test_experts_that_the_module_stacks_are_named_one_by_one() -> None:
    model = meta_model(tiny.config("qwen3_moe", **tiny.EXPERTS))
    names = checkpoint_plan(plan_of(model), model, ())
    norm = "model.layers.1.post_attention_layernorm.weight"
    folded = {name for name, fold in names.folds.items() if fold.gains[0].norm == norm}
    experts = {f"model.layers.1.mlp.experts.{i}.{part}_proj.weight" for i in range(4) for part in ("gate", "up")}
    assert folded == experts | {"model.layers.1.mlp.gate.weight"}
    assert all(fold.axis == 1 and not fold.gains[0].segments for fold in names.folds.values())


def test_experts_that_the_file_stacks_too_are_taken_as_they_are() -> None:
    model = meta_model(tiny.config("qwen3_moe", **tiny.EXPERTS))
    names = checkpoint_plan(plan_of(model), model, [name for name, _ in model.named_parameters()])
    assert names.folds["model.layers.1.mlp.experts.gate_up_proj"].axis == 2


def test_names_that_transformers_renames() -> None:
    model = meta_model(tiny.config("mixtral", **tiny.EXPERTS))
    names = checkpoint_plan(plan_of(model), model, ())
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names.folds
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" not in names.folds


@pytest.mark.parametrize(("strip", "add"), [("model.", ""), ("", "model.")])
def test_a_checkpoint_without_the_base_models_prefix(strip: str, add: str) -> None:
    model = meta_model(tiny.config("llama"))
    tensors = [add + name.removeprefix(strip) for name, _ in model.named_parameters() if name != "lm_head.weight"]
    names = checkpoint_plan(plan_of(model), model, tensors)
    expected = add + "model.layers.0.input_layernorm.weight".removeprefix(strip)
    assert expected in names.norms
    assert names.parameters[expected] == "model.layers.0.input_layernorm.weight"


def test_names_as_transformers_saves_them_decide_about_the_prefix() -> None:
    """Qwen2-VL saves `model.layers...` and `visual...`; the module's own names all begin with `model.`."""
    config = families.tiny("image-text-to-text", "qwen2_vl")
    config.vision_config.depth = 12  # the more of them there are, the more it looks as if a prefix were left out
    model = meta_model(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors = list(revert_weight_conversion(model, state))
    assert {"model.layers.0.input_layernorm.weight", "visual.blocks.0.norm1.weight"} <= set(tensors)
    names = checkpoint_plan(plan_of(model), model, tensors)
    assert names.norms.keys() | names.folds.keys() <= set(tensors) | {"lm_head.weight"}


def test_an_untied_head_copies_what_is_stored() -> None:
    config = tiny.config("qwen3", tie_word_embeddings=True)
    model = meta_model(config, untie=True)
    stored = [name for name, _ in meta_model(config).named_parameters()]
    names = checkpoint_plan(plan_of(model), model, stored, {"lm_head.weight": "model.embed_tokens.weight"})
    assert names.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert names.folds["lm_head.weight"].gains[0].norm == "model.norm.weight"


def test_weights_that_the_code_does_not_read_keep_the_norm_before_the_head(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", tiny.model(tiny.config("llama")))
    file = folder / "model.safetensors"
    plan, _ = plan_checkpoint(Checkpoint.open(folder))
    assert "model.norm.weight" in {fold.norm for fold in plan.folds}
    # A buffer of old checkpoints is no reason; a prediction head that may share the output weight is.
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file, {"format": "pt"})
    plan, _ = plan_checkpoint(Checkpoint.open(folder))
    assert "model.norm.weight" in {fold.norm for fold in plan.folds}
    save_file(load_file(file) | {"mtp.layers.0.eh_proj.weight": torch.ones(8, 16)}, file, {"format": "pt"})
    plan, names = plan_checkpoint(Checkpoint.open(folder))
    assert "mtp.layers.0.eh_proj.weight" in plan.kept["model.norm.weight"].reason
    assert "model.norm.weight" not in names.norms
    assert "lm_head.weight" not in names.folds
    assert len(plan.folds) == 4


def test_unread_names() -> None:
    model = meta_model(tiny.config("llama"))
    stored = [name for name, _ in model.named_parameters()]
    assert StoredNames(model, [*stored, "extra.weight"]).unread() == ["extra.weight"]
