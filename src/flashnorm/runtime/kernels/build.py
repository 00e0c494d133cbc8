"""Compiles the kernels, when the package is installed from source; again by `python build.py [TARGET [FLAG ...]]`.

* One shared library without any dependency but the compiler's own runtime, so that it fits every release of torch. Its
  threads are those of torch: both use the OpenMP runtime that torch has loaded.
* `kernels.cpp` is compiled once for each instruction set; which one runs is decided when the library is loaded.
"""

import os
import platform
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
# Instruction set -> how to compile for it.
_X86 = {"base": [], "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}
_OTHER = {"base": []}


def build(target: Path = LIBRARY, flags: Sequence[str] = ()) -> Path:
    """Compile the library with `$CXX`, or else `c++`, and these flags besides.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: it does not compile; `stderr` says why.
    """
    compiler = os.environ.get("CXX", "c++")
    sets = _X86 if platform.machine().lower() in ("x86_64", "amd64") else _OTHER

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
        jobs.append(pool.submit(run, "-c", FOLDER / "dispatch.cpp", "-o", objects["dispatch"]))
        for job in jobs:
            job.result()
        linked = Path(scratch) / target.name
        run("-shared", *objects.values(), "-o", linked)
        # A library that is in use must not change under its users: a new file takes its name.
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        beside.write_bytes(linked.read_bytes())
        beside.replace(target)
    return target


if __name__ == "__main__":
    try:
        print(build(*map(Path, sys.argv[1:2]), flags=sys.argv[2:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stderr}\nthe kernels do not compile: {' '.join(map(str, error.cmd))}")
