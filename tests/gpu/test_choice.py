"""Which way is the fastest: measured once, and remembered."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from flashnorm.gpu import choice
from flashnorm.gpu.choice import fastest
from flashnorm.gpu.tiling import Tiling

WAYS = (Tiling(1, 4, 64, 4), Tiling(1, 8, 64, 4))


def test_without_a_gpu_the_guess_is_taken() -> None:
    def prepare() -> None:
        raise AssertionError("nothing is measured")

    assert fastest("a product", WAYS, prepare, torch.device("cpu"), plain=True) is WAYS[0]  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_what_was_measured_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice._known.cache_clear()
    short, long = torch.randn(8, device="cuda"), torch.randn(2**27, device="cuda")
    device, measured = torch.device("cuda", 0), 0

    def prepare(quick: Tiling | None) -> object:
        nonlocal measured
        measured += 1
        return lambda way: (short if way == quick else long).mul_(1)

    def ask(key: str, quick: Tiling | None) -> Tiling | None:
        return fastest(key, WAYS, lambda: prepare(quick), device, plain=True)  # type: ignore[arg-type, return-value]

    assert ask("one", WAYS[1]) == WAYS[1]
    assert ask("two", None) is None
    assert measured == 2
    assert ask("one", None) == WAYS[1]  # it is not measured again
    choice._known.cache_clear()  # as in another process
    assert ask("one", None) == WAYS[1]
    assert measured == 2
    choice._known.cache_clear()
    choice.file(0).write_text('{"one": {"best": [1, 2]}}')  # damaged: of another form
    assert ask("one", None) is None
    assert measured == 3
    choice._known.cache_clear()
