"""Stops `convert` in every way, and looks at what is left. Prints a row of counts for each kind of fault.

* `calls`: each call that writes, syncs, renames, makes or removes fails once, with ENOSPC and with EIO.
* `bytes`: the disk is full after every so many bytes.
* `signals`: SIGKILL, SIGTERM or SIGINT after a random time.
* `pairs`: two runs at one target at once, with the same or with other options.

All of them with a new target, and (`--force`) in place of an old model. Afterwards the target is absent, the old one,
or the new one, whole; a repeated run ends with the bytes of an undisturbed one and leaves nothing else. Each run is a
process, forked from this one. Run it by `python tests/reliability/faults.py --help`, with
`PYTHONPATH=tests`; it needs a C compiler (`cc`).
"""

import argparse
import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashnorm.convert import shards as shard
from flashnorm.convert.whole import convert_checkpoint
from flashnorm.errors import InputError
from handmade import OLD, Handmade, content, make

# What became of each run, and what is wrong with that.
Outcomes = Iterator[tuple[str, list[str]]]

REFUSED, CRASHED = 2, 99
SENT = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Place:
    """A source, the bytes that its conversion must have, and a folder for targets."""

    def __init__(self, folder: Path):
        self.source: Handmade = make(folder / "source", shards=3)
        (self.source.folder / "tokenizer.json").write_text("{}")
        self.targets = folder / "targets"
        self.log = folder / "log"
        self.whole = {}
        for keep_norms in (False, True):
            target = folder / f"undisturbed-{keep_norms}"
            assert self.wait(self.start(target, keep_norms=keep_norms)) == 0, self.log.read_text()
            self.whole[keep_norms] = content(target)

    def start(
        self,
        target: Path,
        *,
        force: bool = False,
        keep_norms: bool = False,
        armed: Callable[[], object] = lambda: None,
        done: Callable[[], object] = lambda: None,
    ) -> int:
        """Begin a run in a process of its own, which calls `armed` before it and `done` after it; its number."""
        # Not before it can be caught: the child must never go on as the parent.
        signal.pthread_sigmask(signal.SIG_BLOCK, SENT)
        if (process := os.fork()) > 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT)
            return process
        code = CRASHED
        shard.PIECE_BYTES = 256  # more calls, more moments
        try:
            # As the command line does, and the interpreter, unless it runs in the background of a shell.
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT)
            armed()
            source = self.source
            convert_checkpoint(source.planned(), target, force=force, keep_norms=keep_norms)
            done()
            code = 0
        except InputError:
            code = REFUSED
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except SystemExit as error:
            code = int(str(error.code))
        except BaseException:
            self.log.write_text(traceback.format_exc())
        finally:
            os._exit(code)

    def wait(self, process: int) -> int:
        """Its exit status; a signal's number is negative."""
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def fresh(self, force: bool) -> Path:
        """A target in an empty folder: absent, or an old model."""
        shutil.rmtree(self.targets, ignore_errors=True)
        target = self.targets / "out"
        self.targets.mkdir()
        if force:
            target.mkdir()
            for name, data in OLD.items():
                (target / name).write_bytes(data)
        return target

    def state(self, target: Path) -> str:
        """What is at the target."""
        if not os.path.lexists(target):
            return "absent"
        found = content(target)
        return "old" if found == OLD else "new" if found in self.whole.values() else "MIXED"

    def check(self, target: Path, force: bool, code: int) -> list[str]:
        """What is wrong after a run that was disturbed and has ended; then repeats it."""
        state = self.state(target)
        wrong = [] if state in (("old", "new") if force else ("absent", "new")) else [f"target {state}"]
        if code == CRASHED:
            wrong.append(f"crashed: {self.log.read_text()[-500:]}")
        if code == 0 and state != "new":
            wrong.append("success without a target")
        again = self.wait(self.start(target, force=True))
        if again or content(target) != self.whole[False]:
            wrong.append(f"repeated: status {again}, {self.state(target)}")
        if (left := [path.name for path in self.targets.iterdir()]) != ["out"]:
            wrong.append(f"left: {left}")
        return wrong


def library(folder: Path) -> Path:
    """The disk that fails, compiled."""
    built = folder / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", built, source, "-ldl"], check=True)
    return built


