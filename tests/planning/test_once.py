"""A checkpoint is opened, built, traced and asked for its names once, whatever is done with it then."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import flashnorm
import tiny
from flashnorm.files.reader import Checkpoint
from flashnorm.planning import names, planned

OPENED, BUILT, TRACED, REVERSED = "checkpoints opened", "models built", "traces", "reversals of names"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of these is done from now on."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, staticmethod(counting) if isinstance(owner, type) else counting)

    count(Checkpoint, "open", OPENED)
    count(planned, "meta_model", BUILT)
    count(planned, "trace", TRACED)
    count(names, "stored_views", REVERSED)
    return counts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("once") / "source", tiny.model(tiny.config("llama"), torch.bfloat16))


def of(counts: Counter[str]) -> list[int]:
    return [counts[what] for what in (OPENED, BUILT, TRACED, REVERSED)]


def test_convert(source: Path, tmp_path: Path, counted: Counter[str]) -> None:
    flashnorm.convert(source, tmp_path / "out")
    assert of(counted) == [1, 1, 1, 1]


def test_load(source: Path, tmp_path: Path, counted: Counter[str]) -> None:
    flashnorm.convert(source, tmp_path / "out")
    counted.clear()
    flashnorm.load(tmp_path / "out")
    assert of(counted) == [1, 1, 1, 1]


@pytest.mark.slow
def test_verify(source: Path, tmp_path: Path, counted: Counter[str]) -> None:
    """The source once, and the result once; its plan is made afresh, on purpose."""
    flashnorm.convert(source, tmp_path / "out")
    counted.clear()
    assert flashnorm.verify(source, tmp_path / "out").ok
    assert of(counted) == [2, 2, 2, 2]


def test_convert_untied(tmp_path: Path, counted: Counter[str]) -> None:
    """The model with the tied head as well: it must do the same computation."""
    model = tiny.model(tiny.config("llama", tie_word_embeddings=True), torch.bfloat16)
    source = tiny.save(tmp_path / "source", model)
    counted.clear()
    flashnorm.convert(source, tmp_path / "out", untie=True)
    assert of(counted) == [1, 2, 2, 1]


@pytest.mark.slow
def test_convert_untied_and_verified(tmp_path: Path, counted: Counter[str]) -> None:
    """As `convert`, and then as `verify`, which asks again whether the untied model computes the same."""
    model = tiny.model(tiny.config("llama", tie_word_embeddings=True), torch.bfloat16)
    source = tiny.save(tmp_path / "source", model)
    counted.clear()
    result = flashnorm.convert(source, tmp_path / "out", untie=True, verify=True)
    assert result.report
    assert result.report.ok
    assert of(counted) == [3, 5, 5, 3]
