"""`--keep`: norms that someone asks to keep are kept, and all that reads the result agrees."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel

import flashnorm
import tiny
from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan, Kind

FINAL, FIRST = "model.norm.weight", "model.layers.0.input_layernorm.weight"


def asked(plan: FoldPlan) -> set[str]:
    return {name for name, kept in plan.kept.items() if kept.kind is Kind.ASKED}


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ([FINAL], {FINAL}),
        (["model.norm"], {FINAL}),
        (["final"], {FINAL}),
        (["model.layers.0.*"], {FIRST, FIRST.replace("input", "post_attention")}),
        (["*.[0-9].input_layernorm", "final"], {FIRST, FIRST.replace("0", "1"), FINAL}),
    ],
)
def test_patterns(patterns: list[str], kept: set[str]) -> None:
    whole, plan = flashnorm.plan(tiny.config("llama")), flashnorm.plan(tiny.config("llama"), keep=patterns)
    assert asked(plan) == kept
    assert {fold.norm for fold in plan.folds} == {fold.norm for fold in whole.folds} - kept
    assert all("--keep" in plan.kept[name].reason for name in kept)


@pytest.mark.parametrize(
    ("model_type", "norm"),
    [
        ("gpt2", "transformer.ln_f.weight"),
        ("t5", "decoder.final_layer_norm.weight"),
        ("qwen3", "model.norm.weight"),
        ("mamba", "backbone.norm_f.weight"),
    ],
)
def test_the_final_norm_of_other_models(model_type: str, norm: str) -> None:
    overrides = {"tie_word_embeddings": False}
    assert asked(flashnorm.plan(tiny.config(model_type, **overrides), keep=["final"])) <= {norm}
    assert norm in flashnorm.plan(tiny.config(model_type, **overrides), keep=["final"]).kept


@pytest.mark.parametrize("model_type", ["wav2vec2", "vit", "hubert"])
@pytest.mark.parametrize("keep", [[], ["final"]])
def test_a_model_without_an_embedding_of_tokens(model_type: str, keep: list[str]) -> None:
    assert asked(flashnorm.plan(tiny.config(model_type), keep=keep)) == set()  # the last norm is an output


def test_a_plain_module() -> None:
    model = nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 4))
    inputs = (torch.ones(2, 4),)
    assert not flashnorm.plan(model, inputs).kept
    assert asked(flashnorm.plan(model, inputs, keep=["final"])) == {"2.weight"}
    assert asked(flashnorm.plan(model, inputs, keep=["0"])) == {"0.weight"}


def test_a_norm_that_is_kept_anyway_keeps_its_reason() -> None:
    plan = flashnorm.plan(tiny.config("llama", tie_word_embeddings=True), keep=["final"])
    assert plan.kept[FINAL].kind is Kind.TIED


def test_a_pattern_that_fits_nothing() -> None:
    with pytest.raises(InputError, match=r"expected --keep to fit a norm .*found 'lm_head\.\*', which fits none"):
        flashnorm.plan(tiny.config("llama"), keep=["final", "lm_head.*"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("keep") / "source", tiny.model(tiny.config("llama"), torch.float32))


def hidden(folder: Path) -> Any:
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(tiny.ids()).last_hidden_state


def agree(source: Path, out: Path, norms: int, patterns: list[str] | None) -> None:
    """All that reads a conversion says that it is right, and that so many norms were folded."""
    report = flashnorm.verify(source, out)
    assert report.ok, report
    alone = flashnorm.verify(out, weights_only=True)
    assert alone.ok, alone
    assert len(report.conversion.plan.folds) == norms
    assert json.loads((out / "flashnorm.json").read_text())["options"].get("keep") == patterns
    model = flashnorm.load(out)
    assert sum("norm" in name for name, _ in model.named_parameters()) == 5 - norms


@pytest.mark.slow
def test_a_conversion(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert flashnorm.convert(source, out, keep=["final", "*.0.input_layernorm"], verify=True).norms == 3
    agree(source, out, 3, ["final", "*.0.input_layernorm"])
    assert torch.allclose(hidden(out), hidden(source), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep_norms", [False, True])
def test_sentence_transformers_keep_the_final_norm(source: Path, tmp_path: Path, keep_norms: bool) -> None:
    folder, out = tmp_path / "source", tmp_path / "out"
    tiny.save(folder, tiny.model(tiny.config("llama"), torch.float32))
    (folder / "modules.json").write_text("[]")
    assert "sentence-transformers" in flashnorm.plan(folder).kept[FINAL].reason
    result = flashnorm.convert(folder, out, keep_norms=keep_norms)
    assert "last hidden state" in result.plan.kept[FINAL].reason
    agree(folder, out, 4, None)
    assert torch.allclose(hidden(out), hidden(folder), rtol=0, atol=1e-5)


def test_the_option_in_a_manifest_is_checked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flashnorm.convert(source, out, keep=["final"])
    manifest = json.loads((out / "flashnorm.json").read_text())
    del manifest["options"]["keep"]
    (out / "flashnorm.json").write_text(json.dumps(manifest))
    assert not flashnorm.verify(source, out, weights_only=True).ok
    assert not flashnorm.verify(out, weights_only=True).ok


def test_in_memory() -> None:
    model = flashnorm.fold_(tiny.model(tiny.config("llama"), torch.float32), keep=["final"])
    assert [name for name, _ in model.named_parameters() if "norm" in name] == [FINAL]
    assert FINAL not in model.config.flashnorm["weightless"]
