"""What a conversion did, and the room that it needs before it begins."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm.convert.job import Job
from flashnorm.errors import InputError
from flashnorm.format import FileRecord
from flashnorm.plan import FoldPlan

if TYPE_CHECKING:
    from flashnorm.verify.report import VerifyReport


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did.

    Attributes:
        target: the folder that was written; None if the shards went from hub to hub.
        norms: how many norm weights were folded.
        linears: how many stored weight tensors they were folded into.
        centred: how many LayerNorms become RMSNorms.
        writers: how many stored tensors were centred for that.
        cancelled: how many norms are not computed.
        spelled_out: how many norm tensors stay, at their identity value, since Transformers would initialise them to
            another one.
        tensors: how many tensors the output holds.
        shards, resumed_shards: how many safetensors files it has, and how many of them an earlier run had finished.
        bytes_read, bytes_written: what this run has read and written, without the shards of an earlier run.
        seconds: wall time.
        plan: what was folded, and which norms were kept and why.
        remarks: what is odd about the source's files but does no harm, in words.
        left_out: files and folders of the source that do not belong to the model, and were not copied.
        report: the report of the verification, if there was one.
        pushed: the address of the repository that it was uploaded to, if it was.
    """

    target: Path | None
    norms: int
    linears: int
    centred: int
    writers: int
    cancelled: int
    spelled_out: int
    tensors: int
    shards: int
    resumed_shards: int
    bytes_read: int
    bytes_written: int
    seconds: float
    plan: FoldPlan
    remarks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    report: "VerifyReport | None" = None
    pushed: str | None = None


def result_of(
    job: Job,
    target: Path | None,
    started: float,
    *,
    report: "VerifyReport | None" = None,
    pushed: str | None = None,
) -> ConvertResult:
    """The result of a conversion that is done; `started` is when it began, by `time.monotonic`."""
    return ConvertResult(
        target=target,
        norms=len(job.plan.folds),
        linears=len(job.tensors.folds),
        centred=len(job.plan.centred.norms),
        writers=len(job.tensors.centred),
        cancelled=len(job.plan.cancelled.norms),
        spelled_out=len(job.tensors.spelled_out),
        tensors=sum(len(tensors) for tensors in job.outputs.values()),
        shards=len(job.sizes),
        resumed_shards=len(job.resumed),
        bytes_read=_bytes(job.read, job.resumed) + sum(record.source.size for record in job.replaced),
        bytes_written=_bytes(job.written, job.resumed) + sum(record.output.size for record in job.replaced),
        seconds=time.monotonic() - started,
        plan=job.plan,
        remarks=job.checkpoint.remarks,
        left_out=job.left_out,
        report=report,
        pushed=pushed,
    )


def check_free_space(folder: Path, needed: int) -> None:
    """Raise `InputError` if the disk of a folder has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: expected {needed / 1e9:.2f} GB of free space, found {free / 1e9:.2f} GB; make room or choose "
            "a target on another disk"
        )


def _bytes(records: Mapping[str, FileRecord], resumed: set[str]) -> int:
    return sum(record.size for name, record in records.items() if name not in resumed)
