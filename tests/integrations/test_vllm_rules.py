"""What the vLLM plugin decides, without vLLM."""

import json
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import flashnorm
import tiny
from flashnorm.files.reader import Checkpoint
from flashnorm.format import listed_norms
from flashnorm.integrations.vllm import plugin, register, rules
from flashnorm.models.adapters import adapter_refusal, of_ordinary_model
from flashnorm.planning.names import StoredNames
from flashnorm.trace.build import meta_model

LAYER, FINAL = "model.layers.0.input_layernorm.weight", "model.norm.weight"


def test_entry_point() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="flashnorm")
    assert found.load() is register


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.27.1", True), ("0.32.0+cpu", True), ("1.0.0", True), ("0.27.0", False), ("0.11.0", False), ("dev", True)],
)
def test_versions(version: str, fits: bool) -> None:
    why = rules.unsupported(version)
    assert (why is None) == fits
    assert fits or version in str(why)


@pytest.mark.parametrize(
    ("tensor", "parameters", "found"),
    [
        (LAYER, [LAYER, "language_model." + LAYER], LAYER),
        (
            "h.0.ln_1.weight",
            ["transformer.h.0.ln_1.weight", "transformer.h.10.ln_1.weight"],
            "transformer.h.0.ln_1.weight",
        ),
        ("model.norm.weight", ["norm.weight", "layers.0.q_norm.weight"], "norm.weight"),
        ("norm.weight", ["a.norm.weight", "b.norm.weight"], None),
        ("model.norm.weight", ["model.layers.0.norm.weight", "model.q_norm.weight"], None),
    ],
)
def test_names(tensor: str, parameters: list[str], found: str | None) -> None:
    assert rules.parameter_of(tensor, parameters) == found


@pytest.mark.parametrize(
    ("tensor", "elsewhere"),
    [
        (LAYER, True),
        (FINAL, True),
        ("model.layers.10.input_layernorm.weight", False),
        ("model.layers.1.input_layernorm.weight", False),
        ("h.3.ln_1.weight", True),
        ("h.31.ln_1.weight", False),
    ],
)
def test_other_stages_of_a_pipeline(tensor: str, elsewhere: bool) -> None:
    missing = ["model.layers.0.", "model.layers.11.", "model.norm.", "transformer.h.3."]
    assert rules.on_other_stage(tensor, missing) == elsewhere


@pytest.mark.parametrize(
    ("norms", "use", "word"),
    [
        ([LAYER, FINAL], {}, None),
        ([LAYER, FINAL], {"draft": "ngram"}, None),
        ([LAYER, FINAL], {"draft": "draft_model"}, None),
        ([LAYER, FINAL], {"draft": "eagle3"}, "the method eagle3; the gain of model.norm.weight"),
        ([LAYER, FINAL], {"draft": "a method of tomorrow"}, "a method of tomorrow"),
        ([LAYER], {"draft": "mtp"}, None),
        ([LAYER, FINAL], {"runner": "pooling"}, "the gain of model.norm.weight, whose output would be pooled"),
        ([LAYER], {"runner": "pooling"}, None),
        ([LAYER], {"load_format": "tensorizer"}, "--load-format tensorizer"),
        ([LAYER, FINAL], {"centred": True}, None),
        ([LAYER], {"centred": True, "draft": "ngram"}, None),
        ([LAYER], {"centred": True, "draft": "eagle3"}, "the method eagle3; their means, which it would read"),
    ],
)
def test_refusals(norms: list[str], use: dict[str, Any], word: str | None) -> None:
    why = rules.refusal(norms, **({"runner": "generate", "draft": None, "load_format": "auto"} | use))
    assert (why is None) if word is None else word in str(why)


