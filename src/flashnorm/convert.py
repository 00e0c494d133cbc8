"""A checkpoint and its fold plan in, the FlashNorm checkpoint out.

* Streaming: each byte of the source is read once, each of the output written once. What is read twice: a tensor that is
  untied, and the weight of a linear whose bias takes a norm's; and everything, if the result is verified.
* Only folding shows whether a product is too large for its dtype. Where one is, the norm is kept after all, and the
  shards that are other ones then are written again.
* All or nothing: what is refused is refused before anything is written, and the target appears by one rename.
* A conversion can be verified before it appears (`verify=True`): its model card says what was found.
* A run that was interrupted continues where it was, and ends with the same bytes as one that was not.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

import flashnorm
from flashnorm.acceptance import check_config, check_places, check_plan
from flashnorm.checkpoint.biases import new_bias
from flashnorm.checkpoint.card import updated_card
from flashnorm.checkpoint.header import TensorInfo
from flashnorm.checkpoint.names import CheckpointPlan
from flashnorm.checkpoint.overflow import Overflows
from flashnorm.checkpoint.reader import CONFIG_FILE, INDEX_FILE, Checkpoint
from flashnorm.checkpoint.records import FileRecord, file_record
from flashnorm.checkpoint.shard import output_header, output_tensors, shard_pieces, write_shard
from flashnorm.checkpoint.small_files import (
    CARD_FILE,
    MANIFEST_FILE,
    MANIFEST_VERSION,
    copied_files,
    hub_identity,
    to_json,
    updated_config,
    updated_index,
)
from flashnorm.checkpoint.source_files import check_names_differ, open_file
from flashnorm.checkpoint.writer import ShardRecord, Staging, check_target, copy_file, disk_errors, write_file
from flashnorm.errors import DifferenceError, InputError
from flashnorm.hub import local_folder
from flashnorm.plan import FoldPlan, Kept
from flashnorm.planning import plan_checkpoint

if TYPE_CHECKING:
    from flashnorm.verify.report import VerifyReport

# Called with the bytes that are done so far, and in all.
ProgressCallback = Callable[[int, int], object]


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did.

    Attributes:
        target: the folder that was written.
        norms: how many norm weights were folded.
        linears: into how many stored weight tensors.
        spelled_out: norm tensors that stay at their identity value, as transformers would initialise them otherwise.
        tensors: how many tensors the output holds.
        shards, resumed_shards: how many safetensors files it has, and how many of them an earlier run had finished.
        bytes_read, bytes_written: by this run.
        seconds: wall time.
        plan: what was folded, and which norms were kept and why.
        report: of the verification, if there was one.
    """

    target: Path
    norms: int
    linears: int
    spelled_out: int
    tensors: int
    shards: int
    resumed_shards: int
    bytes_read: int
    bytes_written: int
    seconds: float
    plan: FoldPlan
    report: "VerifyReport | None" = None


