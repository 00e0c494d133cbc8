"""`make runtimes`: what counts as the same, the table, and a run through a real worker."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

import flashnorm
import tiny
from runtimes.__main__ import chosen as chosen_ways
from runtimes.__main__ import said
from runtimes.compare import NO_ANSWER, TOKENS, Run, compare, run
from runtimes.models import MODELS
from runtimes.page import BEGIN, END, NOT_RUN, PAGE, cell, put_table, rows_of, with_results
from runtimes.quantised import orders
from runtimes.speed import row as speed_row
from runtimes.table import KEEP, WAYS, WEIGHTLESS, Way
from runtimes.texts import IDS, SKIPPED, TEXTS, chosen

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


def test_results_are_replaced_and_others_stay() -> None:
    page = f"# Title\n\n{BEGIN}\n{END}\n\nMore.\n"
    ways = [Way("a", "", "", "", ("x",), "f(x)", "tokens"), Way("b", "", "", "", ("x", "y"), "g(x)", "gains")]
    once = with_results(page, ["one", "two"], ways, "two", {("b", "x"): ("1.0", "a | b")})
    nothing = [NOT_RUN, NOT_RUN]
    assert {key: list(row.values()) for key, row in rows_of(once).items()} == {
        ("a", "x"): ["a", "x", "", "f(x)", "tokens", *nothing],
        ("b", "x"): ["b", "x", "1.0", "g(x)", "gains", NOT_RUN, "a \\| b"],
        ("b", "y"): ["b", "y", "", "g(x)", "gains", *nothing],
    }
    # A column more, one in another place, another order of the rows, and one row less.
    ways = [replace(ways[1], forms=("x",)), ways[0]]
    twice = with_results(once, ["two", "three", "one"], ways, "one", {("a", "x"): ("2.0", "same")})
    assert [list(row.values()) for row in rows_of(twice).values()] == [
        ["b", "x", "1.0", "g(x)", "gains", "a \\| b", *nothing],
        ["a", "x", "2.0", "f(x)", "tokens", *nothing, "same"],
    ]
    assert twice.startswith("# Title\n")
    assert twice.endswith("\n\nMore.\n")


def test_a_crash_is_no_refusal() -> None:
    assert "not run: the source does not run either" in str(said(Run(error="Bad: x"), Run(error="Bad: x")))
    assert said(a_run(), Run(error="KeyError: x")) == "refused: `KeyError: x`"
    assert str(said(a_run(), Run(error=f"{NO_ANSWER}: killed"))).startswith("not run: ")
    assert said(a_run(), a_run()) == compare(a_run(), a_run())


def test_a_whole_name_takes_that_way_alone() -> None:
    names = ["flashnorm.load", "torch.compile, of flashnorm.load", "MLX"]
    ways = [Way(name, "", "", "", (), "") for name in names]
    assert [way.name for way in chosen_ways(ways, ["flashnorm.load", "mlx"])] == ["flashnorm.load", "MLX"]
    assert [way.name for way in chosen_ways(ways, ["load"])] == names[:2]
    assert chosen_ways(ways, [""]) == ways
    assert chosen_ways(ways, ["x"]) == [ways[2]]


def test_errors_name_no_folder_of_this_machine() -> None:
    assert (
        cell("refused: `Bad: /tmp/a-1/b/c.json: a/b | \x1b[96mc\x1b[0m < d`")
        == "refused: `Bad: c.json: a/b \\| c &lt; d`"
    )


def test_notes_are_told() -> None:
    told = compare(replace(a_run(), note="three"), replace(a_run(), note="four"))
    assert cell(told).endswith(", three → four")
    alike = compare(replace(a_run(), note="three"), replace(a_run(), note="three"))
    assert cell(alike).endswith(", three")


def test_every_cell_of_the_page_has_a_result_or_a_reason() -> None:
    rows = rows_of(PAGE.read_text())
    assert list(rows) == [(way.name, form) for way in WAYS for form in way.forms]
    cells = [row[model.name] for row in rows.values() for model in MODELS]
    assert [cell for cell in cells if not re.match("same: |refused: |not run: ", cell)] == []


def test_both_orders_are_compared_text_by_text() -> None:
    source = np.geomspace(1e-4, 1e-1, 16)
    found = orders(source, 1.1 * source, draws=100)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1))
    assert found.folded == pytest.approx(1.1 * found.source)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.2, 16))
    noisy = orders(source, source * noise)
    assert noisy.low < noisy.ratio < noisy.high
    # About two standard errors to either side.
    error = np.log(noise).std(ddof=1) / 4
    assert np.log(noisy.high / noisy.low) == pytest.approx(4 * error, rel=0.25)


def test_a_ratio_is_that_of_a_round() -> None:
    rounds = [[2e-3 * n, 1e-3 * n] for n in range(1, 12)]
    _, version, *cells = speed_row(WAY, {"version": "1.0", "times": dict.fromkeys(["2", "128"], rounds)})
    assert version == "1.0"
    assert cells == ["12.0 ms", "2.000 (2.000 to 2.000), 11 rounds"] * 2
    with pytest.raises(RuntimeError, match="no model"):
        speed_row(WAY, {"error": "no model"})


def test_texts_of_calibration_are_others() -> None:
    assert len({*chosen(0), *chosen(1)}) == 2 * TEXTS
    assert min(len(topics[name]) for name in chosen(0) + chosen(1)) > SKIPPED + 10 * IDS


def test_a_page_without_a_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- x -->"):
        put_table("# Title\n", "<!-- x -->", [["a"]])


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
