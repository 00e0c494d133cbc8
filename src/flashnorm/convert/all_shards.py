"""Writes the shards of a conversion: one after the other in this process, or by the workers of an executor.

* A norm that must be kept after all may change shards that are written already. Of the shards that ask for this, the
  first in their order decides; a later one waits until all before it are written. So neither who is done first nor what
  an earlier run had finished changes the decisions, and the bytes are those of one process.
* The workers report nothing while they write: the files that they write are looked at.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

from flashnorm.convert.job import Job, ProgressCallback
from flashnorm.convert.part import Done, Part, write_part, write_part_elsewhere
from flashnorm.files.staging import Staging
from flashnorm.plan import Kept
from flashnorm.workers import Crew, Elsewhere, Here


def write_shards(job: Job, staging: Staging, progress: ProgressCallback, executor: Executor | None) -> None:
    """Write the shards that an earlier run has not finished.

    Args:
        job: the conversion.
        staging: the output folder.
        progress: called with the number of bytes that are done so far, and of all bytes.
        executor: what runs the workers; None for this process.

    Raises:
        InputError: the source cannot be used, nothing is left to fold, or a worker failed.
        OSError: the output cannot be written.
    """

    def report(more: int) -> None:
        progress(sum(job.sizes[name] for name in job.written) + more, sum(job.sizes.values()))

    job.keep({norm: Kept.from_dict(kept) for norm, kept in staging.notes.items()})
    with _crew(staging, report, executor) as crew:
        too_large: dict[str, tuple[Part, Done]] = {}
        while missing := [name for name in job.headers if name not in job.written]:
            too_large = {name: one for name, one in too_large.items() if one[0] == job.part(name, staging)}
            first = missing[0]
            if first in too_large:
                job.keep_too_large(too_large.pop(first)[1], staging)
                continue
            for name in missing:
                if name not in too_large:
                    crew.ask(name, job.part(name, staging))
            name, done = crew.next()
            job.checkpoint.check_unchanged()
            if done.too_large:
                too_large[name] = job.part(name, staging), done
            else:
                job.take(name, done, staging)
                report(0)


@contextmanager
def _crew(staging: Staging, report: Callable[[int], object], executor: Executor | None) -> Iterator[Crew[Part, Done]]:
    """What writes the shards. `report` is called with the bytes of the shards that are not finished."""

    def write_here(name: str, part: Part) -> Done:
        written = 0

        def advance(attempt: Path, nbytes: int) -> None:
            nonlocal written
            written += nbytes
            report(written)

        return write_part(part, advance)

    if executor is None:
        yield Here(write_here)
    else:
        again = "run the same command again: it continues with what is finished"
        with Elsewhere(
            executor, write_part_elsewhere, again=again, waiting=lambda: report(staging.attempted_bytes())
        ) as crew:
            yield crew
