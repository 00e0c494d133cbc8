"""Real vLLM on the CPU: linear layers with the norm before them on flashnorm's kernels, if asked (`make test-vllm`)."""

from pathlib import Path
from typing import Any

import pytest
import torch

import flashnorm
from flashnorm.integrations.vllm import fused
from integrations.conftest import Results, assert_same, job, needs_vllm, run_jobs, smollm2, source
from integrations.test_vllm_forms import make_adapter

pytestmark = needs_vllm

KERNELS = {"additional_config": {fused.OPTION: True}}
# Name -> deferred norms, and linear layers, of two layers each; Gemma's and Qwen3's other norms stay.
DEFERRED = {"llama": (4, 8), "qwen3": (4, 8), "gemma3_text": (4, 8), "phi3": (4, 8), "llama, compiled": (4, 8)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("vllm")
    jobs = []

    def add(name: str, original: Path, options: dict[str, Any], **more: Any) -> None:
        converted = folder / f"{original.name}-flashnorm"
        if not converted.exists():
            flashnorm.convert(original, converted)
        jobs.extend(
            [job(name, original, options=options), job(f"{name} on kernels", converted, options=options | KERNELS)]
        )

    for model_type in ("llama", "qwen3", "gemma3_text", "phi3"):
        add(model_type, source(folder, model_type), {})
    add("llama, compiled", folder / "llama", {"enforce_eager": False})
    add("smollm2", smollm2(folder, torch.float32), {})
    folded = folder / "llama-flashnorm"
    jobs.append(job("reloaded", folded, options=KERNELS, steps=["reload"]))
    jobs.append(job("ordinary", folder / "llama", options=KERNELS))
    lora = {"enable_lora": True, "max_lora_rank": 8}
    adapter = str(make_adapter(folder / "adapter", str(folded)))
    jobs += [job("adapter", folded, options=lora, adapter=adapter)]
    jobs += [job("adapter on kernels", folded, options=lora | KERNELS, adapter=adapter)]
    jobs.append(job("unclear", folded, options={"additional_config": {fused.OPTION: "yes"}}))
    return run_jobs(folder, jobs, timeout=3000)


@pytest.mark.parametrize(("name", "norms", "linears"), [(n, *counts) for n, counts in DEFERRED.items()])
def test_same_and_ran(results: Results, name: str, norms: int, linears: int) -> None:
    """The same tokens and log-probabilities; each linear layer ran on the kernels in each step."""
    found = results[f"{name} on kernels"]
    assert_same(found, results[name])
    assert found["classes"]["DeferredRMSNorm"] == norms
    assert found["kernel_runs"] > 0
    assert found["kernel_runs"] % linears == 0
    assert results[name]["kernel_runs"] == 0


def test_real_model(results: Results) -> None:
    found = results["smollm2 on kernels"]
    assert_same(found, results["smollm2"])
    assert found["classes"]["DeferredRMSNorm"] == 60
    assert found["kernel_runs"] >= 120


def test_reloading(results: Results) -> None:
    assert_same(results["reloaded"], results["llama"])
    assert results["reloaded"]["kernel_runs"] > 0


@pytest.mark.parametrize(("name", "other"), [("ordinary", "llama"), ("adapter on kernels", "adapter")])
def test_runs_as_ever(results: Results, name: str, other: str) -> None:
    """An ordinary model, and one with adapters, which read what the norms give."""
    assert_same(results[name], results[other])
    assert results[name]["kernel_runs"] == 0
    assert "DeferredRMSNorm" not in results[name]["classes"]


def test_unclear(results: Results) -> None:
    assert (
        "expected true or false for flashnorm_kernels in --additional-config, found 'yes'"
        in results["unclear"]["error"]
    )