@dataclass
class _Job:
    """A conversion that was accepted: what it reads and writes, and the records of what it has read and written."""

    checkpoint: Checkpoint
    plan: FoldPlan
    names: CheckpointPlan
    keep_norms: bool
    source_id: str | None
    revision: str | None
    read: dict[str, FileRecord] = field(default_factory=dict)
    written: dict[str, FileRecord] = field(default_factory=dict)
    resumed: set[str] = field(default_factory=set)
    replaced: list[ShardRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lay_out()
        self.copies = copied_files(self.checkpoint)
        card = [CARD_FILE] if os.path.lexists(self.checkpoint.folder / CARD_FILE) else []
        self.checkpoint = self.checkpoint.with_states_of([*self.copies, *card])
        made = [CONFIG_FILE, INDEX_FILE, CARD_FILE, MANIFEST_FILE, *self.headers]
        check_names_differ(self.checkpoint.folder, [*made, *self.copies])
        self.options = {"keep_norms": self.keep_norms, "untie": bool(self.names.untied)}

    def key(self) -> dict[str, object]:
        """What must be the same for a shard of an earlier run to be of use."""
        return {
            "flashnorm_version": flashnorm.__version__,
            "plan": self.plan.to_dict(),
            "names": asdict(self.names),
            "options": self.options,
            "source": {name: asdict(state) for name, state in self.checkpoint.states.items()},
        }

    def write_shards(self, staging: Staging, progress: ProgressCallback | None) -> None:
        norms = {name: self.checkpoint.read_tensor(name) for name in self.names.norms}
        self.keep({norm: Kept(**kept) for norm, kept in staging.notes.items()})
        # A norm that is kept after all may send us back to an earlier shard. What comes next depends on nothing but the
        # journal, so a run that was interrupted makes the same decisions.
        while (name := next((name for name in self.headers if name not in self.written), None)) is not None:
            done, total = sum(self.sizes[name] for name in self.written), sum(self.sizes.values())

            def advance(nbytes: int, total: int = total) -> None:
                nonlocal done
                done += nbytes
                if progress is not None:
                    progress(done, total)

            record = staging.kept(name)
            if record is not None:
                self.resumed.add(name)
                advance(self.sizes[name])
            else:
                record, reasons = self._write_shard(name, norms, staging, advance)
                self.checkpoint.check_unchanged()
                if reasons:
                    self.replaced.append(record)
                    try:
                        outdated = self.keep(reasons)
                    except InputError:
                        staging.forget()
                        raise
                    staging.note({norm: asdict(kept) for norm, kept in reasons.items()}, outdated)
                    continue
                staging.record(name, record)
            self.read[name], self.written[name] = record.source, record.output

    def _write_shard(
        self, name: str, norms: Mapping[str, Tensor], staging: Staging, advance: Callable[[int], object]
    ) -> tuple[ShardRecord, dict[str, Kept]]:
        """Write a shard; also, which norms must be kept, by their parameters, because of products that do not fit."""
        overflows = Overflows(self.checkpoint, self.names)
        bias = partial(new_bias, self.checkpoint, self.names)
        header = self.checkpoint.headers[name]
        pieces = shard_pieces(header, self.names, norms, bias, overflows.add, keep_norms=self.keep_norms)
        source, output = self.checkpoint.folder / name, staging.model / name
        record = write_shard(source, output, self.headers[name], pieces, advance)
        reasons = overflows.reasons(norms)
        return record, {self.names.parameters.get(norm, norm): kept for norm, kept in reasons.items()}

    def keep(self, reasons: Mapping[str, Kept]) -> set[str]:
        """Keep norms after all, by their parameters. Returns the shards that are other ones then.

        Raises:
            InputError: nothing is left to fold.
        """
        leaving = {name for fold in self.plan.folds if fold.norm in reasons for name in fold.leaving}
        before, self.names = self.names, self.names.without(self.names.tensors_of(leaving))
        self.plan = self.plan.keep(reasons)
        check_plan(self.checkpoint, self.plan, self.names)
        self._lay_out()
        outdated = {self.checkpoint.tensors[before.untied.get(name, name)].file for name in before.changed(self.names)}
        for shard in outdated & self.written.keys():
            record = ShardRecord(self.read.pop(shard), self.written.pop(shard))
            if shard in self.resumed:
                self.resumed.remove(shard)
            else:
                self.replaced.append(record)
        return outdated

    def _lay_out(self) -> None:
        """What the shards hold, by the plan as it is now."""
        headers = self.checkpoint.headers.items()
        self.headers = {name: output_header(head, self.names, keep_norms=self.keep_norms) for name, head in headers}
        self.tensors = {name: output_tensors(head, self.names, keep_norms=self.keep_norms) for name, head in headers}
        self.sizes = {name: len(self.headers[name]) + _nbytes(self.tensors[name]) for name in self.headers}

    def write_small_files(self, staging: Staging) -> None:
        """Everything but the weights. config.json makes a model of the folder, so it comes last."""
        folder = self.checkpoint.folder
        for name in self.copies:
            path = staging.model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.read[name] = self.written[name] = copy_file(folder / name, path)
        self._write(staging, CARD_FILE, self._card(summary=""))
        if self.checkpoint.index is not None:
            self._write(staging, INDEX_FILE, updated_index(self.checkpoint, self.tensors))
        self.read[CONFIG_FILE] = file_record(folder / CONFIG_FILE)
        config = updated_config(self.checkpoint, self.names)
        self.written[CONFIG_FILE] = FileRecord.of(config)
        self.written[MANIFEST_FILE] = write_file(staging.model / MANIFEST_FILE, self._manifest())
        self.checkpoint.check_unchanged()
        write_file(staging.model / CONFIG_FILE, config)

    def add_to_card(self, staging: Staging, summary: str) -> None:
        """Put the summary of a verification into the model card."""
        self._write(staging, CARD_FILE, self._card(summary))
        self.written[MANIFEST_FILE] = write_file(staging.model / MANIFEST_FILE, self._manifest())

    def _write(self, staging: Staging, name: str, data: bytes) -> None:
        if name in self.checkpoint.states:
            self.read[name] = file_record(self.checkpoint.folder / name)
        self.written[name] = write_file(staging.model / name, data)

    def _card(self, summary: str) -> bytes:
        card = None
        if CARD_FILE in self.checkpoint.states:
            with open_file(self.checkpoint.folder / CARD_FILE) as file:
                card = file.read().decode("utf-8", "surrogateescape")
        card = updated_card(
            card,
            base_model=self.source_id,
            version=flashnorm.__version__,
            norms=len(self.plan.folds),
            linears=len(self.names.folds),
            summary=summary,
        )
        return card.encode("utf-8", "surrogateescape")

    def _manifest(self) -> bytes:
        files = {name: asdict(self.read[name]) for name in sorted(self.read)}
        return to_json(
            {
                "version": MANIFEST_VERSION,
                "flashnorm_version": flashnorm.__version__,
                "source": {"id": self.source_id, "revision": self.revision, "files": files},
                "options": self.options,
                "plan": self.plan.to_dict(),
                "files": {name: asdict(self.written[name]) for name in sorted(self.written) if name != MANIFEST_FILE},
            }
        )


def convert(
    source: str | Path,
    target: str | Path,
    *,
    keep_norms: bool = False,
    untie: bool = False,
    force: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
    stage: Callable[[str], object] = lambda words: None,
) -> ConvertResult:
    """Trace a checkpoint's model and write its FlashNorm version; see `convert_checkpoint`.

    Args:
        source: the checkpoint's folder, or its hub id.
        target: the folder to write.
        keep_norms: keep folded norm tensors, at their identity value, instead of leaving them out.
        untie: give a tied model a head of its own, so that its final norm folds as well.
        force: replace a target that exists, if everything in it is what `convert` wrote, unchanged.
        verify: compare the result with the source before it appears at the target, as `flashnorm.verify` does, and put
            a summary into its model card.
        trust_remote_code: whether code in the checkpoint's folder may run.
        progress: called while an old target is read, while weights are written, and while they are verified.
        stage: called with a few words when another of these begins.

    Raises:
        InputError: the source or the target cannot be used, or the disk is full.
        DifferenceError: with `verify`: the result is not the same model. The target is as it was then.
    """
    checkpoint = Checkpoint.open(local_folder(source))
    # What needs no model is refused before one is built.
    check_config(checkpoint.config, checkpoint.folder)
    check_places(checkpoint.folder, Path(target))
    check_target(Path(target), force=force)
    plan, names = plan_checkpoint(checkpoint, untie=untie, trust_remote_code=trust_remote_code)
    report = None

    def proof(staged: Path) -> str:
        nonlocal report
        from flashnorm.verify import verify as compare
        from flashnorm.verify.summary import card_summary

        stage("comparing weights")
        compared = compare(
            checkpoint.folder, staged, progress=progress, stage=stage, trust_remote_code=trust_remote_code
        )
        report = replace(compared, source=str(source), converted=str(target))
        if not report.ok:
            raise DifferenceError(report)
        return card_summary(report)

    result = convert_checkpoint(
        checkpoint,
        plan,
        names,
        target,
        keep_norms=keep_norms,
        force=force,
        proof=proof if verify else None,
        progress=progress,
        stage=stage,
    )
    return replace(result, report=report)


def convert_checkpoint(
    checkpoint: Checkpoint,
    plan: FoldPlan,
    names: CheckpointPlan,
    target: str | Path,
    *,
    keep_norms: bool = False,
    force: bool = False,
    source_id: str | None = None,
    revision: str | None = None,
    proof: Callable[[Path], str] | None = None,
    progress: ProgressCallback | None = None,
    stage: Callable[[str], object] = lambda words: None,
) -> ConvertResult:
    """Write the FlashNorm version of a checkpoint.

    Args:
        checkpoint: the source.
        plan: what folds, in the model's names; goes into the manifest.
        names: the same in the checkpoint's names, and which tensors are untied; this is what is carried out.
        target: the folder to write.
        keep_norms: keep folded norm tensors, at their identity value, instead of leaving them out.
        force: replace a target that exists, if everything in it is what `convert` wrote, unchanged.
        source_id, revision: hub id and commit of the source; by default what its path in the hub's cache tells.
        proof: called with the folder of the complete result before it is published; what it returns goes to the end of
            the model card. What it raises is raised, and nothing is published.
        progress: called while an old target is read, and while weights are written.
        stage: called with a few words when another of these begins.

    Raises:
        InputError: the source or the target cannot be used, or the disk is full. What is left is what the next run
            continues with: nothing, if no shard was finished.
    """
    started = time.monotonic()
    target = Path(os.path.abspath(target))
    check_config(checkpoint.config, checkpoint.folder)
    check_plan(checkpoint, plan, names)
    check_places(checkpoint.folder, target)
    check_target(target, force=force)
    if source_id is None:
        source_id, revision = hub_identity(checkpoint.folder)
    job = _Job(checkpoint, plan, names, keep_norms, source_id, revision)
    if force:
        stage("reading the old target")
    with disk_errors(target), Staging(target, job.key(), force=force, progress=progress) as staging:
        if force:
            stage("converting")
        copied = sum((checkpoint.folder / name).stat().st_size for name in job.copies)
        _check_free_space(target.parent, sum(job.sizes.values()) + copied - staging.resumable_bytes())
        job.write_shards(staging, progress)
        job.write_small_files(staging)
        if proof is not None:
            try:
                job.add_to_card(staging, proof(staging.model))
            except DifferenceError:
                staging.forget()
                raise
        staging.publish()
    return ConvertResult(
        target=target,
        norms=len(job.plan.folds),
        linears=len(job.names.folds),
        spelled_out=len(job.names.spelled_out),
        tensors=sum(len(tensors) for tensors in job.tensors.values()),
        shards=len(job.sizes),
        resumed_shards=len(job.resumed),
        bytes_read=_bytes(job.read, job.resumed) + sum(record.source.size for record in job.replaced),
        bytes_written=_bytes(job.written, job.resumed) + sum(record.output.size for record in job.replaced),
        seconds=time.monotonic() - started,
        plan=job.plan,
    )


def _check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: expected {needed / 1e9:.2f} GB of free space, found {free / 1e9:.2f} GB; make room or choose "
            "a target on another disk"
        )


def _bytes(records: Mapping[str, FileRecord], resumed: set[str]) -> int:
    return sum(record.size for name, record in records.items() if name not in resumed)


def _nbytes(tensors: list[tuple[str, TensorInfo]]) -> int:
    return sum(info.nbytes for _, info in tensors)
