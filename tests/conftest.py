"""Settings of all tests."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from flashnorm.cpu.kernels import native

# Without a GPU, kernels in Triton run in its interpreter, which has to be asked for before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Continuous integration runs the same examples every time; everybody else finds new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", type=Path, help="test these compiled kernels instead of the package's own")
    parser.addoption("--sequences", type=int, default=25, help="how many random sequences tests/cpu tries")


def pytest_configure(config: pytest.Config) -> None:
    if kernels := config.getoption("--kernels"):
        native.LIBRARY = kernels
        assert native.instruction_sets(), f"{kernels} cannot be loaded"
