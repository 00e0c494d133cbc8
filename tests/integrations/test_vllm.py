"""Real vLLM on the CPU: converted models against their sources. `make test-vllm` runs this, where vLLM is installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import flashnorm
from integrations.conftest import (
    MODELS,
    config_changed,
    run_jobs,
    smollm2,
    source,
    tensors_changed,
)

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm installs it)")

Results = dict[str, dict[str, Any]]

FINAL, LINEAR, NORM = "model.norm.weight", "self_attn.o_proj.weight", "model.layers.1.input_layernorm.weight"


def plain_flag(config: dict[str, Any]) -> None:
    del config["flashnorm"]


def no_flag(config: dict[str, Any]) -> None:
    del config["flashnorm"], config["flash_norm"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of every job that fits into one process."""
    folder = tmp_path_factory.mktemp("vllm")
    jobs: list[dict[str, Any]] = []

    def job(name: str, model: Path, **more: Any) -> None:
        jobs.append({"name": name, "model": str(model), **more})

    for model_type in MODELS:
        original = source(folder, model_type)
        flashnorm.convert(original, folder / f"{model_type}-flashnorm")
        job(model_type, original)
        job(f"{model_type} converted", folder / f"{model_type}-flashnorm")
    llama, folded = folder / "llama", folder / "llama-flashnorm"
    flashnorm.convert(llama, folder / "kept", keep_norms=True)
    flashnorm.convert(folder / "gemma3_text", folder / "gemma-kept", keep_norms=True)
    for name, model in (("kept", folder / "kept"), ("gemma kept", folder / "gemma-kept")):
        job(name, model)
    for name, change in (("plain flag", plain_flag), ("no flag", no_flag)):
        job(name, config_changed(folded, folder / name, change))
        job(f"{name}, kept", config_changed(folder / "kept", folder / f"{name}, kept", change))
    backend = {"model_impl": "transformers"}
    for name, model in (("llama", llama), ("gemma3_text", folder / "gemma3_text")):
        job(f"{name}, Transformers backend", model, options=backend)
        job(f"{name}, Transformers backend, converted", folder / f"{model.name}-flashnorm", options=backend)
    job("compiled", llama, options={"enforce_eager": False})
    job("compiled, converted", folded, options={"enforce_eager": False})
    job("reloaded", folded, steps=["reload"])
    job("reloaded without flag", folder / "no flag", steps=["reload"])
    job("dummy", folded, options={"load_format": "dummy"})

    first = f"model.layers.0.{LINEAR}"
    query = "model.layers.0.self_attn.q_proj.weight"
    for name, model, change in (
        ("without a linear", folded, lambda tensors: tensors.pop(first)),
        ("without part of a stacked linear", folded, lambda tensors: tensors.pop(query)),
        ("no flag, without a linear", folder / "no flag", lambda tensors: tensors.pop(first)),
        ("kept, with another gain", folder / "kept", lambda tensors: tensors[NORM].fill_(1.5)),
        ("ordinary, without a norm", llama, lambda tensors: tensors.pop(NORM)),
        ("ordinary, without another norm", folder / "qwen3", lambda t: t.pop("model.layers.0.self_attn.q_norm.weight")),
    ):
        job(name, tensors_changed(model, folder / name, change))
    job(
        "unnamed norm",
        config_changed(folded, folder / "unnamed norm", lambda config: config["flashnorm"]["weightless"].remove(NORM)),
    )
    job(
        "unknown norm",
        config_changed(folded, folder / "unknown norm", lambda config: config["flashnorm"]["weightless"].append("a.b")),
    )
    job(
        "another version",
        config_changed(folded, folder / "another version", lambda config: config["flashnorm"].update(version=2)),
    )
    job("pooled", folded, options={"runner": "pooling", "convert": "embed"})
    job("tensorizer", folded, options={"load_format": "tensorizer"})
    for name, base in (("adapter", str(folded)), ("foreign adapter", str(llama))):
        options = {"enable_lora": True, "max_lora_rank": 8}
        job(name, folded, options=options, adapter=str(make_adapter(folder / name, base)))

    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        original = smollm2(folder, dtype)
        flashnorm.convert(original, folder / f"smollm2-{word}-flashnorm")
        job(f"smollm2, {word}", original, options={"dtype": word})
        job(f"smollm2, {word}, converted", folder / f"smollm2-{word}-flashnorm", options={"dtype": word})
    flashnorm.convert(folder / "smollm2-float32", folder / "untied", untie=True)
    job("smollm2, untied", folder / "untied")
    # Last, as no other model can be built in its process.
    job(
        "ngram",
        folded,
        options={"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
    )
    return run_jobs(folder, jobs, timeout=3000)


def make_adapter(folder: Path, base: str) -> Path:
    """A LoRA adapter of rank 8 for the query projections of the tiny Llama, in PEFT's format."""
    from safetensors.torch import save_file

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


def skip_without_mla(original: dict[str, Any]) -> None:
    """Skip a model whose source vLLM cannot run either: 0.27 has no MLA on the CPU."""
    if "MLA is not supported on CPU" in original.get("error", ""):
        pytest.skip(original["error"])


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Identical tokens, and equal log-probabilities of the best few at each."""
    assert "error" not in expected, expected
    assert "error" not in found, found
    assert found["tokens"] == expected["tokens"]
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        for at, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            shared = our.keys() & their.keys()
            assert len(shared) >= 4, (at, our, their)  # the fifth and sixth may be equal
            for token in shared:
                assert our[token] == pytest.approx(their[token], abs=tolerance)


@pytest.mark.parametrize("model_type", MODELS)
def test_architectures(results: Results, model_type: str) -> None:
    original, converted = results[model_type], results[f"{model_type} converted"]
    skip_without_mla(original)
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
    skip_without_mla(original)
    norms = [name for name in original["vectors"] if "norm" in name]
    stay = [name for name in converted["vectors"] if "norm" in name]
    assert original["gain_products"] > 0
    assert converted["gain_products"] * len(norms) == original["gain_products"] * len(stay)


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


def test_offset_norms_kept(results: Results) -> None:
    assert_same(results["gemma kept"], results["gemma3_text"])
    assert results["gemma kept"]["vectors"] == results["gemma3_text converted"]["vectors"]
    assert results["gemma kept"]["classes"]["WeightlessGemmaRMSNorm"] == 4


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_transformers_backend(results: Results, model_type: str) -> None:
    name = f"{model_type}, Transformers backend"
    assert_same(results[f"{name}, converted"], results[name])
    assert results[f"{name}, converted"]["vectors"] == results[f"{model_type} converted"]["vectors"]


def test_compiled(results: Results) -> None:
    assert_same(results["compiled, converted"], results["compiled"])


def test_ordinary_models_are_left_alone(results: Results) -> None:
    assert results["llama"]["loads_as_ever"]
    assert not results["llama converted"]["loads_as_ever"]


def test_speculative_decoding_without_a_head(results: Results) -> None:
    assert results["ngram"]["tokens"] == results["llama"]["tokens"]


def test_dummy_weights(results: Results) -> None:
    assert "error" not in results["dummy"], results["dummy"]
    assert results["dummy"]["vectors"] == []


def test_smollm2_in_float32(results: Results) -> None:
    assert_same(results["smollm2, float32, converted"], results["smollm2, float32"])
    assert results["smollm2, float32, converted"]["vectors"] == [FINAL]
    assert_same(results["smollm2, untied"], results["smollm2, float32"])
    assert results["smollm2, untied"]["vectors"] == []


def test_smollm2_in_bfloat16(results: Results) -> None:
    """Weights are rounded once more, so later tokens may differ; the first ones' probabilities hardly do."""
    original, converted = results["smollm2, bfloat16"], results["smollm2, bfloat16, converted"]
    for ours, theirs in zip(converted["logprobs"], original["logprobs"], strict=True):
        for token in ours[0].keys() & theirs[0].keys():
            assert ours[0][token] == pytest.approx(theirs[0][token], abs=0.25)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without a linear", "found 1 absent: model.layers.0.self_attn.o_proj.weight"),
        ("without part of a stacked linear", "found 1 absent: model.layers.0.self_attn.q_proj.weight"),
        ("no flag, without a linear", "found 1 absent: model.layers.0.self_attn.o_proj.weight"),
        ("kept, with another gain", f"expected {NORM} at 1"),
        ("ordinary, without a norm", "expected all of 5 norms that can be folded, or none, found 1 absent"),
        ("ordinary, without another norm", "Following weights were not initialized"),
        ("unnamed norm", f"found 1 absent: {NORM}"),
        ("unknown norm", "expected the norm a.b in vLLM's LlamaForCausalLM, found none of this name"),
        ("another version", "expected version 1 of the flashnorm key, found 2"),
        ("pooled", "the gain of model.norm.weight, whose output would be pooled"),
        ("tensorizer", "found --load-format tensorizer"),
        ("foreign adapter", "expected an adapter for"),
    ],
)
def test_refused(results: Results, name: str, message: str) -> None:
    assert message in results[name].get("error", "no error")


def test_adapter_trained_on_the_converted_model(results: Results) -> None:
    assert "error" not in results["adapter"], results["adapter"]
    assert results["adapter"]["tokens"] != results["llama"]["tokens"]


@pytest.mark.parametrize(
    ("kind", "options"), [("tensor", {"tensor_parallel_size": 2}), ("pipeline", {"pipeline_parallel_size": 2})]
)
def test_parallel(
    results: Results, converted_llama: tuple[Path, Path], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Two workers, each with half of the model."""
    options = options | {"distributed_executor_backend": "mp"}
    models = zip(("source", "converted"), converted_llama, strict=True)
    jobs = [{"name": name, "model": str(model), "options": options} for name, model in models]
    # One core for each.
    found = run_jobs(tmp_path, jobs, timeout=600, VLLM_CPU_OMP_THREADS_BIND="0|1")
    if kind == "pipeline" and "error" in found["source"]:
        pytest.skip(f"vLLM does not run the source like this either: {found['source']['error']}")
    assert_same(found["converted"], found["source"])
    assert_same(found["converted"], results["llama"])
    assert found["converted"]["vectors"] == []


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
    assert "expected vLLM 0.27.0 or newer, found 0.11.0" in run.stderr.splitlines()[-1]
