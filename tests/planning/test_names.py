"""Plans in the names of stored tensors: what is folded by those names, in a real checkpoint, gives the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter, revert_weight_conversion

import flashnorm
import tiny
from architectures import families
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.planning.names import StoredNames, tensor_plan
from flashnorm.planning.planned import plan_checkpoint
from flashnorm.planning.tensors import BiasFold, GainUse, ShiftUse, TensorFold
from flashnorm.trace.build import meta_model


def test_experts_that_the_module_stacks_are_named_one_by_one() -> None:
    model = meta_model(tiny.config("qwen3_moe", **tiny.EXPERTS))
    names = tensor_plan(flashnorm.plan(model), StoredNames(model, ()))
    norm = "model.layers.1.post_attention_layernorm.weight"
    folded = {name for name, fold in names.folds.items() if fold.gains[0].norm == norm}
    experts = {f"model.layers.1.mlp.experts.{i}.{part}_proj.weight" for i in range(4) for part in ("gate", "up")}
    assert folded == experts | {"model.layers.1.mlp.gate.weight"}
    assert all(fold.axis == 1 and not fold.gains[0].segments for fold in names.folds.values())


def test_experts_that_the_file_stacks_too_are_taken_as_they_are() -> None:
    model = meta_model(tiny.config("qwen3_moe", **tiny.EXPERTS))
    names = tensor_plan(flashnorm.plan(model), StoredNames(model, [name for name, _ in model.named_parameters()]))
    assert names.folds["model.layers.1.mlp.experts.gate_up_proj"].axis == 2


def test_names_that_transformers_renames() -> None:
    model = meta_model(tiny.config("mixtral", **tiny.EXPERTS))
    names = tensor_plan(flashnorm.plan(model), StoredNames(model, ()))
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names.folds
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" not in names.folds


@pytest.mark.parametrize(("strip", "add"), [("model.", ""), ("", "model.")])
def test_a_checkpoint_without_the_base_models_prefix(strip: str, add: str) -> None:
    model = meta_model(tiny.config("llama"))
    tensors = [add + name.removeprefix(strip) for name, _ in model.named_parameters() if name != "lm_head.weight"]
    names = tensor_plan(flashnorm.plan(model), StoredNames(model, tensors))
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
    names = tensor_plan(flashnorm.plan(model), StoredNames(model, tensors))
    assert names.norms.keys() | names.folds.keys() <= set(tensors) | {"lm_head.weight"}


def test_an_untied_head_copies_what_is_stored() -> None:
    config = tiny.config("qwen3", tie_word_embeddings=True)
    model = meta_model(config, untie=True)
    stored = [name for name, _ in meta_model(config).named_parameters()]
    names = tensor_plan(
        flashnorm.plan(model), StoredNames(model, stored), {"lm_head.weight": "model.embed_tokens.weight"}
    )
    assert names.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert names.folds["lm_head.weight"].gains[0].norm == "model.norm.weight"


def test_weights_that_the_code_does_not_read_keep_the_norm_before_the_head(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", tiny.model(tiny.config("llama")))
    file = folder / "model.safetensors"
    plan = plan_checkpoint(Checkpoint.open(folder)).plan
    assert "model.norm.weight" in {fold.norm for fold in plan.folds}
    # A buffer of old checkpoints is no reason; a prediction head that may share the output weight is.
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file, {"format": "pt"})
    plan = plan_checkpoint(Checkpoint.open(folder)).plan
    assert "model.norm.weight" in {fold.norm for fold in plan.folds}
    save_file(load_file(file) | {"mtp.layers.0.eh_proj.weight": torch.ones(8, 16)}, file, {"format": "pt"})
    planned = plan_checkpoint(Checkpoint.open(folder))
    plan, tensors = planned.plan, planned.tensors
    assert "mtp.layers.0.eh_proj.weight" in plan.kept["model.norm.weight"].reason
    assert "model.norm.weight" not in tensors.norms
    assert "lm_head.weight" not in tensors.folds
    assert len(plan.folds) == 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, 1, 8, 8).tril(),
        torch.ones(8, 8, dtype=torch.bool).tril(),
        torch.arange(8)[None],
        torch.ones(1, 1),
        torch.ones(8),
    ],
    ids=["causal mask", "of bool", "positions", "scale", "one axis"],
)
def test_what_is_stored_besides_weights_keeps_no_norm(tmp_path: Path, tensor: torch.Tensor) -> None:
    folder = tiny.save(tmp_path / "model", tiny.model(tiny.config("llama")))
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.extra": tensor.contiguous()}, file, {"format": "pt"})
    assert not plan_checkpoint(Checkpoint.open(folder)).plan.kept


@pytest.mark.parametrize("shape", [(8, 8), (1, 8), (2, 4, 4)])
def test_what_may_be_weights_keeps_the_final_norm(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A value head of one output reads the final norm, too."""
    folder = tiny.save(tmp_path / "model", tiny.model(tiny.config("llama")))
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"v_head.weight": torch.rand(shape)}, file, {"format": "pt"})
    assert [*plan_checkpoint(Checkpoint.open(folder)).plan.kept] == ["model.norm.weight"]


