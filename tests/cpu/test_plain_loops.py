"""The kernels against plain loops in C++, element by element, without Python: `tests/cpu/plain`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flashnorm.cpu.kernels import build, native

HARNESS = Path(__file__).parent / "plain" / "compare.cpp"
COMPILER = os.environ.get("CXX", "c++")


@pytest.mark.slow
@pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no compiler")
def test_every_element_is_that_of_plain_loops(tmp_path: Path) -> None:
    program = tmp_path / "compare"
    command = [COMPILER, "-O2", "-std=c++20", "-fopenmp", "-Wno-psabi", f"-I{build.FOLDER}", HARNESS, build.LIBRARY]
    subprocess.run([*command, "-o", program], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(build.FOLDER)}
    ran = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    first, *kernels = ran.stdout.splitlines()
    assert first.startswith("vectors of 4 lanes: ")
    assert [line.partition(":")[0].removeprefix("kernels ") for line in kernels] == native.instruction_sets()


def test_a_cross_compiler_decides_about_the_instruction_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the machine that it runs on."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\n[ "$1" = -dumpmachine ] && echo aarch64-linux-gnu\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises((OSError, subprocess.CalledProcessError)):  # it compiles nothing
        build.build(tmp_path / "kernels.so")
    calls = (tmp_path / "calls").read_text()
    assert "-DFLASHNORM_ISA=flashnorm_base" in calls
    assert "-DFLASHNORM_SETS=1" in calls
    assert "-mavx2" not in calls
