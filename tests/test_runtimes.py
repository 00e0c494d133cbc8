"""`make runtimes`: what counts as the same, the table, and a run through a real worker."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import flashnorm
import tiny
from runtimes.compare import TOKENS, Run, compare, run
from runtimes.page import BEGIN, END, cell, rows_of, with_rows
from runtimes.table import KEEP, WAYS, WEIGHTLESS

WAY = next(way for way in WAYS if way.name == "flashnorm.load")


def a_run(seed: int = 0) -> Run:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    return Run("1.0", tuple(range(TOKENS)), logits.log_softmax(-1).numpy(), gains=3)


def test_a_run_is_the_same_as_itself() -> None:
    found = compare(a_run(), replace(a_run(), gains=0))
    assert found.ok
    assert (found.same, found.kl, found.largest, found.gains) == (TOKENS, 0, 0, (3, 0))
    assert cell(found) == f"same: {TOKENS} of {TOKENS} tokens, KL < 1e-8, 0e+00, gains 3 → 0"


def test_other_tokens_or_other_logits_are_different() -> None:
    other = compare(a_run(), replace(a_run(), tokens=(0, 1, 2, 9, *range(4, TOKENS))))
    assert (other.ok, other.same) == (False, 3)
    wrong = compare(a_run(), a_run(seed=1))
    assert not wrong.ok
    p, q = (torch.tensor(a_run(seed).log_probabilities).double() for seed in (0, 1))
    assert wrong.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert "DIFFERENT" in cell(wrong)


def test_what_is_not_finite_is_no_result() -> None:
    nothing = replace(a_run(), log_probabilities=np.full((5, 7), np.nan, np.float32))
    with pytest.raises(ValueError, match="not all finite"):
        compare(a_run(), nothing)


def test_rows_are_replaced_and_others_stay() -> None:
    page = f"# Title\n\n{BEGIN}\n{END}\n\nMore.\n"
    order = [("a", "x"), ("b", "x")]
    once = with_rows(page, ["one", "two"], {("b", "x"): ["b", "x", "1.0", "", cell("a | b")]}, order)
    nothing = ["a", "x", "", "not run", "not run"]
    assert rows_of(once) == {("a", "x"): nothing, ("b", "x"): ["b", "x", "1.0", "", "a \\| b"]}
    twice = with_rows(once, ["one", "two"], rows_of(once) | {("a", "x"): ["a", "x", "2.0", "same", ""]}, order)
    assert [row[:4] for row in rows_of(twice).values()] == [["a", "x", "2.0", "same"], ["b", "x", "1.0", ""]]
    assert twice.startswith("# Title\n")
    assert twice.endswith("\n\nMore.\n")


@pytest.mark.slow
def test_a_real_worker(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", tiny.model(tiny.config("llama")))
    flashnorm.convert(source, tmp_path / "out")
    broken = tmp_path / "broken"
    broken.mkdir()
    folders = {"source": source, WEIGHTLESS: tmp_path / "out", KEEP: broken}
    runs = run(WAY, Path(sys.executable), folders, [tiny.ids(1, 16)[0].tolist()])
    assert not runs["source"].error, runs["source"].error
    assert not runs[WEIGHTLESS].error, runs[WEIGHTLESS].error
    assert compare(runs["source"], runs[WEIGHTLESS]).ok
    assert "config.json" in runs[KEEP].error
