"""Forms of checkpoints that are out there: heads stored twice or not at all, copies in two shards, no padding token."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import flashnorm
import tiny
from flashnorm.errors import InputError

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def outputs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()[:1])[0]


class TestATiedHead:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
            lambda tensors: tensors.update({HEAD: torch.randn_like(tensors[EMBEDDING])}),
            lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}),
            lambda tensors: None,
        ],
        ids=["a copy", "another", "the head alone", "the embedding alone"],
    )
    @pytest.mark.parametrize("untie", [False, True])
    @pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
    def test_is_what_transformers_makes_of_it(self, tmp_path: Path, kind: str, untie: bool, change) -> None:
        source = tiny.save(tmp_path / "source", tiny.model(tiny.config(kind, tie_word_embeddings=True)))
        edit(source, change)
        result = flashnorm.convert(source, tmp_path / "out", untie=untie, verify=True)
        assert ("model.norm.weight" in result.plan.kept) != untie
        assert json.loads((result.target / "config.json").read_text())["tie_word_embeddings"] != untie
        expected = outputs(AutoModelForCausalLM.from_pretrained(source))
        for load in (flashnorm.load, AutoModelForCausalLM.from_pretrained):
            assert (outputs(load(result.target)) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prefix"), [("qwen3", ""), ("qwen3", "model."), ("mistral", ""), ("gemma3_text", "")])
def test_without_an_output_head(tmp_path: Path, kind: str, prefix: str) -> None:
    """Embedding models are published as causal language models without the head."""
    source = tiny.save(tmp_path / "source", tiny.model(tiny.config(kind, tie_word_embeddings=False)))
    edit(source, lambda tensors: tensors.pop(HEAD))
    if not prefix:
        tensors = load_file(source / "model.safetensors")
        save_file({name.removeprefix("model."): t for name, t in tensors.items()}, source / "model.safetensors")
    result = flashnorm.convert(source, tmp_path / "out", verify=True)
    assert result.norms >= 4
    assert result.plan.kept["norm.weight"].reason == "it is an output of the model"
    assert "lacks the output head (lm_head.weight)" in " ".join(result.remarks)
    expected = outputs(AutoModel.from_pretrained(source))
    with pytest.warns(UserWarning, match="lacks the output head"):
        loaded = flashnorm.load(result.target)
    for model in (loaded, AutoModel.from_pretrained(result.target)):
        assert (outputs(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_a_classifier_without_a_padding_token(tmp_path: Path, kind: str) -> None:
    """Its code refuses several texts at a time."""
    config = tiny.config(kind)
    config.pad_token_id = None
    source = tmp_path / "source"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(source)
    result = flashnorm.convert(source, tmp_path / "out", verify=True)
    assert not result.plan.kept
    expected = outputs(AutoModelForSequenceClassification.from_pretrained(source))
    assert (outputs(flashnorm.load(result.target)) - expected).abs().max() <= 1e-4 * expected.abs().max()


class TestAnIndex:
    Q = "model.layers.0.self_attn.q_proj.weight"
    ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def source(self, folder: Path, listed: str, copy: Callable[[Tensor], Tensor] = torch.clone, **more: str) -> Path:
        tiny.save(folder, tiny.model(tiny.config("llama")))
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {self.ONE: names[::2], self.TWO: names[1::2]}
        weight_map = {name: file for file, part in parts.items() for name in part}
        for file, part in parts.items():
            held = {name: tensors[name] for name in part}
            held |= {self.Q: tensors[self.Q]} if file == listed else {self.Q: copy(tensors[self.Q])}
            save_file(held, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map | {self.Q: listed} | more}
        (folder / INDEX).write_text(json.dumps(index))
        return folder

    @pytest.mark.slow
    @pytest.mark.parametrize("listed", [ONE, TWO])
    def test_decides_about_copies(self, tmp_path: Path, listed: str) -> None:
        source = self.source(tmp_path / "source", listed)
        result = flashnorm.convert(source, tmp_path / "out", verify=True)
        assert result.remarks == (f"{self.Q} is in {self.ONE} and {self.TWO}; {listed} counts, as {INDEX} names it",)
        assert [file for file in (self.ONE, self.TWO) if self.Q in load_file(result.target / file)] == [listed]

    @pytest.mark.slow
    def test_decides_about_what_transformers_takes_too(self, tmp_path: Path) -> None:
        source = self.source(tmp_path / "source", self.TWO, torch.zeros_like)
        assert flashnorm.convert(source, tmp_path / "out", verify=True).report

    def test_that_transformers_passes_over_is_refused(self, tmp_path: Path) -> None:
        source = self.source(tmp_path / "source", self.ONE, torch.zeros_like)
        with pytest.raises(InputError, match=rf"Transformers loads that of {self.TWO}"):
            flashnorm.convert(source, tmp_path / "out")

    @pytest.mark.slow
    def test_may_name_what_no_code_reads(self, tmp_path: Path) -> None:
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": self.ONE}
        source = self.source(tmp_path / "source", self.ONE, **extra)
        result = flashnorm.convert(source, tmp_path / "out", verify=True)
        assert any("names tensors that no file holds" in remark for remark in result.remarks)
        assert not json.loads((result.target / INDEX).read_text())["weight_map"].keys() & extra.keys()

    def test_must_not_name_what_the_model_needs(self, tmp_path: Path) -> None:
        source = self.source(tmp_path / "source", self.ONE)
        for file in (self.ONE, self.TWO):
            held = load_file(source / file)
            held.pop(self.Q)
            save_file(held, source / file)
        with pytest.raises(InputError, match=rf"found 1 in none: {self.Q}"):
            flashnorm.convert(source, tmp_path / "out")
