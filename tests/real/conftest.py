"""SmolLM2-135M and Gemma 3 270M, built once for a test run."""

from collections.abc import Callable
from pathlib import Path

import gemma3 as gemma3_example
import pytest
import smollm2 as smollm2_example
from filelock import FileLock


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16, as a user would have it. Not to be written to."""
    return built_once(tmp_path_factory, smollm2_example.build, "smollm2-135m")


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of Gemma 3 270M in bf16, as a user would have it. Not to be written to."""
    return built_once(tmp_path_factory, gemma3_example.build, "gemma3-270m")


def built_once(tmp_path_factory: pytest.TempPathFactory, build: Callable[[Path], Path], name: str) -> Path:
    # One for all processes of pytest-xdist: the parent of each one's folder.
    shared = tmp_path_factory.getbasetemp().parent
    with FileLock(shared / f"{name}.lock"):
        return build(shared / name)
