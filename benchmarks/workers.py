"""What workers gain, where the time goes, and what a larger machine would take: measured parts, a model, a projection.

* A synthetic checkpoint of 2 GB in files of about the same size, with random bf16 weights in Qwen3's shapes. `convert`
  and `verify --weights-only` run with one and with two workers, and `cp -r` beside them. They take turns, with the
  source in the page cache and without. One worker keeps about two cores busy, so it runs on a single core as well: what
  two workers gain where there are cores enough is seen here only against that.
* The parts: SHA-256 in one thread and in two, reading and writing, a process that has next to nothing to convert.
* The model: seconds = max(bytes / disk, bytes / (cores x rate), bytes / network) + fixed. The rate of a core comes from
  the processor time of one process. Beside each measured time stands what the model says.
* The projection puts other numbers into the model. Nothing of it was measured.

    python benchmarks/workers.py [--folder DIR] [--rounds N]
"""

import argparse
import hashlib
import json
import os
import shutil
import ssl
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import convert as base

GB = 1e9
CORES = len(os.sched_getaffinity(0))
SHAPE = "qwen3-workers"
base.SHAPES[SHAPE] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "tie_word_embeddings": False,
}
SMALL = "qwen3-small"
base.SHAPES[SMALL] = base.SHAPES[SHAPE] | {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8}
base.MAX_SHARD_BYTES = 250_000_000

# What is put into the model: cores, disk in GB/s, network between hosts and disk in GB/s (None: the disk is local).
MACHINES: list[tuple[str, int, float, float | None]] = [
    ("8 cores, a disk of 3 GB/s", 8, 3.0, None),
    ("128 cores, disks of 20 GB/s", 128, 20.0, None),
    ("8 hosts of 16 cores, a shared file system of 20 GB/s, 10 Gbit/s each", 128, 20.0, 8 * 1.25),
    ("8 hosts of 16 cores, a shared file system of 20 GB/s, 100 Gbit/s each", 128, 20.0, 8 * 12.5),
]
MODELS = {"Qwen3-235B": 470.0, "GLM-4.5": 700.0, "Llama-3.1-405B": 810.0}  # GB in bf16


@dataclass(frozen=True)
class Run:
    """Seconds of a process and its children: wall, processor, and wall without its start and plan."""

    seconds: float
    processor: float
    inner: float


def run(*command: str | Path) -> Run:
    """Run a command; its output goes to ours only if it fails."""
    before = os.times()
    found = base.run(*command)
    after = os.times()
    processor = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    facts = json.loads(found.output or "{}")
    inner = facts["weights"]["seconds"] if "weights" in facts else facts.get("seconds", found.seconds)
    return Run(found.seconds, processor, inner)


def command(*words: str | Path) -> tuple[str | Path, ...]:
    """A command of flashnorm."""
    return sys.executable, "-c", base.FLASHNORM, *words


def hash_rates(block: bytes) -> tuple[float, float]:
    """GB/s of SHA-256 in one thread, and in two at once."""

    def rate(threads: int) -> float:
        started = time.monotonic()
        running = [threading.Thread(target=lambda: [hashlib.sha256(block) for _ in range(16)]) for _ in range(threads)]
        for one in running:
            one.start()
        for one in running:
            one.join()
        return threads * 16 * len(block) / GB / (time.monotonic() - started)

    return rate(1), rate(2)


def disk_rates(source: Path, out: Path) -> tuple[float, float, float]:
    """GB/s of reading past the page cache, of reading from it, and of writing past it, by the converter's own code."""
    from flashnorm.files.direct_io import DirectReader, DirectWriter, buffers

    size = 1 << 23
    ring = buffers(2, size)
    path = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)

    def reading() -> float:
        started = time.monotonic()
        with DirectReader(path) as file:
            for start in range(0, file.size, size):
                file.read(start, min(size, file.size - start), next(ring))
            return file.size / GB / (time.monotonic() - started)

    base.drop_from_cache(source)
    cold = reading()
    base.read_into_cache(source)
    cached = reading()
    started = time.monotonic()
    with DirectWriter(out) as file:
        for _ in range(64):
            buffer = next(ring)
            file.window(size, buffer)
            file.write(size, buffer)
        file.finish()
    written = 64 * size / GB / (time.monotonic() - started)
    out.unlink()
    return cold, cached, written