def test_unread_names() -> None:
    model = meta_model(tiny.config("llama"))
    stored = [name for name, _ in model.named_parameters()]
    assert StoredNames(model, [*stored, "extra.weight"]).unread() == ["extra.weight"]


def _joined(model: PreTrainedModel, parts: list[str], dim: int = 0) -> None:
    """From now on, checkpoints of this model store these weights (and their biases) as one tensor, `joined`."""
    converter = WeightConverter(source_patterns="joined", target_patterns=parts, operations=[Chunk(dim=dim)])
    model._weight_conversions = [converter]


def test_weights_that_are_stored_as_one_tensor_take_the_gain_once() -> None:
    model = meta_model(tiny.config("llama"))
    _joined(model, ["q_proj", "k_proj", "v_proj"])
    names = tensor_plan(flashnorm.plan(model), StoredNames(model, ()))
    tensor, norm = "model.layers.1.self_attn.joined.weight", "model.layers.1.input_layernorm.weight"
    assert names.folds[tensor] == TensorFold(1, (GainUse(norm, 0.0),))
    assert names.shapes[tensor] == (64 + 32 + 32, 64)
    assert not any("q_proj" in name for name in names.folds)
    stored = StoredNames(model, names.shapes)
    assert not stored.absent()
    assert not stored.unread()
    assert StoredNames(model, [*names.shapes.keys() - {tensor}]).absent() == [tensor]


def test_what_is_stored_apart_is_taken_as_it_is_even_so() -> None:
    model = meta_model(tiny.config("llama"))
    _joined(model, ["q_proj", "k_proj", "v_proj"])
    names = tensor_plan(flashnorm.plan(model), StoredNames(model, [name for name, _ in model.named_parameters()]))
    assert {"q_proj", "k_proj", "v_proj"} <= {name.split(".")[-2] for name in names.folds}
    assert not any("joined" in name for name in names.folds)


def test_biases_that_are_stored_as_one_tensor_take_the_norms_bias_once() -> None:
    model = meta_model(tiny.config("opt", ffn_dim=96, do_layer_norm_before=True, word_embed_proj_dim=64))
    _joined(model, ["q_proj", "k_proj", "v_proj"])
    names = tensor_plan(flashnorm.plan(model), StoredNames(model, ()))
    layer = "model.decoder.layers.1.self_attn"
    shift = ShiftUse(f"{layer}_layer_norm.bias")
    assert names.biases[f"{layer}.joined.bias"] == BiasFold(f"{layer}.joined.weight", 1, (shift,))


def test_columns_of_a_joined_tensor_take_the_gain_alone() -> None:
    model = meta_model(tiny.config("llama"))
    _joined(model, ["o_proj", "q_proj"], dim=1)
    fold = tensor_plan(flashnorm.plan(model), StoredNames(model, ())).folds["model.layers.0.self_attn.joined.weight"]
    assert fold == TensorFold(1, (GainUse("model.layers.0.input_layernorm.weight", 0.0, ((64, 0, 64),)),))


def test_a_part_that_does_not_take_the_gain_is_not_multiplied() -> None:
    model = meta_model(tiny.config("llama"))
    _joined(model, ["o_proj", "q_proj"])
    with pytest.raises(InputError, match=r"expected all of .*joined.weight .*o_proj.weight does not"):
        tensor_plan(flashnorm.plan(model), StoredNames(model, ()))


def test_a_parameter_that_is_stored_in_two_places_of_one_tensor_is_refused() -> None:
    class Twice(Chunk):
        reverse_op = property(lambda self: _Twice())

    class _Twice(Concatenate):
        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            tensor = super().convert(input_dict, *args, **kwargs)
            return {name: torch.cat(one.chunk(2, 1)[::-1], 1) for name, one in tensor.items()}

    model = meta_model(tiny.config("llama"))
    model._weight_conversions = [
        WeightConverter(source_patterns="swapped", target_patterns="q_proj", operations=[Twice()])
    ]
    with pytest.raises(InputError, match=r"q_proj.weight, found that transformers hides it"):
        tensor_plan(flashnorm.plan(model), StoredNames(model, ()))


@pytest.mark.slow
def test_names_of_norms_that_old_releases_stored(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", tiny.model(tiny.config("bert"), torch.float32))
    folded = len(flashnorm.plan(folder).folds)
    assert folded
    file, old = (
        folder / "model.safetensors",
        {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
    )
    stored = load_file(file)
    for new, former in old.items():
        stored = {name.replace(new, former): tensor for name, tensor in stored.items()}
    save_file(stored, file, {"format": "pt"})
    result = flashnorm.convert(folder, tmp_path / "out", verify=True)
    assert result.norms == folded
    assert any(name.endswith("gamma") for name in load_file(tmp_path / "out" / "model.safetensors"))
    flashnorm.load(tmp_path / "out")