@pytest.mark.parametrize(
    ("passes", "compiled", "quantized", "constant"),
    [
        ({}, True, True, False),
        ({"fuse_norm_quant": True}, True, True, True),
        ({"fuse_norm_quant": True}, True, False, False),
        ({"fuse_norm_quant": True}, False, True, False),
        ({"fuse_allreduce_rms": True}, True, False, True),
        ({"fuse_norm_quant": True, "enable_sp": True}, True, False, True),
        ({"fuse_act_quant": True, "eliminate_noops": True}, True, True, False),
    ],
)
def test_passes_that_need_a_weight(passes: dict[str, bool], compiled: bool, quantized: bool, constant: bool) -> None:
    found = rules.fused_with_weight(SimpleNamespace(**passes), compiled=compiled, quantized=quantized)
    assert found == constant


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"center": True, "untie": True}),
        pytest.param("gemma4_text", {"cancel": "exact"}, marks=pytest.mark.slow),
    ],
)
def test_folders_without_means_or_divisions(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    """vLLM's code computes their norms, of weights of which exactly those of the folded norms are absent."""
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "global_head_dim": 16, "num_kv_shared_layers": 0}
    sizes |= {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
    out = tmp_path / "out"
    flashnorm.convert(tiny.save(tmp_path / "source", tiny.model(tiny.config(model_type, **sizes))), out, **options)
    config = json.loads((out / "config.json").read_text())
    model = SimpleNamespace(model=str(out), hf_config=SimpleNamespace(**config), runner_type="generate")
    listed = plugin._listed(model)
    stored = StoredNames(meta_model(AutoConfig.from_pretrained(out)), Checkpoint.open(out).tensors)
    assert stored.absent() == listed == config["flashnorm"]["weightless"] != []
    engine = SimpleNamespace(model_config=model, load_config=SimpleNamespace(load_format="auto"))
    plugin._check(engine, model, listed)
    engine.speculative_config = SimpleNamespace(method="eagle")
    if "center" in options:
        with pytest.raises(flashnorm.InputError, match="the method eagle; their means, which it would read"):
            plugin._check(engine, model, [])
    else:
        plugin._check(engine, model, [])


def test_adapters(tmp_path: Path) -> None:
    model = str(tmp_path)
    assert adapter_refusal({"base_model_name_or_path": model + "/."}, model) is None
    assert adapter_refusal({"base_model_name_or_path": "a/b"}, "a/b") is None
    assert adapter_refusal({"base_model_name_or_path": "a/b", "flashnorm": True}, model) is None
    assert "'a/b'" in str(adapter_refusal({"base_model_name_or_path": "a/b"}, model))
    assert adapter_refusal({}, model) is not None
    ours, another = "1" * 64, "2" * 64
    for named in (
        {"base_model_name_or_path": "a/b", "flashnorm": True, "flashnorm_plan": ours},
        {"base_model_name_or_path": "a/b#flashnorm-" + ours[:12]},
    ):
        assert adapter_refusal(named, model, ours) is None
        assert adapter_refusal(named, model, None) is None
        assert "other folds" in str(adapter_refusal(named, model, another))


def test_adapters_of_folded_models_on_ordinary_ones() -> None:
    for named in (
        {"base_model_name_or_path": "out", "flashnorm": True},
        {"base_model_name_or_path": "a/b#flashnorm-0123456789ab"},
        {"base_model_name_or_path": "out", "revision": "flashnorm-0123456789ab"},
    ):
        assert "expected an adapter for a/b, which is not folded" in str(of_ordinary_model(named, "a/b"))
    assert of_ordinary_model({"base_model_name_or_path": "a/b", "revision": "main"}, "a/b") is None
    assert of_ordinary_model({"base_model_name_or_path": "flashnorm/flashnorm-of-b"}, "a/b") is None


def test_folded_norms_are_left_out_of_the_weights() -> None:
    weights = {"a": torch.ones(3), "norm": torch.ones(3), "offset": torch.zeros(3)}
    assert dict(rules.without_folded(weights.items(), {"norm": 1.0, "offset": 0.0})).keys() == {"a"}
    with pytest.raises(flashnorm.InputError, match="expected norm at 1"):
        list(rules.without_folded([("norm", torch.tensor([1.0, 2.0]))], {"norm": 1.0}))


@pytest.mark.parametrize(
    "entry", [[], {"version": 4, "weightless": []}, {"version": 1}, {"version": 1, "weightless": [1]}]
)
def test_unreadable_key(entry: Any) -> None:
    with pytest.raises(flashnorm.InputError, match="flashnorm"):
        listed_norms({"flashnorm": entry}, "config.json")
    assert listed_norms({"flash_norm": True}, "config.json") is None


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_absent_tensors(tmp_path: Path, model_type: str) -> None:
    """Of a converted checkpoint exactly the folded norms are absent; of a damaged one what is missing as well."""
    config = tiny.config(model_type, tie_word_embeddings=True)  # the head's own name is absent with the embedding
    flashnorm.convert(tiny.save(tmp_path / "source", tiny.model(config)), tmp_path / "converted")
    checkpoint = Checkpoint.open(tmp_path / "converted")
    listed = json.loads((tmp_path / "converted" / "config.json").read_text())["flashnorm"]["weightless"]
    model = meta_model(config)
    assert StoredNames(model, checkpoint.tensors).absent() == listed
    for gone in checkpoint.tensors:
        left = [name for name in checkpoint.tensors if name != gone]
        assert set(StoredNames(model, left).absent()) - {"lm_head.weight"} == {*listed, gone}
