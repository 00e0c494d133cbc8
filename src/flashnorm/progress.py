"""Progress of long work on standard error: a bar on a terminal, or JSON lines for whoever reads them by program."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

# Seconds from one JSON line to the next of the same stage.
_INTERVAL = 1.0


class Reporter(NamedTuple):
    """The functions by which running work reports its progress.

    Attributes:
        bytes: called with the bytes done so far and in total.
        stage: called with a few words when work of unknown length begins.
    """

    bytes: Callable[[int, int], object]
    stage: Callable[[str], object]


def show_progress(label: str, as_json: bool) -> AbstractContextManager[Reporter]:
    """Show progress while the block runs. `label` says what is done, in a word or two."""
    if not as_json:
        return _bar(label)
    lines = _Lines(label)
    return nullcontext(Reporter(bytes=lines.bytes, stage=lines.stage))


@contextmanager
def _bar(label: str) -> Iterator[Reporter]:
    """A bar: bytes done, rate and time left. It appears on a terminal only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield Reporter(
            bytes=lambda done, total: bar.update(task, completed=done, total=total),
            stage=lambda words: bar.reset(task, description=words, total=None),
        )


class _Lines:
    """One JSON object a line when a stage begins, once a second while it runs, and when all its bytes are done.

    `bytes_per_second` counts what was done since the stage's first report, so that what an earlier run had done already
    makes no rate.
    """

    def __init__(self, label: str) -> None:
        self.stage(label)

    def stage(self, words: str) -> None:
        self._words = words
        self._begun: tuple[float, int] | None = None
        self._ended = False
        self._printed = time.monotonic()
        self._print({"stage": words})

    def bytes(self, done: int, total: int) -> None:
        now, ends = time.monotonic(), done >= total
        if self._begun is None or (self._ended and not ends):  # the first report, or the same words for more work
            self._begun, self._ended = (now, done), False
        if self._ended or not (ends or now - self._printed >= _INTERVAL):
            return
        self._printed, self._ended = now, ends
        seconds, moved = now - self._begun[0], done - self._begun[1]
        rate = moved / seconds if seconds > 0 else 0.0
        left = (total - done) / rate if rate else None
        self._print(
            {
                "stage": self._words,
                "bytes": done,
                "total": total,
                "bytes_per_second": round(rate),
                "seconds_left": 0.0 if ends else left and round(left, 1),
            }
        )

    def _print(self, line: dict[str, object]) -> None:
        print(json.dumps(line), file=sys.stderr, flush=True)