def disk() -> ctypes.CDLL:
    """The preloaded library."""
    loaded = ctypes.CDLL(None)
    loaded.disk_fails.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_long)
    loaded.disk_room.restype = ctypes.c_long
    return loaded


def used(place: Place) -> tuple[int, int]:
    """How many calls that could fail an undisturbed run makes, and how many bytes it writes."""
    read, write = os.pipe()
    room = 1 << 40

    def done() -> None:
        os.write(write, f"{disk().disk_calls()} {room - disk().disk_room()}".encode())

    process = place.start(place.fresh(True), force=True, armed=lambda: disk().disk_fails(-1, 0, room), done=done)
    assert place.wait(process) == 0
    calls, size = os.read(read, 100).split()
    return int(calls), int(size)


def calls(place: Place, runs: int, chance: random.Random) -> Outcomes:
    """The call number 1, 2, 3, ... fails, up to the last; with `runs`, only some of them."""
    last, _ = used(place)
    for force in (False, True):
        for error in (errno.ENOSPC, errno.EIO):
            at = 0
            while True:
                at += 1 if not runs else chance.randint(1, 8)
                target = place.fresh(force)

                def armed(at: int = at, error: int = error) -> None:
                    disk().disk_fails(at, error, -1)

                code = place.wait(place.start(target, force=force, armed=armed))
                wrong = place.check(target, force, code)
                yield f"status {code}", wrong
                if at > last:
                    break


def full(place: Place, runs: int, chance: random.Random) -> Outcomes:
    """There is room for ever more bytes, up to enough; with `runs`, not every number of them."""
    _, size = used(place)
    for force in (False, True):
        step = max(1, size // max(1, runs // 2)) if runs else 1
        for room in range(0, size + step, step):
            target = place.fresh(force)
            armed = lambda room=room: disk().disk_fails(-1, 0, room)  # noqa: E731
            code = place.wait(place.start(target, force=force, armed=armed))
            yield f"status {code}", place.check(target, force, code)


def signals(place: Place, runs: int, chance: random.Random) -> Outcomes:
    """A signal after a random time."""
    target = place.fresh(False)
    started = time.monotonic()
    place.wait(place.start(target))
    duration = time.monotonic() - started
    for number in range(runs):
        force, sent = bool(number % 2), SENT[number % 3]
        target = place.fresh(force)
        process = place.start(target, force=force)
        time.sleep(chance.uniform(0, duration) * chance.random())
        os.kill(process, sent)
        code = place.wait(process)
        yield f"{sent.name}: status {code}", place.check(target, force, code)


def pairs(place: Place, runs: int, chance: random.Random) -> Outcomes:
    """Two runs at once."""
    for number in range(runs):
        force, other = bool(number % 2), bool(number // 2 % 2)
        target = place.fresh(force)
        first = place.start(target, force=force)
        time.sleep(chance.uniform(0, 0.05))
        second = place.start(target, force=force, keep_norms=other)
        codes = [place.wait(first), place.wait(second)]
        wrong = [] if 0 in codes and set(codes) <= {0, REFUSED} else [f"statuses {codes}"]
        wrong += place.check(target, force, 0 if 0 in codes else CRASHED)
        yield f"statuses {sorted(codes)}", wrong


KINDS = {"calls": calls, "bytes": full, "signals": signals, "pairs": pairs}


def count(script: str, arguments: argparse.Namespace, attack: Callable[..., Outcomes], place: Any) -> bool:
    """Attack, print what happened and how often; whether anything of it is a violation."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    started = time.monotonic()
    for outcome, wrong in attack(place, arguments.runs, random.Random(arguments.seed)):
        counts[outcome] += 1
        failures += [f"{outcome}: {problem}" for problem in wrong]
    what = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    took = f"(seed {arguments.seed}) in {time.monotonic() - started:.0f} s"
    print(f"{script} {arguments.kind}: {counts.total()} runs {took}: {what}; {len(failures)} violations")
    for line in failures[:10]:
        print("  " + line)
    return bool(failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--runs", type=int, default=0, help="about how many; 0: each call, each byte")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kind in ("calls", "bytes") and "failing_disk" not in os.environ.get("LD_PRELOAD", ""):
            environment = os.environ | {"LD_PRELOAD": str(library(Path(folder)))}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
        sys.exit(count("faults", arguments, KINDS[arguments.kind], Place(Path(folder))))


if __name__ == "__main__":
    main()
