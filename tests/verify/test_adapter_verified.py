"""A converted adapter is verified: right ones pass, and every kind of damage is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashnorm
import tiny

peft = pytest.importorskip("peft")

import adapters  # noqa: E402

WEIGHTS = "adapter_model.safetensors"
A = "base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_A.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], list[Path]]:
    """Source, conversion, adapter and converted adapter in bfloat16, by model type and config."""
    root = tmp_path_factory.mktemp("verified")
    known: dict[str, list[Path]] = {}

    def make(kind: str, config: Any) -> list[Path]:
        if kind not in known:
            folders = [root / kind / name for name in ("source", "out", "adapter", "converted")]
            tiny.save(folders[0], tiny.model(tiny.config(kind), torch.bfloat16))
            flashnorm.convert(folders[0], folders[1])
            adapters.train(adapters.source(folders[0], torch.float32), config, folders[2])
            flashnorm.convert_adapter(folders[2], folders[0], folders[3], folded=folders[1])
            known[kind] = folders
        return known[kind]

    return make


@pytest.fixture
def neox(made: Any) -> list[Path]:
    """With norm biases: products, constants and trained biases at once."""
    return made("gpt_neox", peft.LoraConfig(target_modules=["query_key_value", "dense"], bias="lora_only"))


@pytest.mark.slow
def test_right_ones(neox: list[Path]) -> None:
    report = flashnorm.verify_adapter(*neox)
    assert report.ok, report.findings
    assert (report.products, report.sums, report.unchanged) == (2, 6, 8)
    assert report.outputs is not None
    assert [criterion.ok for criterion in report.outputs.criteria] == [True, True]
    assert json.loads(report.to_json())["ok"]


def test_magnitudes(made: Any) -> None:
    folders = made("llama", peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    report = flashnorm.verify_adapter(*folders, weights_only=True)
    assert report.ok, report.findings
    assert (report.products, report.sums, report.unchanged) == (2, 2, 2)
    _edit(folders[3] / WEIGHTS, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", 1.001)
    assert "rounded sum or ratio" in str(flashnorm.verify_adapter(*folders, weights_only=True).findings[0])


def _edit(file: Path, name: str, factor: float) -> None:
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] *= factor
    save_file(tensors, file)


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda to: _edit(to / WEIGHTS, A, 1 + 2**-22), "is not the rounded product"),
        (lambda to: _edit(to / WEIGHTS, A.replace("lora_A", "lora_B"), 1 + 2**-22), "was to be copied"),
        (lambda to: _edit(to / WEIGHTS, A.replace("lora_A.weight", "lora_B.bias"), 1.001), "rounded sum or ratio"),
        (lambda to: _edit(to / WEIGHTS, A.replace("lora_A.weight", "base_layer.bias"), 1.001), "rounded sum or ratio"),
        (lambda to: save_file({"new": torch.ones(1)} | load_file(to / WEIGHTS), to / WEIGHTS), "is in no plan"),
        (lambda to: _config(to, r=3), "r: is 3, was 8"),
        (lambda to: _config(to, lora_bias=False), "lora_bias: is False, expected True"),
        (lambda to: _config(to, flashnorm_plan="0"), "flashnorm_plan: is '0'"),
        (lambda to: _config(to, revision="flashnorm-0123456789ab"), "other folds"),
        (lambda to: (to / "new.txt").write_text("x"), "does not list new.txt"),
    ],
)
def test_damage_is_found(neox: list[Path], tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    shutil.copytree(neox[3], tmp_path / "converted")
    damage(tmp_path / "converted")
    report = flashnorm.verify_adapter(*neox[:3], tmp_path / "converted", weights_only=True)
    assert not report.ok
    assert any(words in str(finding) for finding in report.findings), report.findings


@pytest.mark.slow
def test_outputs_tell_an_unconverted_adapter(neox: list[Path], tmp_path: Path) -> None:
    """An adapter of the source that pretends to be converted."""
    shutil.copytree(neox[2], tmp_path / "adapter")
    report = flashnorm.verify_adapter(*neox[:3], tmp_path / "adapter")
    assert report.outputs is not None
    assert not report.outputs.criteria[0].ok


def test_the_converted_adapter_twice(neox: list[Path]) -> None:
    with pytest.raises(flashnorm.InputError, match="expected an adapter of an ordinary model, found one that is conv"):
        flashnorm.verify_adapter(*neox[:2], neox[3], neox[3])
