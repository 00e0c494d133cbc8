"""Verifies the outputs of a synthetic model that does not fit into memory in float64: time and peak memory of each run.

    python benchmarks/verify_streamed.py [--shape qwen3-8b|qwen3-0.6b] [--folder DIR]

* The checkpoint is that of `convert.py`: true config and shapes, random weights. Its source and conversion stay in DIR.
* Streamed whatever the size, so that the small shape tries the same code.
* The memory is anonymous memory: pages of the checkpoint's files, which the system can drop at any time, do not count.
"""

import argparse
import threading
import time
from pathlib import Path

import flashnorm
from convert import make_checkpoint
from flashnorm.verify.outputs import verify_outputs


class PeakMemory(threading.Thread):
    """Samples the anonymous memory of this process, ten times a second; `gigabytes` is the most that was seen."""

    gigabytes = 0.0

    def __init__(self) -> None:
        super().__init__(daemon=True)

    def run(self) -> None:
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.gigabytes = max(self.gigabytes, int(status["RssAnon"].split()[0]) / 1e6)
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Verify the outputs of a model that does not fit into memory.")
    parser.add_argument("--shape", default="qwen3-8b", choices=("qwen3-8b", "qwen3-0.6b"))
    parser.add_argument("--folder", type=Path, default=Path("build/streamed"))
    arguments = parser.parse_args()
    source, converted = (arguments.folder / f"{arguments.shape}{suffix}" for suffix in ("", "-flashnorm"))
    if not source.exists():
        make_checkpoint(arguments.shape, source)
    if not converted.exists():
        flashnorm.convert(source, converted)
    memory, started = PeakMemory(), time.monotonic()
    memory.start()

    def stage(words: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s, {memory.gigabytes:5.1f} GB at most: {words}", flush=True)

    report = verify_outputs(source, converted, streamed=True, stage=stage)
    stage("done")
    for criterion in report.criteria:
        print(f"{'ok' if criterion.ok else 'NOT OK'}: {criterion.asked}: {criterion.found}")


if __name__ == "__main__":
    main()
