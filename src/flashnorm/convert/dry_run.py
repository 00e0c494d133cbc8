"""What a conversion would do, found out without weights: from headers, norms and the config.

On the hub, ranges of the files are read: a model of any size is looked at in seconds.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashnorm.convert.acceptance import check_config, check_places, check_plan, form_of
from flashnorm.convert.job import Job
from flashnorm.convert.on_hub import opened
from flashnorm.files.staging import check_target
from flashnorm.hub import on_hub
from flashnorm.plan import FoldPlan
from flashnorm.planning.as_folded import undecided
from flashnorm.planning.planned import plan_checkpoint


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do.

    Attributes:
        source, target: as they were given.
        plan: what folds, and which norms are kept and why; norms with values that rule out a fold are among the kept.
        undecided: norm -> why only the conversion can tell whether it is kept: its products may be too large.
        linears: how many stored weight tensors would take a gain.
        writers: how many would be centred.
        written: safetensors file -> its size in bytes.
        copied: file that is copied unchanged -> its size in bytes.
        left_out: files and folders of the source that do not belong to the model.
        remarks: what is odd about the source's files but does no harm, in words.
        bytes_read: bytes of the source that are read.
        free: bytes that are free where the target would be. The conversion needs those of `written` and `copied`.
    """

    source: str
    target: str
    plan: FoldPlan
    undecided: dict[str, str]
    linears: int
    writers: int
    written: dict[str, int]
    copied: dict[str, int]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]
    bytes_read: int
    free: int

    @property
    def needed(self) -> int:
        """The bytes that the target would have, without the config, the index, the model card and the manifest."""
        return sum(self.written.values()) + sum(self.copied.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "source": self.source,
            "target": self.target,
            "norms": len(self.plan.folds),
            "linears": self.linears,
            "writers": self.writers,
            "plan": self.plan.to_dict(),
            "undecided": self.undecided,
            "written": self.written,
            "copied": self.copied,
            "left_out": list(self.left_out),
            "remarks": list(self.remarks),
            "bytes_read": self.bytes_read,
            "bytes_needed": self.needed,
            "bytes_free": self.free,
        }

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def dry_run(
    source: str | Path,
    target: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    keep_norms: bool = False,
    untie: bool = False,
    keep: Sequence[str] = (),
    center: bool = False,
    cancel: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> DryRun:
    """Find out what `convert` would do with these arguments, which are its own. Nothing is written.

    Of the weights, only headers and norms are read; of a repository on the hub, these parts are fetched.

    Args:
        source: folder or hub id of the checkpoint.
        target: the folder that `convert` would write.
        revision: branch, tag or commit, if the source is on the hub.
        subfolder: the checkpoint's folder in its repository, or below `source`.
        keep_norms: norms keep a weight of ones, as for `convert`.
        untie: a tied output head gets a weight of its own.
        keep: norms that are to keep their weight, as shell patterns over their names.
        center: LayerNorms become RMSNorms where that is possible.
        cancel: "exact" or "drop", as for `convert`.
        force: `convert` might replace a target that exists.
        trust_remote_code: run code that the checkpoint carries.

    Raises:
        InputError: `convert` would refuse the source or the target; but a disk that is too small is no error here.
    """
    target, form = Path(target), form_of(cancel)
    with opened(source, revision, subfolder) as checkpoint:
        if not on_hub(source):
            check_places(checkpoint.folder, target)
        check_config(checkpoint)
        check_target(target, force=force)
        planned = plan_checkpoint(
            checkpoint, untie=untie, keep=keep, center=center, cancel=form, trust_remote_code=trust_remote_code
        )
        check_plan(planned)
        job = Job(planned, keep_norms, None, None)
        copied = {name: (checkpoint.folder / name).stat().st_size for name in job.copies}
    there = next(parent for parent in target.absolute().parents if parent.exists())
    return DryRun(
        source=str(source),
        target=str(target),
        plan=job.plan,
        undecided={planned.tensors.parameters.get(norm, norm): why for norm, why in undecided(planned).items()},
        linears=len(job.tensors.folds),
        writers=len(job.tensors.centred),
        written=job.sizes,
        copied=copied,
        left_out=job.left_out,
        remarks=job.checkpoint.remarks,
        bytes_read=checkpoint.total_size + sum(copied.values()),
        free=shutil.disk_usage(there).free,
    )
