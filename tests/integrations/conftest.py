"""Checkpoints for vLLM, and what it makes of them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gemma3 as gemma3_example
import pytest
import smollm2 as smollm2_example
import torch
from safetensors.torch import load_file, save_file

import flashnorm
import tiny

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm installs it)")

Results = dict[str, dict[str, Any]]

WEIGHTS, FINAL = "model.safetensors", "model.norm.weight"

# vLLM's attention on the CPU has kernels for heads of 32 channels and more.
SIZES = {"hidden_size": 128, "head_dim": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": SIZES | EXPERTS | {"num_experts": 4},
    "gemma3_text": SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 64},
    "phi3": SIZES | {"num_attention_heads": 2},
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": SIZES | EXPERTS | LATENT,
    "deepseek_v3": SIZES | EXPERTS | LATENT | {"topk_method": "noaux_tc"},
    "cohere": SIZES,
    "gpt2": {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 128},
    "nemotron": SIZES,
}


def tensors_changed(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / WEIGHTS)
    change(tensors)
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    return target


def config_changed(folder: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint with another config, and without the manifest."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("flashnorm.json"))
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def source(folder: Path, model_type: str) -> Path:
    """A tiny random model of a type, as a float32 checkpoint."""
    return tiny.save(folder / model_type, tiny.model(tiny.config(model_type, **MODELS[model_type])))


def smollm2(folder: Path, dtype: torch.dtype) -> Path:
    """SmolLM2-135M-Instruct in a dtype."""
    return _in_dtype(smollm2_example.build(folder / "smollm2"), dtype)


def gemma3(folder: Path, dtype: torch.dtype) -> Path:
    """Gemma 3 270M in a dtype."""
    return _in_dtype(gemma3_example.build(folder / "gemma3"), dtype)


def _in_dtype(built: Path, dtype: torch.dtype) -> Path:
    if dtype == torch.bfloat16:
        return built
    target = built.with_name(f"{built.name}-float32")
    wide = tensors_changed(built, target, lambda tensors: tensors.update(_as(tensors, dtype)))
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return wide


def _as(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def job(name: str, model: Path, **more: Any) -> dict[str, Any]:
    """One of `vllm_jobs.py`."""
    return {"name": name, "model": str(model), **more}


def run_jobs(folder: Path, jobs: list[dict[str, Any]], timeout: float, **environment: str) -> Results:
    """What `vllm_jobs.py` says of some jobs, in a process of its own; `timeout` in seconds."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_jobs.py")
    with (folder / "jobs.log").open("w") as log:
        command = [sys.executable, script, folder / "jobs.json", folder / "results.json"]
        settings = vllm_environment(folder) | environment
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=timeout, check=False, env=settings)
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == {job["name"] for job in jobs}, (folder / "jobs.log").read_text()[-3000:]
    return results


def vllm_environment(folder: Path) -> dict[str, str]:
    """The environment of a vLLM on two cores that keeps its caches in a folder, and tells nobody."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {"VLLM_CPU_OMP_THREADS_BIND": "0-1"} | os.environ | settings


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Identical tokens, and equal log-probabilities of the best few at each."""
    assert "error" not in expected, expected
    assert "error" not in found, found
    assert found["tokens"] == expected["tokens"]
    assert difference(found, expected) <= tolerance


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of a log-probability, of the tokens that are among the best few of both at a place."""
    differences = []
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        for at, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            shared = our.keys() & their.keys()
            assert len(shared) >= 4, (at, our, their)  # the fifth and sixth may be equal
            differences += [abs(our[token] - their[token]) for token in shared]
    return torch.tensor(differences).max().item()  # NaN, if there is one


@pytest.fixture(scope="session")
def converted_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama without a tied head, and what `flashnorm convert` makes of it."""
    folder = tmp_path_factory.mktemp("llama")
    original = source(folder, "llama")
    flashnorm.convert(original, folder / "llama-flashnorm")
    return original, folder / "llama-flashnorm"
