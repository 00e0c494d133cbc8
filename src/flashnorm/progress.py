"""Progress bars for long work: bytes done, rate and time left, on standard error, and only on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class Reporter(NamedTuple):
    """The functions by which running work reports its progress.

    Attributes:
        bytes: called with the bytes done so far and in total.
        stage: called with a few words when work of unknown length begins.
    """

    bytes: Callable[[int, int], object]
    stage: Callable[[str], object]


@contextmanager
def progress_bar(label: str) -> Iterator[Reporter]:
    """Show a progress bar while the block runs. `label` says what is done, in a word or two."""
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
