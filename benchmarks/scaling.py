"""How `convert` scales with workers: measured here, and what a model fitted to it says of larger machines.

* Converts a synthetic checkpoint of several shards with 1, 2, ... workers, in turns, and a tiny one for what is fixed.
* `core seconds` are those that all processes of a run have used, which other work on the machine hardly changes;
  `seconds` are what passed.
* The model: seconds = fixed + max(core seconds a GB x bytes / cores, bytes read and written / disk, bytes / network,
  rounds x largest shard x seconds a GB of the busiest thread).

    python benchmarks/scaling.py [--folder DIR] [--rounds N] [--workers N ...]
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import convert as conversion
from convert import FLASHNORM, GB, drop_from_cache, machine, size_of

SHARD_BYTES = 310_000_000  # four shards of Qwen3-0.6B


class Used(NamedTuple):
    """What a run took: seconds that passed, and seconds of cores, of the process and its children."""

    seconds: float
    core_seconds: float


def used(source: Path, out: Path, workers: int) -> Used:
    """Convert by the command, and measure all of its processes."""
    shutil.rmtree(out, ignore_errors=True)
    drop_from_cache(source)
    before, started = os.times(), time.monotonic()
    conversion.run(sys.executable, "-c", FLASHNORM, "convert", source, out, "--workers", str(workers))
    seconds, after = time.monotonic() - started, os.times()
    shutil.rmtree(out)
    cores = after.children_user + after.children_system - before.children_user - before.children_system
    return Used(seconds, cores)


def busiest_thread() -> float:
    """Seconds a GB of the thread that hashes the source and folds: the most that one shard can go."""
    import hashlib

    import torch

    from flashnorm.arithmetic import fold_weight, gain_of
    from flashnorm.compat.torch import compute_alone
    from flashnorm.convert.shards import PIECE_BYTES

    compute_alone()
    weight = torch.randn(PIECE_BYTES // 8192, 4096).bfloat16()
    gain, out, digest = gain_of(torch.rand(4096).bfloat16()), torch.empty_like(weight), hashlib.sha256()
    data, found = memoryview(weight.view(torch.uint8).numpy()).cast("B"), []
    for _ in range(30):
        started = time.thread_time()
        digest.update(data)
        fold_weight(weight, gain, axis=1, out=out)
        found.append((time.thread_time() - started) / data.nbytes * GB)
    return statistics.median(found)


class Machine(NamedTuple):
    """What a projection is for. Rates are in GB/s, of all hosts together; reads and writes share the disk's."""

    name: str
    cores: int
    disk: float
    network: float | None = None


MACHINES = (
    Machine("16 cores, a disk of 5 GB/s", 16, 5),
    Machine("128 cores, a disk of 20 GB/s", 128, 20),
    Machine("8 hosts of 16 cores, a shared file system of 20 GB/s, 8 links of 3 GB/s", 128, 20, 24),
)
MODELS = {"16.4 GB in 5 shards": (16.4, 5), "470 GB in 118 shards": (470.0, 118), "810 GB in 191 shards": (810.0, 191)}


def projected(
    size: float, shards: int, machine: Machine, core_seconds: float, thread: float, fixed: float
) -> tuple[float, str]:
    """Seconds of a conversion, and what bounds it."""
    workers = min(shards, machine.cores // 2)
    bounds = {
        "cores": core_seconds * size / machine.cores,
        "disk": 2 * size / machine.disk,
        "network": 0.0 if machine.network is None else 2 * size / machine.network,
        "shards": math.ceil(shards / workers) * size / shards * thread,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return fixed + bounds[bound], bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"), help="where to work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    source, tiny, out = (arguments.folder / name for name in ("scaling", "scaling-tiny", "scaling-out"))
    for folder in (source, tiny, out):
        shutil.rmtree(folder, ignore_errors=True)
    conversion.MAX_SHARD_BYTES = SHARD_BYTES
    conversion.make_checkpoint("qwen3-0.6b", source)
    shards = len(list(source.glob("*.safetensors")))
    conversion.SHAPES["qwen3-0.6b"] |= {"hidden_size": 64, "intermediate_size": 64}
    conversion.MAX_SHARD_BYTES = 6_000_000
    conversion.make_checkpoint("qwen3-0.6b", tiny)
    size = (size_of(source) - size_of(tiny)) / GB
    runs: dict[tuple[int, bool], list[Used]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            for large in (True, False):
                runs[workers, large].append(used(source if large else tiny, out, workers))
    print(machine())
    print(f"\n{size_of(source) / GB:.2f} GB in {shards} shards, {arguments.rounds} rounds, medians\n")
    print("| workers | seconds | core seconds | of them fixed | core seconds a GB | GB/s without what is fixed |")
    print("|---|---|---|---|---|---|")
    fitted = {}
    for workers in arguments.workers:
        seconds, cores = (statistics.median(column) for column in zip(*runs[workers, True], strict=True))
        fixed_seconds, fixed = (statistics.median(column) for column in zip(*runs[workers, False], strict=True))
        fitted[workers] = (cores - fixed) / size
        rate = size / (seconds - fixed_seconds)
        print(f"| {workers} | {seconds:.1f} | {cores:.1f} | {fixed:.1f} | {fitted[workers]:.2f} | {rate:.2f} |")
    for folder in (source, tiny):
        shutil.rmtree(folder)
    thread = busiest_thread()
    core_seconds = max(fitted.values())
    fixed = statistics.median(run.core_seconds for run in runs[max(arguments.workers), False])
    print(f"\nthe busiest thread of a shard: {thread:.2f} seconds a GB")
    print("\nProjected, not measured:\n")
    print("| model | machine | seconds | bound by |")
    print("|---|---|---|---|")
    for model, (nbytes, count) in MODELS.items():
        for one in MACHINES:
            seconds, bound = projected(nbytes, count, one, core_seconds, thread, fixed)
            print(f"| {model} | {one.name} | {seconds:.0f} | {bound} |")
    print(json.dumps({"core_seconds_a_gb": core_seconds, "thread_seconds_a_gb": thread, "fixed": fixed}))


if __name__ == "__main__":
    main()
