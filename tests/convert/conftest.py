from pathlib import Path

import pytest

from handmade import Handmade, make


@pytest.fixture
def source(tmp_path: Path) -> Handmade:
    return make(tmp_path / "source", shards=3)
