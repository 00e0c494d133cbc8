"""Disturbs the real command, `python -m flashnorm convert`, on a real model. Prints a row of counts for each kind.

* `signals`: SIGKILL, SIGTERM or SIGINT, half of them after a random time, half of them while it writes.
* `full`: a file system of its own (tmpfs) that another file fills while it writes; needs the right to mount.
* `pairs`: two commands at one target at once.

Afterwards the target is absent, the old model, or the new one, whole; nothing printed a traceback; the same command
again ends with the bytes of an undisturbed one. Run it by `python tests/reliability/commands.py --help`,
with `PYTHONPATH=tests`.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import REFUSED, SENT, Outcomes, count

import tiny
from flashnorm.files.staging import staging_folder
from handmade import OLD, content

# Some 40 MB, so that there is time to disturb.
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 4096}


class Place:
    """A source, the bytes that its conversion must have, and a folder for targets."""

    def __init__(self, folder: Path):
        self.source = tiny.save(folder / "source", tiny.model(tiny.config("llama", **SIZES)))
        self.targets = folder / "targets"
        self.targets.mkdir()
        self.target = self.targets / "out"
        started = time.monotonic()
        assert self.wait(self.start()) == 0, self.said
        self.seconds = time.monotonic() - started
        self.whole = content(self.target)

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flashnorm", "convert", str(self.source), str(self.target), *options]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        # Ctrl-C reaches it even if this one runs in the background of a shell.
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait(self, process: subprocess.Popen[str]) -> int:
        self.said = process.communicate()[0]
        return process.returncode

    def until_it_writes(self, process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not (staging_folder(self.target) / "model").exists():
            time.sleep(0.002)

    def fresh(self, old: bool) -> list[str]:
        """Nothing at the target, or an old model; the options that go with it."""
        subprocess.run(["rm", "-rf", self.target], check=True)
        if not old:
            return []
        self.target.mkdir()
        for name, data in OLD.items():
            (self.target / name).write_bytes(data)
        return ["--force"]

    def check(self, old: bool) -> list[str]:
        """What is wrong after a disturbed command; then repeats it."""
        found = content(self.target) if self.target.exists() else None
        wrong = [] if found in (self.whole, OLD if old else None) else ["target MIXED"]
        if "Traceback" in self.said:
            wrong.append(self.said[-500:])
        if self.wait(self.start("--force")) or content(self.target) != self.whole:
            wrong.append(f"repeated: {self.said[-500:]}")
        if (left := [path.name for path in self.targets.iterdir()]) != ["out"]:
            wrong.append(f"left: {left}")
        return wrong


def signals(place: Place, runs: int, chance: random.Random) -> Outcomes:
    """A signal at a random moment."""
    for number in range(runs):
        sent, old, writing = SENT[number % 3], bool(number // 3 % 2), bool(number // 6 % 2)
        process = place.start(*place.fresh(old))
        if writing:
            place.until_it_writes(process)
        time.sleep(chance.uniform(0, 0.2 if writing else place.seconds))
        process.send_signal(sent)
        code = place.wait(process)
        # While torch and Transformers are imported, Ctrl-C ends the program as it ends any in Python.
        if sent is signal.SIGINT and place.said.endswith("KeyboardInterrupt\n") and "cli.py" not in place.said:
            place.said, outcome = "", "SIGINT: before it began"
        else:
            outcome = f"{sent.name}: status {code}"
        known = code in (0, -sent, 128 + sent) or outcome.endswith("began")
        wrong = [] if known else [f"status {code}: {place.said[-500:]}"]
        yield outcome, [*wrong, *place.check(old)]


def full(place: Place, runs: int, chance: random.Random) -> Outcomes:
    """Another file takes the room while the command writes."""
    size = sum(map(len, place.whole.values()))
    subprocess.run(["rm", "-rf", place.target], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size + (1 << 20)}", "none", place.targets], check=True)
    try:
        for number in range(runs):
            old = bool(number % 2)
            process = place.start(*place.fresh(old))
            place.until_it_writes(process)
            with (place.targets / "another").open("wb") as other:
                usage = os.statvfs(place.targets)
                # So much that less than the output finds room.
                taken = usage.f_bavail * usage.f_frsize - chance.randint(0, size)
                with contextlib.suppress(OSError):  # the command was quicker
                    os.posix_fallocate(other.fileno(), 0, max(1, taken))
                code = place.wait(process)
            (place.targets / "another").unlink()
            wrong = [] if code in (0, REFUSED) else [f"status {code}: {place.said[-500:]}"]
            yield f"status {code}", [*wrong, *place.check(old)]
    finally:
        subprocess.run(["umount", place.targets], check=True)


def pairs(place: Place, runs: int, chance: random.Random) -> Outcomes:
    """Two commands at once."""
    for number in range(runs):
        old = bool(number % 2)
        options = place.fresh(old)
        first = place.start(*options)
        time.sleep(chance.uniform(0, 0.3))
        second = place.start(*options)
        codes, said = [], ""
        for process in (first, second):
            codes.append(place.wait(process))
            said += place.said
        place.said = said
        wrong = [] if 0 in codes and set(codes) <= {0, REFUSED} else [f"statuses {codes}"]
        yield f"statuses {sorted(codes)}", [*wrong, *place.check(old)]


KINDS = {"signals": signals, "full": full, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(count("commands", arguments, KINDS[arguments.kind], Place(Path(folder))))


if __name__ == "__main__":
    main()
