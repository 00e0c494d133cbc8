"""A real checkpoint through its whole life: plan, convert, verify, load, generate, save, reload."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashnorm
from cards import MODELS, PAGE, cards_of
from flashnorm.verify.outputs import verify_outputs
from flashnorm.verify.text import DEFAULT_TEXT

pytestmark = pytest.mark.slow

# Folding rounds bf16 weights once more, so a near tie can fall the other way; this prompt's first 64 tokens have none.
PROMPT = "The three most important things to know about the moon are"


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "smollm2-flashnorm"
    result = flashnorm.convert(smollm2, folder)
    assert (result.norms, result.linears) == (60, 150)
    return folder


def greedy(model: Any, folder: Path, steps: int = 64) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    return answer[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> list[int]:
    """What the source says, in float32."""
    return greedy(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), smollm2)


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_plan(smollm2: Path) -> None:
    plan = flashnorm.plan(smollm2)
    assert len(plan.folds) == 60
    assert list(plan.kept) == ["model.norm.weight"]
    assert "tied" in plan.kept["model.norm.weight"].reason
    assert len(flashnorm.plan(smollm2, untie=True).folds) == 61


def test_streamed_from_disk_no_number_changes(smollm2: Path, converted: Path) -> None:
    """A part of the text: every module comes from disk whole, however many tokens it is for."""
    text = DEFAULT_TEXT[:200]
    whole, streamed = (verify_outputs(smollm2, converted, text=text, steps=2, streamed=way) for way in (False, True))
    assert whole.ok
    assert streamed == replace(whole, streamed=True)


def test_converted_files(smollm2: Path, converted: Path) -> None:
    gone = names_in(smollm2) - names_in(converted)
    assert len(gone) == 60
    assert all("layernorm" in name for name in gone)
    assert names_in(converted) < names_in(smollm2)
    config = json.loads((converted / "config.json").read_text())
    assert config["flash_norm"] is config["flashnorm_folded"] is True
    assert set(config["flashnorm"]["weightless"]) == gone
    before = (smollm2 / "model.safetensors").stat().st_size
    # 60 norms of 576 bf16 numbers, and their entries in the header.
    assert before - (converted / "model.safetensors").stat().st_size > 60 * 576 * 2


def test_the_card_is_the_one_in_the_documents(converted: Path) -> None:
    title, *_ = MODELS[0]
    section, _, _ = cards_of(PAGE.read_text())[title].partition("\n## Verified\n")
    assert (converted / "README.md").read_text() == section


def test_verify(smollm2: Path, converted: Path, capsys: pytest.CaptureFixture) -> None:
    report = flashnorm.verify(smollm2, converted)
    assert report.ok, str(report)
    assert (report.weights.folded, report.weights.unchanged, report.weights.norms) == (150, 62, 60)
    outputs = report.outputs
    assert outputs is not None
    assert outputs.greedy is not None
    assert outputs.greedy.identical == 64
    assert outputs.ratio < 2
    assert outputs.rounding is not None
    assert outputs.rounding.kl < 1e-4
    with capsys.disabled():
        print(f"\nSmolLM2-135M bf16: KL ratio {outputs.ratio:.2f}, fold's own rounding {outputs.rounding.kl:.2e}")


def test_one_flipped_bit(smollm2: Path, converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in converted.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8:header])["model.layers.17.mlp.up_proj.weight"]["data_offsets"]
    element = 576 * 1000 + 123
    assert start + 2 * element < end
    raw[header + start + 2 * element] ^= 1
    path.write_bytes(raw)
    report = flashnorm.verify(smollm2, folder, weights_only=True)
    assert not report.ok
    (finding,) = [finding for finding in report.weights.findings if finding.kind == "tensor"]
    assert finding.name == "model.layers.17.mlp.up_proj.weight"
    assert finding.index == (1000, 123)
    assert finding.differing == 1


def test_load_and_generate(converted: Path, expected: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = flashnorm.load(converted, dtype=torch.float32)
    assert not [record for record in caplog.records if "MISSING" in record.getMessage()]
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() == 1]
    assert weights == ["model.norm.weight"]
    assert greedy(model, converted) == expected


def test_save_and_reload(converted: Path, expected: list[int], tmp_path: Path) -> None:
    model = flashnorm.load(converted, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert names_in(tmp_path / "saved") <= names_in(converted)
    again = flashnorm.load(tmp_path / "saved")
    assert again.dtype == torch.float32
    assert greedy(again, converted, 16) == expected[:16]


def test_plain_transformers_works_too(converted: Path, expected: list[int]) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, output_loading_info=True)
    assert len(info["missing_keys"]) == 60
    assert greedy(model, converted, 16) == expected[:16]


def test_untied(smollm2: Path, expected: list[int], tmp_path: Path) -> None:
    result = flashnorm.convert(smollm2, tmp_path / "untied", untie=True)
    assert result.norms == 61
    assert "lm_head.weight" in names_in(tmp_path / "untied")
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    report = flashnorm.verify(smollm2, tmp_path / "untied", weights_only=True)
    assert report.ok, str(report)
    assert (report.weights.folded, report.weights.norms) == (151, 61)
    model = flashnorm.load(tmp_path / "untied", dtype=torch.float32)
    assert all(parameter.dim() > 1 for parameter in model.parameters())
    assert greedy(model, smollm2) == expected


def test_keep_norms(smollm2: Path, expected: list[int], tmp_path: Path) -> None:
    flashnorm.convert(smollm2, tmp_path / "kept", keep_norms=True)
    assert names_in(tmp_path / "kept") == names_in(smollm2)
    assert flashnorm.verify(smollm2, tmp_path / "kept", weights_only=True).ok
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert greedy(model, smollm2, 16) == expected[:16]
    assert greedy(flashnorm.load(tmp_path / "kept", dtype=torch.float32), smollm2, 16) == expected[:16]


def test_fold_in_memory(smollm2: Path, expected: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert flashnorm.fold_(model) is model
    assert [name for name, parameter in model.named_parameters() if parameter.dim() == 1] == ["model.norm.weight"]
    assert greedy(model, smollm2, 16) == expected[:16]


def test_command_line(smollm2: Path, converted: Path) -> None:
    """Exit status 0 for the same model, 1 for another one, 2 for no model; and generated text."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from flashnorm.cli import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    same = run("verify", smollm2, converted, "--weights-only", "--json")
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout)["ok"] is True
    assert run("verify", converted, converted, "--weights-only").returncode == 1
    missing = run("verify", smollm2, converted / "nothing", "--weights-only")
    assert missing.returncode == 2
    assert "nothing" in missing.stderr
    text = run("generate", converted, "Once upon a time", "--max-new-tokens", "8")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("Once upon a time")
