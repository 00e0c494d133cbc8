"""What this machine can do at most, measured: bytes read and arithmetic done a second, by all threads together.

python benchmarks/limits.py
"""

import ctypes
import functools
import mmap
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

_BYTES, _ROUNDS, _REPEATS = 2**29, 1_000_000, 5
# NEON's registers have another letter.
_REGISTER = "w" if platform.machine() in ("aarch64", "arm64") else "v"


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "limits.cpp"
        source.write_text(Path(__file__).with_suffix(".cpp").read_text().replace('"+v"', f'"+{_REGISTER}"'))
        target = source.with_suffix(".so")
        flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-Wno-psabi"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", target], check=True)
        library = ctypes.CDLL(str(target))
    library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    for name in ("multiply_add_float32", "multiply_add_bfloat16"):
        getattr(library, name).argtypes = (ctypes.c_int64, ctypes.c_int)
        getattr(library, name).restype = ctypes.c_double
    return library


@functools.cache
def _memory() -> torch.Tensor:
    """In large pages where there are such, as weights are; written to once, so that it is there."""
    memory = mmap.mmap(-1, _BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def bandwidth(threads: int) -> float:
    """Bytes a second, the best of a few."""
    memory = _memory()
    return _BYTES / _least_seconds(lambda: _library().read_memory(memory.data_ptr(), _BYTES, threads))


def arithmetic(dtype: torch.dtype, threads: int) -> float:
    """Operations a second, a product and a sum being two, in the fastest way that there is for a dtype."""
    operations = 0.0

    def run(name: str) -> None:
        nonlocal operations
        operations = getattr(_library(), name)(_ROUNDS, threads)

    if dtype == torch.bfloat16:
        seconds = _least_seconds(lambda: run("multiply_add_bfloat16"))
        if operations:
            return operations / seconds
    seconds = _least_seconds(lambda: run("multiply_add_float32"))
    return operations / seconds


def _least_seconds(run: Callable[[], object]) -> float:
    """Of a few runs."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Measure and print."""
    threads = torch.get_num_threads()
    print(f"reads {bandwidth(threads) / 1e9:.1f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{dtype}: {arithmetic(dtype, threads) / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
