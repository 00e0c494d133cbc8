"""`flashnorm.integrations.vllm.compare`: what it makes of two runs, and the command in the real vLLM."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashnorm
from flashnorm.integrations.vllm import compare
from flashnorm.integrations.vllm.compare import Predictions, agreement
from integrations.conftest import needs_vllm, smollm2, vllm_environment

FIRST = {"1": math.log(0.5), "2": math.log(0.25), "3": math.log(0.125)}


def test_the_same() -> None:
    found = agreement(Predictions([FIRST, FIRST], [[1, 2]]), Predictions([FIRST, FIRST], [[1, 2]]))
    assert found == compare.Agreement(2, 2, 2, 0.0, 0.0, 0.0, 1, 1)
    assert found.ok


def test_differences() -> None:
    """The divergence of three probabilities and the rest, by its formula; the second place is the same."""
    other = {"1": math.log(0.25), "2": math.log(0.5), "4": math.log(0.2)}
    found = agreement(Predictions([FIRST, FIRST], [[1, 2], [3]]), Predictions([other, FIRST], [[1, 2], [4]]))
    assert (found.tokens, found.same_best, found.among_best) == (2, 1, 2)
    assert (found.continuations, found.same_continuations) == (2, 1)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)  # of all others, both have a quarter
    assert found.largest == pytest.approx(math.log(2))
    assert found.largest_kl == pytest.approx(expected, rel=1e-12)
    assert found.mean_kl == pytest.approx(expected / 2, rel=1e-12)
    assert found.ok


@pytest.mark.parametrize(
    "other",
    [
        {"2": -1.0, "3": -2.0, "4": -3.0},  # lacks the best token of the first
        {"4": -0.5, "1": -1.0, "2": -2.0},  # its best token is not in the first
        {"1": math.nan, "2": -1.0},
    ],
)
def test_another_model(other: dict[str, float]) -> None:
    assert not agreement(Predictions([FIRST], []), Predictions([other], [])).ok


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    with pytest.raises(flashnorm.InputError, match="expected vLLM in this environment"):
        compare.compare("source", "out", ["float32"], "text", {})


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashnorm.integrations.vllm.compare", *map(str, arguments)]
    environment = vllm_environment(folder)
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)


@needs_vllm
def test_command(tmp_path: Path) -> None:
    """SmolLM2 in float32 against its source; and against what is no model."""
    original = smollm2(tmp_path, torch.bfloat16)
    flashnorm.convert(original, tmp_path / "converted")
    options = ("--json", "--dtype", "float32", "--vllm", json.dumps({"enforce_eager": True}))
    ended = run(original, tmp_path / "converted", *options, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (found,) = json.loads(ended.stdout).values()
    assert found["same_best"] == found["among_best"] == found["tokens"] > 300
    assert found["same_continuations"] == found["continuations"] == compare.PARTS
    assert found["largest_kl"] < 1e-6
    (tmp_path / "empty").mkdir()
    ended = run(original, tmp_path / "empty", *options, folder=tmp_path)
    assert ended.returncode == 2
    assert f"{tmp_path / 'empty'}: expected vLLM to run it in float32, found" in ended.stderr
