"""Real vLLM on the CPU: converted with `--keep final`, for what reads the final norm's output (`make test-vllm`)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashnorm
from integrations.conftest import FINAL, Results, assert_same, job, needs_vllm, run_jobs, source

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("vllm")
    original, kept, folded = source(folder, "llama"), folder / "kept", folder / "folded"
    flashnorm.convert(original, kept, keep=["final"])
    flashnorm.convert(original, folded)
    head = eagle_head(folder / "head", original)
    speculation = {"method": "eagle", "model": str(head), "num_speculative_tokens": 2}
    found: Results = {}
    for name, model in (("source", original), ("kept", kept)):
        options = {"runner": "pooling", "convert": "embed"}
        found |= run_jobs(folder, [job(f"{name} pooled", model, task="pool", options=options)], 300)
        # After a draft model no other model can be built in its process.
        drafted = {"speculative_config": speculation, "disable_log_stats": False}
        found |= run_jobs(folder, [job(name, model), job(f"{name} with EAGLE", model, options=drafted)], 600)
    return found


def eagle_head(folder: Path, original: Path) -> Path:
    """An EAGLE head of the tiny Llama whose guesses are often right: it takes over the hidden state that it reads.

    Its MLP and attention add nothing, so that it guesses that the last token comes again, which tiny models often do.
    """
    folder.mkdir()
    config = json.loads((original / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    tensors = {
        name.removeprefix("model."): tensor.clone()
        for name, tensor in load_file(original / "model.safetensors").items()
        if name.startswith(layer) and "input_layernorm" not in name
    }
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"layers.0.{name}.weight"].zero_()
    hidden = config["hidden_size"]
    tensors["fc.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_final_norm_is_kept(results: Results) -> None:
    assert_same(results["kept"], results["source"])
    assert results["kept"]["vectors"] == [FINAL]


def test_eagle(results: Results) -> None:
    """The head reads the same hidden states: as many of its guesses are right, and the tokens stay the same."""
    found: list[dict[str, Any]] = [results[f"{name} with EAGLE"] for name in ("source", "kept")]
    assert all("error" not in result for result in found), found
    assert all(result["tokens"] == results["source"]["tokens"] for result in found)
    assert found[0]["accepted"] > 0
    assert found[0]["accepted"] == found[1]["accepted"]


def test_pooling(results: Results) -> None:
    original, kept = (torch.tensor(results[f"{name} pooled"]["pooled"]) for name in ("source", "kept"))
    assert original.std() > 0
    torch.testing.assert_close(kept, original, rtol=0, atol=1e-5)
