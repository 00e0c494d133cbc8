"""Real vLLM on the CPU: models of many types, and ways of running them (`make test-vllm`)."""

from pathlib import Path
from typing import Any

import pytest
import torch

import flashnorm
from integrations.conftest import MODELS, Results, assert_same, gemma3, job, needs_vllm, run_jobs, smollm2, source

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of sources and converted models."""
    folder = tmp_path_factory.mktemp("vllm")
    jobs = []

    def both(name: str, original: Path, **options: Any) -> None:
        converted = folder / f"{original.name}-flashnorm"
        if not converted.exists():
            flashnorm.convert(original, converted)
        jobs.extend([job(name, original, options=options), job(f"{name} converted", converted, options=options)])

    for model_type in MODELS:
        both(model_type, source(folder, model_type))
    for model_type in ("llama", "gemma3_text"):
        both(f"{model_type}, Transformers backend", folder / model_type, model_impl="transformers")
    both("compiled", folder / "llama", enforce_eager=False)
    both("gemma3 270M", gemma3(folder, torch.float32))
    both("smollm2, bfloat16", smollm2(folder, torch.bfloat16), dtype="bfloat16")
    original = smollm2(folder / "wide", torch.float32)
    flashnorm.convert(original, folder / "untied", untie=True)
    jobs += [job("smollm2, float32", original), job("smollm2, untied", folder / "untied")]
    return run_jobs(folder, jobs, timeout=3000)


def skip_without_mla(original: dict[str, Any], converted: dict[str, Any]) -> None:
    """Skip a model of which vLLM says that it has no MLA for it on the CPU (0.27), converted or not."""
    if original.get("error") == "NotImplementedError: MLA is not supported on CPU.":
        assert converted["error"] == original["error"]
        pytest.skip(original["error"])


@pytest.mark.parametrize("model_type", MODELS)
def test_architectures(results: Results, model_type: str) -> None:
    original, converted = results[model_type], results[f"{model_type} converted"]
    skip_without_mla(original, converted)
    assert_same(converted, original)
    gone = set(original["vectors"]) - set(converted["vectors"])
    assert gone
    assert all("norm" in name or "ln_" in name for name in gone)
    assert not set(converted["vectors"]) - set(original["vectors"])
    assert not gone & set(converted["state"])
    assert not set(converted["state"]) - set(original["state"])


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3_text", "phi3", "mixtral", "deepseek_v2"])
def test_no_weight_reaches_the_operator(results: Results, model_type: str) -> None:
    """With all norms folded there is no product with a gain left; else only those of the norms that stay."""
    original, converted = results[model_type], results[f"{model_type} converted"]
    skip_without_mla(original, converted)
    norms = [name for name in original["vectors"] if "norm" in name]
    stay = [name for name in converted["vectors"] if "norm" in name]
    assert original["gain_products"] > 0
    assert converted["gain_products"] * len(norms) == original["gain_products"] * len(stay)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_transformers_backend(results: Results, model_type: str) -> None:
    name = f"{model_type}, Transformers backend"
    assert_same(results[f"{name} converted"], results[name])
    assert results[f"{name} converted"]["vectors"] == results[f"{model_type} converted"]["vectors"]


def test_compiled(results: Results) -> None:
    assert_same(results["compiled converted"], results["compiled"])


def test_gemma3_270m(results: Results) -> None:
    original, converted = results["gemma3 270M"], results["gemma3 270M converted"]
    assert_same(converted, original)
    gone = set(original["vectors"]) - set(converted["vectors"])
    assert len(gone) == 36
    assert {name.split(".")[-2] for name in gone} == {"input_layernorm", "pre_feedforward_layernorm"}


def test_smollm2_untied(results: Results) -> None:
    assert_same(results["smollm2, untied"], results["smollm2, float32"])
    assert results["smollm2, untied"]["vectors"] == []


def test_smollm2_in_bfloat16(results: Results) -> None:
    """Weights are rounded once more, so later tokens may differ; the first ones' probabilities hardly do."""
    original, converted = results["smollm2, bfloat16"], results["smollm2, bfloat16 converted"]
    for ours, theirs in zip(converted["logprobs"], original["logprobs"], strict=True):
        for token in ours[0].keys() & theirs[0].keys():
            assert ours[0][token] == pytest.approx(theirs[0][token], abs=0.25)
