"""Progress for programs: one JSON object a line, at most one a second."""

import json

import pytest

from flashnorm import progress


def test_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 10.5, 12.0, 12.1, 12.2, 20.0, 20.2, 21.2])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.show_progress("converting", as_json=True) as shown:
        shown.bytes(1000, 9000)  # at 10 s: an earlier run had done them
        shown.bytes(1500, 9000)  # half a second later: no line
        shown.bytes(3000, 9000)
        shown.bytes(9000, 9000)  # the end is always told
        shown.bytes(9000, 9000)  # once
        shown.stage("verifying")
        shown.bytes(0, 5)  # soon after the stage's own line
        shown.bytes(5, 5)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        {"stage": "converting"},
        {"stage": "converting", "bytes": 1000, "total": 9000, "bytes_per_second": 0, "seconds_left": None},
        {"stage": "converting", "bytes": 3000, "total": 9000, "bytes_per_second": 1000, "seconds_left": 6.0},
        {"stage": "converting", "bytes": 9000, "total": 9000, "bytes_per_second": 3810, "seconds_left": 0.0},
        {"stage": "verifying"},
        {"stage": "verifying", "bytes": 5, "total": 5, "bytes_per_second": 5, "seconds_left": 0.0},
    ]


def test_no_bar_appears_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.show_progress("converting", as_json=False) as shown:
        shown.bytes(1, 2)
        shown.stage("verifying")
    assert capsys.readouterr() == ("", "")
