"""What SHA-256 costs by `hashlib`, that is by OpenSSL, by size of block and number of threads, each on its own.

* Once as it is, and where the processor has instructions for SHA-256, once without them: an environment variable hides
  them from OpenSSL. BLAKE2b stands beside them.
* Each candidate is a process of its own, and they take turns.

    python benchmarks/hashing.py [--rounds N]
"""

import argparse
import hashlib
import json
import os
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

GB = 1e9
BLOCKS = (1 << 20, 1 << 23)  # bytes
THREADS = (1, 2, 4)
BYTES = 1 << 26  # that a thread hashes
HIDDEN = {"OPENSSL_ia32cap": ":~0x20000000"}  # bit 29 of EBX of CPUID 7: SHA


def rates(algorithm: str) -> list[float]:
    """GB/s of all threads together, for each size of block and number of threads."""
    found = []
    for size in BLOCKS:
        block = os.urandom(size)

        def work(block: bytes = block) -> None:
            digest = hashlib.new(algorithm)
            for _ in range(BYTES // len(block)):
                digest.update(block)

        for count in THREADS:
            threads = [threading.Thread(target=work) for _ in range(count)]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found.append(count * BYTES / GB / (time.perf_counter() - started))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rates", metavar="ALGORITHM", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rates:
        print(json.dumps(rates(args.rates)))
        return
    import convert as base  # imports torch, which the processes that are measured need not

    cpu = Path("/proc/cpuinfo")
    has_instructions = cpu.exists() and "sha_ni" in cpu.read_text()
    candidates: dict[str, tuple[str, dict[str, str]]] = {"SHA-256": ("sha256", {})}
    if has_instructions:
        candidates["SHA-256 without the processor's instructions"] = "sha256", HIDDEN
    candidates["BLAKE2b"] = "blake2b", {}
    runs: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for _ in range(args.rounds):
        for name, (algorithm, settings) in candidates.items():
            command = [sys.executable, __file__, "--rates", algorithm]
            ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(ended.stdout))
    print(base.machine())
    print(f"{ssl.OPENSSL_VERSION}; the processor has {'' if has_instructions else 'no '}instructions for SHA-256 (x86)")
    print(f"\nGB/s of all threads together, {args.rounds} rounds: median (slowest to fastest)\n")
    columns = [(size, count) for size in BLOCKS for count in THREADS]
    names = [f"{size >> 20} MB, {count} thread{'s' * (count > 1)}" for size, count in columns]
    print(f"| blocks of | {' | '.join(names)} | times the rate of SHA-256 in the same round |")
    print("|---" * (len(columns) + 2) + "|")
    usual = runs["SHA-256"]
    for name, rounds in runs.items():
        cells = [spread(each) for each in zip(*rounds, strict=True)]
        beside = [
            one / other for mine, its in zip(rounds, usual, strict=True) for one, other in zip(mine, its, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} | {spread(beside) if rounds is not usual else ''} |")
    gains = {
        f"{count} threads beside one": [
            each[columns.index((size, count))] / each[columns.index((size, 1))] for each in usual for size in BLOCKS
        ]
        for count in THREADS[1:]
    }
    gains["blocks of 8 MB beside 1 MB"] = [
        each[columns.index((BLOCKS[1], count))] / each[columns.index((BLOCKS[0], count))]
        for each in usual
        for count in THREADS
    ]
    print("\nSHA-256, ratios in the same round: " + "; ".join(f"{what}: {spread(g)}" for what, g in gains.items()))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
