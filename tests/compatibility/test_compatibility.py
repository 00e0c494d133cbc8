"""The table of `make compatibility`: what failed is said, and nothing is taken for what it is not."""

from pathlib import Path

import pytest

from compatibility import environments
from compatibility.checks import CHECKS, Place, Result, attempt, compare, read_report
from compatibility.document import document
from compatibility.environments import CannotBeInstalled, Environment
from compatibility.inside import way
from decoders import build, generate

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="bad"><failure message="assert 1 == 2&#10; more">trace</failure></testcase>
<testcase classname="tests.a" name="broken"><error message="no fixture">trace</error></testcase>
<testcase classname="tests.a" name="left"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_a_report_of_pytest(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    found = read_report(path)
    assert found == Result(
        "2 of 3 FAIL (1 skipped)", ["`tests.a::bad`: assert 1 == 2", "`tests.a::broken`: no fixture"]
    )
    path.write_text("<testsuites><testsuite/></testsuites>")
    assert read_report(path).cell == "no tests"


def test_what_fails_on_our_models_only() -> None:
    plain = {"test_a": "passed", "test_b": "passed", "test_c": "failed: as ever", "test_d": "skipped"}
    ours = {"test_a": "passed", "test_b": "failed: assert x", "test_c": "failed: as ever", "test_d": "skipped"}
    found = compare({"Llama": {"plain": plain, "optimised": ours}}, {"Llama, optimised": {"changed": 3}})
    assert found.cell == "1 fail on ours only"
    assert found.details == [
        "Llama, optimised: 1 of the 2 that pass plain; models: 3 changed",
        "Llama, optimised: `test_b` failed: assert x",
    ]


def test_what_folded_models_are_meant_to_fail() -> None:
    test = "test_load_save_without_tied_weights"
    ways = {"plain": {test: "passed"}, "folded": {test: "failed: keys"}}
    found = compare({"Llama": ways}, {"Llama, folded": {"changed": 1}})
    assert found.cell == "none fails on ours only"
    assert "as meant" in found.details[1]
    ways["optimised"] = ways.pop("folded")
    assert compare({"Llama": ways}, {"Llama, optimised": {"changed": 1}}).cell == "1 fail on ours only"


def test_a_row_that_failed_says_so() -> None:
    row = {"name": "torch-9", "versions": {}, "machine": "m", "problem": "no space | left", "results": {}}
    good = row | {"name": "torch-8", "problem": "", "results": {"greedy": {"cell": "equal", "details": ["because"]}}}
    text = document([row, good])
    assert "| torch-9 |  | not tried: no space / left |" in text
    assert "### torch-8: greedy text in float32; who ran\n\n* because\n" in text
    rows = [line.count("|") for line in text.splitlines() if line.startswith("| ")]
    assert len(set(rows)) == 1


def test_a_check_that_ends_without_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(place: Place) -> Result:
        raise CannotBeInstalled("no such version\nmore")

    monkeypatch.setitem(CHECKS, "greedy", ("greedy", fails))
    place = Place(environments.ENVIRONMENTS[0], Path(), Path(), None, Path())
    assert attempt("greedy", place) == Result("FAILED: no such version")


def test_the_table_of_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "newest", lambda package: environments.TRANSFORMERS)
    found = environments.resolved()
    assert len({one.name for one in found}) == len(found)
    assert [one.package for one in found if one.is_pin] == ["transformers"]
    assert {check for one in environments.ENVIRONMENTS for check in one.checks} <= CHECKS.keys()
    assert Environment("lm-eval[hf]", "1", ()).name == "lm-eval-1"


def test_who_ran_is_seen_from_outside() -> None:
    model = build("llama")
    assert way(model, lambda: generate(model)) == "Transformers"
