"""Reading past the page cache, or from it: which way ran, and that both give the same bytes."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flashnorm.files import direct_io
from flashnorm.files.direct_io import BLOCK, DirectReader, buffers

SIZE = 40 * BLOCK + 100


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (AttributeError, OSError):
        pytest.skip("this file system does not read past the page cache")
    return path


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each read went past the page cache."""
    ways: list[bool] = []
    preadv = os.preadv

    def noted(handle: int, *arguments: object) -> int:
        ways.append(bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT))
        return preadv(handle, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", noted)
    return ways


def drop(path: Path, start: int = 0, nbytes: int = 0) -> None:
    with path.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    path.read_bytes()


@pytest.mark.parametrize(("before", "past"), [(drop, True), (warm, False)], ids=["cold", "warm"])
def test_a_file_in_the_page_cache_is_read_from_there(
    file: Path, direct: list[bool], before: Callable[[Path], None], past: bool
) -> None:
    before(file)
    content = file.read_bytes() if not past else None
    found = b""
    with DirectReader(file) as reader:
        for start in range(0, SIZE, 7 * BLOCK - 5):
            found += bytes(reader.read(start, min(7 * BLOCK - 5, SIZE - start), next(buffers(1, 7 * BLOCK))))
    assert direct
    assert set(direct) == {past}
    assert found == (content or file.read_bytes())


def test_a_part_that_is_not_in_the_cache_is_read_past_it(file: Path, direct: list[bool]) -> None:
    half = 8 << 20  # the cache keeps pages in groups, and drops whole groups only
    file.write_bytes(os.urandom(2 * half))
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    content = file.read_bytes()
    drop(file, half, half)
    with DirectReader(file) as reader:
        parts = [bytes(reader.read(start, half, next(buffers(1, half)))) for start in (0, half)]
    assert b"".join(parts) == content
    assert direct == [False, True]


def test_looking_does_not_fill_the_cache(file: Path) -> None:
    drop(file)
    handle = os.open(file, os.O_RDONLY)
    try:
        for _ in range(2):
            assert not direct_io._in_page_cache(handle, 0, SIZE)
        warm(file)
        assert direct_io._in_page_cache(handle, 0, SIZE)
        assert not direct_io._in_page_cache(handle, 41 * BLOCK, BLOCK)
    finally:
        os.close(handle)


def test_somebody_elses_file_is_read_past_the_cache(
    file: Path, direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of such a file, the system says that all of it is in the cache."""
    warm(file)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with DirectReader(file) as reader:
        reader.read(0, SIZE, next(buffers(1, SIZE)))
    assert set(direct) == {True}
