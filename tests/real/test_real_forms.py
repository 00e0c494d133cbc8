"""What else becomes of both models: looked at by a dry run, some norms kept, trained, pushed to a hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashnorm
from hub_server import hub_server

pytestmark = pytest.mark.slow

PROMPT = "The three most important things to know about the moon are"


@dataclass(frozen=True)
class Real:
    """A model's folder, and what is known of it.

    Attributes:
        folder: the source.
        converted: a function that converts it, once.
        norms, linears: how many fold.
        last: a pattern for the norms of the last layers.
        folded_before_last: how many fold if these and the final norm are kept.
    """

    folder: Path
    converted: Callable[[], Path]
    norms: int
    linears: int
    last: str
    folded_before_last: int


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder, target = request.getfixturevalue(request.param), tmp_path_factory.mktemp("real") / "converted"

    def converted() -> Path:
        return target if target.exists() else flashnorm.convert(folder, target).target

    if request.param == "smollm2":
        return Real(folder, converted, norms=60, linears=150, last="model.layers.2?.*", folded_before_last=40)
    return Real(folder, converted, norms=36, linears=90, last="model.layers.1?.*", folded_before_last=20)


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {*file.keys()}


def test_a_dry_run_says_what_the_conversion_does(real: Real, tmp_path: Path) -> None:
    said = flashnorm.dry_run(real.folder, tmp_path / "out")
    assert (len(said.plan.folds), said.linears, said.undecided) == (real.norms, real.linears, {})
    assert not [*tmp_path.iterdir()]
    converted = real.converted()
    assert said.written == {"model.safetensors": (converted / "model.safetensors").stat().st_size}
    assert {name: (converted / name).stat().st_size for name in said.copied} == said.copied


def test_norms_that_are_to_be_kept(real: Real, tmp_path: Path) -> None:
    result = flashnorm.convert(real.folder, tmp_path / "out", untie=True, keep=["final", real.last])
    assert result.norms == real.folded_before_last
    kept = {"model.norm.weight", real.last.replace("?", "7").replace("*", "input_layernorm.weight")}
    assert kept <= names_in(result.target)
    assert flashnorm.verify(real.folder, result.target, weights_only=True).ok
    assert kept <= dict(flashnorm.load(result.target).named_parameters()).keys()


def test_trained_since(real: Real, tmp_path: Path) -> None:
    converted = real.converted()
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(converted)(PROMPT, return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(flashnorm.InputError, match="trained since"):
        flashnorm.load(tmp_path / "trained")
    again = flashnorm.convert(tmp_path / "trained", tmp_path / "again").target
    assert flashnorm.verify(tmp_path / "trained", again, weights_only=True).ok
    with torch.inference_mode():
        expected, found = model.eval()(ids).logits, flashnorm.load(again)(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_pushed_to_the_hub_and_fetched_again(real: Real, tmp_path: Path) -> None:
    """In a Python of its own, since huggingface_hub reads its settings when it is imported."""
    code = """
import json, sys
import flashnorm
from flashnorm.models.load import load_tokenizer

result = flashnorm.convert(sys.argv[1], sys.argv[2], push_to_hub="me/real", private=True)
model, tokenizer = flashnorm.load("me/real"), load_tokenizer("me/real")
inputs = tokenizer("Once upon a time", return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
print(json.dumps({"pushed": result.pushed, "text": text}))
"""
    with hub_server() as hub:
        hub.writers["hf_write"] = {"me"}
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_write"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        command = [sys.executable, "-c", code, real.folder, tmp_path / "out"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
        assert result.returncode == 0, result.stderr
        said = json.loads(result.stdout)
        assert said["pushed"] == f"{hub.address}/me/real"
        assert hub.private == {"me/real"}
    [snapshot] = (tmp_path / "home" / "hub" / "models--me--real" / "snapshots").iterdir()
    names = {file.relative_to(snapshot) for file in snapshot.rglob("*") if file.is_file()}
    assert names == {file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert all((snapshot / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)
    tokenizer, model = AutoTokenizer.from_pretrained(real.folder), flashnorm.load(tmp_path / "out")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    with torch.inference_mode():
        assert said["text"] == tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
