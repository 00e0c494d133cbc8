"""Progress of long work on standard error: a bar on a terminal, or JSON lines for whoever reads them by program."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
    return _lines(label) if as_json else _bar(label)


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


@contextmanager
def _lines(label: str) -> Iterator[Reporter]:
    """One JSON object a line when a stage begins, once a second while it runs, and when all its bytes are done.

    `bytes_per_second` counts what was done since the stage's first report, so that what an earlier run had done already
    makes no rate.
    """
    lines = _Lines(label)
    yield Reporter(bytes=lines.bytes, stage=lines.stage)


class _Lines:
    """What the lines need to know of the stage that runs."""

    def __init__(self, label: str) -> None:
        self.stage(label)

    def stage(self, words: str) -> None:
        self._words = words
        self._first: tuple[float, int] | None = None
        self._printed = time.monotonic()
        self._print({"stage": words})

    def bytes(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        if done < total and now - self._printed < _INTERVAL:
            return
        self._printed = now
        seconds, moved = now - self._first[0], done - self._first[1]
        rate = moved / seconds if seconds > 0 else 0.0
        self._print(
            {
                "stage": self._words,
                "bytes": done,
                "total": total,
                "bytes_per_second": round(rate),
                "seconds_left": round((total - done) / rate, 1) if rate else None,
            }
        )

    def _print(self, line: dict[str, object]) -> None:
        print(json.dumps(line), file=sys.stderr, flush=True)
