"""Real vLLM on the CPU, the essentials: converted models against their sources (all of `make test-vllm-quick`)."""

from pathlib import Path

import pytest
import torch

import flashnorm
from integrations.conftest import (
    FINAL,
    Results,
    assert_same,
    job,
    needs_vllm,
    run_jobs,
    smollm2,
    source,
    tensors_changed,
)

pytestmark = needs_vllm

LINEAR = "model.layers.0.self_attn.o_proj.weight"

# Norms of each head, whose outputs are rotated.
HEADS = [f"model.layers.{layer}.self_attn.{part}_norm.weight" for layer in range(2) for part in "kq"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("vllm")
    models = {name: source(folder, name) for name in ("llama", "qwen3")}
    models["smollm2"] = smollm2(folder, torch.float32)
    jobs = []
    for name, original in models.items():
        converted: Path = folder / f"{name}-flashnorm"
        flashnorm.convert(original, converted)
        jobs += [job(name, original), job(f"{name} converted", converted)]
    damaged = tensors_changed(folder / "llama-flashnorm", folder / "damaged", lambda tensors: tensors.pop(LINEAR))
    return run_jobs(folder, [*jobs, job("damaged", damaged)], timeout=1200)


@pytest.mark.parametrize(("name", "norms", "kept"), [("llama", 5, []), ("qwen3", 9, HEADS), ("smollm2", 61, [FINAL])])
def test_converted(results: Results, name: str, norms: int, kept: list[str]) -> None:
    """The same tokens and probabilities; no parameter and no product with a gain are left, but of norms that stay."""
    original, converted = results[name], results[f"{name} converted"]
    assert_same(converted, original)
    assert len(original["vectors"]) == norms
    assert converted["vectors"] == kept
    assert set(original["state"]) - set(converted["state"]) == set(original["vectors"]) - set(kept)
    assert original["gain_products"] > 0
    assert converted["gain_products"] * norms == original["gain_products"] * len(kept)


def test_ordinary_models_are_left_alone(results: Results) -> None:
    assert results["llama"]["loads_as_ever"]
    assert not results["llama converted"]["loads_as_ever"]


def test_absent_linear(results: Results) -> None:
    assert f"found 1 absent: {LINEAR}" in results["damaged"].get("error", "no error")
