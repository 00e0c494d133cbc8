"""Compiles the kernels when the package is installed from source, or by `python build.py [TARGET [FLAG ...]]`.

* The result is one shared library that depends only on the compiler's own runtime, so it fits every release of torch.
  It shares torch's threads, because both use the OpenMP runtime that torch has loaded.
* `kernels.cpp` is compiled once for each instruction set. The best one is chosen when the library is loaded.
* An editable install is used on this machine only, so it leaves out the instruction sets that the machine does not
  have. It compiles nothing if no source has changed.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libflashnorm_kernels.so"

_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Instruction set -> the compiler flags for it. Each set includes the one before it.
_X86 = {"base": [], "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}
_OTHER = {"base": []}


def is_current() -> bool:
    """Whether the library exists and is newer than its sources."""
    sources = [Path(__file__), *FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")]
    return LIBRARY.exists() and LIBRARY.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def build(target: Path = LIBRARY, flags: Sequence[str] = (), only_here: bool = False) -> Path:
    """Compile the library with `$CXX`, or with `c++` if that is not set.

    Args:
        target: the library to write.
        flags: additional compiler flags.
        only_here: whether to leave out the instruction sets that this machine does not have.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: the kernels do not compile; `stderr` says why.
    """
    compiler = os.environ.get("CXX", "c++")
    sets = _X86 if _target(compiler).startswith(("x86_64", "amd64")) else _OTHER
    if only_here and sets is _X86:
        sets = _on_this_machine(compiler, sets)

    def run(*arguments: str | Path) -> None:
        subprocess.run([compiler, *_FLAGS, *flags, *arguments], check=True, capture_output=True, text=True)

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {isa: Path(scratch) / f"{isa}.o" for isa in (*sets, "dispatch")}
        jobs = [
            pool.submit(
                run, *extensions, f"-DFLASHNORM_ISA=flashnorm_{isa}", "-c", FOLDER / "kernels.cpp", "-o", objects[isa]
            )
            for isa, extensions in sets.items()
        ]
        count = f"-DFLASHNORM_SETS={len(sets)}"
        jobs.append(pool.submit(run, count, "-c", FOLDER / "dispatch.cpp", "-o", objects["dispatch"]))
        for job in jobs:
            job.result()
        linked = Path(scratch) / target.name
        run("-shared", *objects.values(), "-o", linked)
        # A process may be using the old library, so it is replaced by a new file and not overwritten.
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        beside.write_bytes(linked.read_bytes())
        beside.replace(target)
    return target


def _target(compiler: str) -> str:
    """The machine that a compiler compiles for, such as `x86_64-linux-gnu`; for a cross compiler, not this one."""
    return subprocess.run([compiler, "-dumpmachine"], check=True, capture_output=True, text=True).stdout.strip()


def _on_this_machine(compiler: str, sets: dict[str, list[str]]) -> dict[str, list[str]]:
    """The instruction sets up to the best one of this machine, according to the compiler's macros."""
    question = [compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull]
    macros = subprocess.run(question, check=True, capture_output=True, text=True).stdout.split()

    def runs(extensions: Sequence[str]) -> bool:
        return all(f"__{flag.removeprefix('-m').upper()}__" in macros for flag in extensions)

    return dict(itertools.takewhile(lambda one: runs(one[1]), sets.items()))


if __name__ == "__main__":
    try:
        print(build(*map(Path, sys.argv[1:2]), flags=sys.argv[2:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stderr}\nthe kernels do not compile: {' '.join(map(str, error.cmd))}")
