"""SmolLM2-135M, built once for a test run."""

import sys
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from smollm2 import build


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16, as a user would have it. Not to be written to."""
    # One for all processes of pytest-xdist: the parent of each one's folder.
    shared = tmp_path_factory.getbasetemp().parent
    with FileLock(shared / "smollm2.lock"):
        return build(shared / "smollm2-135m")