def measure(work: Path, rounds: int) -> dict[tuple[str, int, int, bool], list[Run]]:
    """(what, workers, cores, warm) -> the runs. The contenders take turns."""
    source, out, copy = work / SHAPE, work / "out", work / "copy"
    results: dict[tuple[str, int, int, bool], list[Run]] = {}

    def turn(what: str, workers: int, cores: int, cached: bool) -> None:
        for folder in (out, copy):
            if what != "verify" or folder == copy:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in (source, *([out] if what == "verify" else [])):
            base.read_into_cache(folder) if cached else base.drop_from_cache(folder)
        words: dict[str, tuple[str | Path, ...]] = {
            "cp -r": ("cp", "-r", source, copy),
            "convert": command("convert", source, out, "--workers", str(workers), "--json"),
            "verify": command("verify", source, out, "--weights-only", "--workers", str(workers), "--json"),
        }
        pinned = ("taskset", "--cpu-list", "0") if cores == 1 else ()
        results.setdefault((what, workers, cores, cached), []).append(run(*pinned, *words[what]))

    contenders = [(1, 1), (1, CORES), (2, CORES)]
    for number in range(rounds):
        for cached in (True, False) if number % 2 else (False, True):
            turn("cp -r", 1, CORES, cached)
            for workers, cores in contenders if number % 2 else contenders[::-1]:
                turn("convert", workers, cores, cached)
                turn("verify", workers, cores, cached)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"), help="where to work")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report(Path(folder), args.rounds)


def report(work: Path, rounds: int) -> None:
    """Measure and print."""
    for shape in (SHAPE, SMALL):
        base.make_checkpoint(shape, work / shape)
    size = base.size_of(work / SHAPE) / GB
    print(base.machine())
    flags = Path("/proc/cpuinfo").read_text()
    print(f"{ssl.OPENSSL_VERSION}; the processor has {'' if 'sha_ni' in flags else 'no '}instructions for SHA-256")
    one, two = hash_rates(os.urandom(1 << 25))
    cold, cached, written = disk_rates(work / SHAPE, work / "written")
    print(f"\nSHA-256: {one:.2f} GB/s in one thread, {two:.2f} GB/s in two at once")
    print(
        f"reading past the page cache: {cold:.2f} GB/s; from it: {cached:.2f} GB/s; writing past it: {written:.2f} GB/s"
    )

    results = measure(work, rounds)
    fixed = {}
    for what, words in {"convert": (), "verify": ("--weights-only",)}.items():
        fixed[what] = run(*command(what, work / SMALL, work / "small-out", *words, "--workers", "1", "--json"))
    medians = {key: statistics.median(each.seconds for each in runs) for key, runs in results.items()}
    inner = {key: statistics.median(each.inner for each in runs) for key, runs in results.items()}
    rate = {
        what: size
        / (statistics.median(each.processor for each in results[what, 1, CORES, True]) - fixed[what].processor)
        for what in fixed
    }

    def model(what: str, gigabytes: float, cores: float, reads: float, writes: float, network: float | None) -> float:
        disk = gigabytes / reads + (gigabytes / writes if what == "convert" else gigabytes / reads)
        return max(disk, gigabytes / (cores * rate[what]), 2 * gigabytes / network if network else 0.0)

    print(f"\n{size:.2f} GB, {rounds} rounds, median (slowest) seconds of whole processes\n")
    print(
        "| | source | workers | cores | seconds | ratio to `cp -r` | model says | without start and plan "
        "| one worker on a core / it | one worker / it |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for key, runs in sorted(results.items(), key=lambda item: (item[0][0], item[0][3], item[0][1:3])):
        what, workers, cores, is_warm = key
        cells = [what, "cached" if is_warm else "cold", "", "", "", "", "", "", "", ""]
        cells[4] = f"{medians[key]:.1f} ({max(each.seconds for each in runs):.1f})"
        cells[5] = f"{medians[key] / medians['cp -r', 1, CORES, is_warm]:.2f}"
        if what in fixed:
            says = model(what, size, min(cores, 2 * workers), cached if is_warm else cold, written, None)
            cells[2:4] = str(workers), str(cores)
            cells[6:8] = f"{says + fixed[what].seconds:.1f}", f"{inner[key]:.1f}"
            cells[8:] = (f"{inner[what, 1, among, is_warm] / inner[key]:.2f}" for among in (1, CORES))
        print(f"| {' | '.join(cells)} |")
    print(
        "\nFitted: "
        + "; ".join(f"{what}: {rate[what]:.2f} GB/s a core, {fixed[what].seconds:.1f} s fixed" for what in fixed)
    )
    print("\nProjection, not measured: minutes of `convert` / `verify --weights-only`\n")
    print(f"| | {' | '.join(f'{name} ({int(nbytes)} GB)' for name, nbytes in MODELS.items())} | bound by |")
    print("|---" * (len(MODELS) + 2) + "|")
    for name, cores, disk, network in MACHINES:
        cells = []
        for nbytes in MODELS.values():
            minutes = ((model(what, nbytes, cores, disk, disk, network) + fixed[what].seconds) / 60 for what in fixed)
            cells.append(" / ".join(f"{one:.1f}" for one in minutes))
        bounds = {"disk": 2 / disk, "cores": 1 / (cores * rate["convert"]), "network": 2 / network if network else 0.0}
        print(f"| {name} | {' | '.join(cells)} | {max(bounds, key=lambda key: bounds[key])} |")


if __name__ == "__main__":
    main()
