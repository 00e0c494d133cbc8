"""Fixtures of the tests of `verify`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from toy_checkpoints import Converted, make


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Converted]:
    """`toy_checkpoints.make` in a folder of its own."""
    return partial(make, tmp_path)
