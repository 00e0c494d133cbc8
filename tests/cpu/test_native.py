"""The compiled kernels are those of these sources, or none are used."""

import ctypes
import logging
import os
import subprocess
from pathlib import Path

import pytest

from flashnorm.cpu.kernels import build, native


def with_layout(*layout: int) -> str:
    """The C code of a library that says this of itself."""
    numbers = ", ".join(map(str, layout))
    return f"long long layout[] = {{{numbers}}}; const long long* flashnorm_layout() {{ return layout; }}"


OTHERS = {
    "older than the question": "int flashnorm_isa_count() { return 1; }",
    "another number": with_layout(99, *native.LAYOUT[1:]),
    "another size": with_layout(*native.LAYOUT[:2], 8, *native.LAYOUT[3:]),
}


@pytest.mark.parametrize("code", OTHERS.values(), ids=OTHERS.keys())
def test_a_library_of_other_sources_is_refused(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other.c").write_text(code)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "other.so", tmp_path / "other.c"], check=True)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "other.so")
    with caplog.at_level(logging.WARNING, "flashnorm"):
        assert native.library.__wrapped__() is None
    assert f"expected kernels of layout {native.LAYOUT}" in caplog.text


def test_the_compiled_kernels_have_the_layout_of_these_sources() -> None:
    if not native.LIBRARY.exists():
        pytest.skip("the kernels are not compiled")
    assert native.library() is not None


@pytest.mark.slow
def test_every_instruction_set_compiles(tmp_path: Path) -> None:
    """Also those that this machine does not have, and that an editable install leaves out: it loses nothing by that."""
    if not native.LIBRARY.exists():
        pytest.skip("the kernels are not compiled")
    every = ctypes.CDLL(str(build.build(tmp_path / "every.so", ["-O0"])))
    every.flashnorm_isa_name.restype = ctypes.c_char_p
    offered = [every.flashnorm_isa_name(i).decode() for i in range(every.flashnorm_isa_count())]
    assert offered == native.instruction_sets()


def test_the_library_is_current_while_no_source_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "library.so")
    source = tmp_path / "simd.h"
    source.touch()
    assert not build.is_current()
    build.LIBRARY.touch()
    after = source.stat().st_mtime + 100
    os.utime(build.LIBRARY, (after, after))
    assert build.is_current()
    os.utime(source, (after + 1, after + 1))
    assert not build.is_current()
