"""Gemma 3 270M through its life: gains 1 + w, norms after blocks, q/k norms, windows of 512, a tied head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashnorm
from flashnorm.verify.outputs import verify_outputs
from flashnorm.verify.text import DEFAULT_TEXT

pytestmark = pytest.mark.slow

PROMPT = "The three most important things to know about the moon are"
OTHER = "The best way to learn a language"
FOLDED = {"input_layernorm", "pre_feedforward_layernorm"}


@pytest.fixture(scope="module")
def converted(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "gemma3-flashnorm"
    result = flashnorm.convert(gemma3, folder)
    assert (result.norms, result.linears) == (36, 90)
    return folder


@pytest.fixture(scope="module")
def source(gemma3: Path) -> Any:
    """Plain Transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(gemma3, dtype=torch.float32)


@pytest.fixture(scope="module")
def loaded(converted: Path) -> Any:
    return flashnorm.load(converted, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(gemma3: Path) -> Any:
    return AutoTokenizer.from_pretrained(gemma3)


@pytest.fixture(scope="module")
def inputs(tokenizer: Any) -> Any:
    return tokenizer(PROMPT, return_tensors="pt")


@pytest.fixture(scope="module")
def expected(source: Any, inputs: Any) -> list[int]:
    """What the source says for 64 steps."""
    return greedy(source, inputs, 64)[0]


def greedy(model: Any, inputs: Any, steps: int, **options: Any) -> list[list[int]]:
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options)
    return answer[:, inputs["input_ids"].shape[1] :].tolist()


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_the_checkpoint_is_a_model_that_works(source: Any, tokenizer: Any, expected: list[int]) -> None:
    """Wrong gains, a wrong theta or a wrong vocabulary would make thousands of it."""
    ids = tokenizer(DEFAULT_TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        perplexity = source(ids, labels=ids).loss.exp()
    assert 10 < perplexity < 25
    assert "The moon is a natural satellite of the Earth" in tokenizer.decode(expected)


def test_plan(gemma3: Path) -> None:
    plan = flashnorm.plan(gemma3)
    assert len(plan.folds) == 36
    assert {fold.norm.split(".")[-2] for fold in plan.folds} == FOLDED
    assert {fold.offset for fold in plan.folds} == {1.0}
    assert len(plan.kept) == 73
    reasons = {(name.split(".")[-2], kept.reason) for name, kept in plan.kept.items()}
    rotated = "it adds channels that carry different elements of the gain"
    residual = "it adds a tensor that does not carry the gain"
    tied = "tied: lm_head.weight is model.embed_tokens.weight, which aten.embedding reads without the gain"
    assert reasons == {
        ("q_norm", rotated),
        ("k_norm", rotated),
        ("post_attention_layernorm", residual),
        ("post_feedforward_layernorm", residual),
        ("norm", tied),
    }


def test_converted_files(gemma3: Path, converted: Path) -> None:
    gone = names_in(gemma3) - names_in(converted)
    assert len(gone) == 36
    assert {name.split(".")[-2] for name in gone} == FOLDED
    assert names_in(converted) < names_in(gemma3)
    assert set(json.loads((converted / "config.json").read_text())["flashnorm"]["weightless"]) == gone


def test_verify(gemma3: Path, converted: Path, capsys: pytest.CaptureFixture) -> None:
    """A part of the text and few greedy steps, as there are 262 144 logits after each token, in float64."""
    weights = flashnorm.verify(gemma3, converted, weights_only=True)
    assert weights.ok, str(weights)
    assert (weights.weights.folded, weights.weights.unchanged, weights.weights.norms) == (90, 110, 36)
    outputs = verify_outputs(gemma3, converted, text=DEFAULT_TEXT[:200], steps=2)
    assert outputs.ok
    assert outputs.greedy is not None
    assert outputs.greedy.identical == 2
    assert outputs.rounding is not None
    with capsys.disabled():
        print(f"\nGemma 3 270M bf16: KL ratio {outputs.ratio:.2f}, fold's own rounding {outputs.rounding.kl:.2e}")


def test_load_and_generate(loaded: Any, inputs: Any, expected: list[int]) -> None:
    gains = [name for name, parameter in loaded.named_parameters() if parameter.dim() == 1]
    assert len(gains) == 73
    assert greedy(loaded, inputs, 64) == [expected]


def test_beyond_the_window(source: Any, loaded: Any, tokenizer: Any) -> None:
    """A prompt of more than 512 tokens, and single steps after it."""
    inputs = tokenizer(DEFAULT_TEXT + "\n\n" + DEFAULT_TEXT[:1000], return_tensors="pt")
    assert inputs["input_ids"].shape[1] > source.config.sliding_window == 512
    assert greedy(loaded, inputs, 8) == greedy(source, inputs, 8)


def test_padded_batch(source: Any, loaded: Any, tokenizer: Any) -> None:
    inputs = tokenizer([PROMPT, OTHER], return_tensors="pt", padding=True)
    assert inputs["attention_mask"].min() == 0
    assert greedy(loaded, inputs, 8) == greedy(source, inputs, 8)


def test_static_cache(loaded: Any, inputs: Any, expected: list[int]) -> None:
    assert greedy(loaded, inputs, 16, cache_implementation="static") == [expected[:16]]


def test_untied(gemma3: Path, inputs: Any, expected: list[int], tmp_path: Path) -> None:
    result = flashnorm.convert(gemma3, tmp_path / "untied", untie=True)
    assert (result.norms, result.linears) == (37, 91)
    assert "lm_head.weight" in names_in(tmp_path / "untied")
    model = flashnorm.load(tmp_path / "untied", dtype=torch.float32)
    assert "model.norm.weight" not in dict(model.named_parameters())
    assert greedy(model, inputs, 16) == [expected[:16]]
