"""A short run of each attack. The long ones are `make attack`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("script", "kind", "runs"),
    [
        ("fuzz.py", "reader", 500),
        ("fuzz.py", "verify", 30),
        ("fuzz.py", "plan", 40),
        ("fuzz.py", "manifest", 40),
        ("fuzz.py", "load", 40),
        ("faults.py", "calls", 20),
        ("faults.py", "bytes", 20),
        ("faults.py", "signals", 10),
        ("faults.py", "pairs", 6),
        ("commands.py", "signals", 1),
    ],
)
def test_nothing_breaks(script: str, kind: str, runs: int) -> None:
    if kind in ("calls", "bytes") and shutil.which("cc") is None:
        pytest.skip("no C compiler for the library that lets calls fail")
    command = [sys.executable, Path(__file__).with_name(script), kind, "--runs", str(runs)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{script.removesuffix('.py')} {kind}: " in answer.stdout
