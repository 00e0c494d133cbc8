"""One shard of a conversion, as a task of its own: plain data that any process can do, on any host that has the files.

* A task names all that its bytes depend on. So equal tasks give equal bytes, whoever does them and however often.
* A worker writes into a file of its own, which the conversion moves to its place (see `files/staging.py`).
"""

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flashnorm.convert.biases import new_bias
from flashnorm.convert.shards import output_header, shard_pieces, write_shard
from flashnorm.convert.sums import sums_over
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.files.records import file_record
from flashnorm.files.shared import REMEDY, check_shared
from flashnorm.files.staging import ShardRecord, Staging
from flashnorm.plan import Kept
from flashnorm.planning.overflow import Overflows
from flashnorm.planning.tensors import TensorPlan

_LOOK_SECONDS = 1.0  # how often a worker looks whether its result is still wanted


@dataclass(frozen=True)
class Part:
    """A shard to be written.

    Attributes:
        checkpoint: the source, but only this shard and what its new values depend on.
        tensors: what becomes of the shard's tensors.
        shard: its file name.
        keep_norms: keep folded norm tensors, at their identity value.
        attempts: the folder to write into.
        model: the folder that has what an earlier run wrote.
        earlier: the record of the shard of an earlier run, which need not be written again if it is still the same.
    """

    checkpoint: Checkpoint
    tensors: TensorPlan
    shard: str
    keep_norms: bool
    attempts: Path
    model: Path
    earlier: ShardRecord | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Done:
    """A shard that is written.

    Attributes:
        record: the file that was read for it, and the file that was written.
        attempt: the name of the file in `Part.attempts`; None if the shard of an earlier run is still there, or a norm
            must be kept.
        too_large: norm tensor -> why it must be kept: products do not fit their dtype, so the shard is not as it must
            be.
    """

    record: ShardRecord
    attempt: str | None
    too_large: dict[str, Kept]


def part_of(checkpoint: Checkpoint, tensors: TensorPlan, shard: str, keep_norms: bool, staging: Staging) -> Part:
    """The task of writing one shard of a checkpoint, by a plan in the names of its tensors."""
    tensors = tensors.about(checkpoint.headers[shard].tensors)
    source = checkpoint.part([shard], tensors.read)
    return Part(source, tensors, shard, keep_norms, staging.attempts, staging.model, staging.earlier(shard))


def write_part(part: Part, advance: Callable[[Path, int], object]) -> Done:
    """Write a shard, or find it written; the disk has it then.

    Args:
        part: the task.
        advance: called with the file that is written, and the number of bytes written since the last call.

    Raises:
        InputError: the source cannot be read.
        OSError: the output cannot be written.
    """
    checkpoint, tensors, path = part.checkpoint, part.tensors, part.model / part.shard
    if part.earlier is not None and path.is_file() and file_record(path) == part.earlier.output:
        return Done(part.earlier, None, {})
    attempt = part.attempts / f"{part.shard}.{uuid.uuid4().hex}"
    norms = {use.norm: checkpoint.read_tensor(use.norm) for fold in tensors.folds.values() for use in fold.gains}
    overflows = Overflows(checkpoint, tensors)
    bias, sums = partial(new_bias, checkpoint, tensors), partial(sums_over, checkpoint)
    header = checkpoint.headers[part.shard]
    pieces = shard_pieces(header, tensors, norms, bias, sums, overflows.add, keep_norms=part.keep_norms)
    beginning = output_header(header, tensors, keep_norms=part.keep_norms)
    try:
        record = write_shard(checkpoint.folder / part.shard, attempt, beginning, pieces, partial(advance, attempt))
        too_large = overflows.reasons(norms)
    except BaseException:
        with contextlib.suppress(OSError):
            attempt.unlink()
        raise
    if too_large:
        attempt.unlink()
    return Done(record, None if too_large else attempt.name, too_large)


def write_part_elsewhere(part: Part) -> Done:
    """`write_part` in another process, perhaps on another host.

    Raises:
        InputError: as `write_part`; or the files of the conversion are not on this host, or it has ended meanwhile.
        OSError: the output cannot be written.
    """
    if not part.attempts.is_dir():
        raise InputError(f"{part.attempts}: expected the folder in which the conversion grows, found none; {REMEDY}")
    check_shared(part.checkpoint)
    looked = time.monotonic()

    def advance(attempt: Path, nbytes: int) -> None:
        nonlocal looked
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            if not attempt.exists():
                raise InputError(f"{attempt}: nobody waits for this file any more")

    return write_part(part, advance)
