"""Checks a converted folder without its source: is it whole, and is it what its manifest and its model's code say?

* Every file must have the size and hash that flashnorm.json gives, and the plan in flashnorm.json must be the plan that
  the model's code gives now.
* Config, index and tensors must agree with that plan: names, shapes, and folded norms absent or at the identity value.
* The weights that the config lists as centred must have a mean of zero, but for rounding.
* A norm that the plan folds may be kept if its product with a weight does not fit the weight's dtype. No weight that
  took a gain may be infinite.
* The report says what cannot be known without the source: see `UNKNOWN`.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from flashnorm.errors import InputError
from flashnorm.files.direct_io import sha256_of
from flashnorm.files.reader import CONFIG_FILE, Checkpoint
from flashnorm.format import (
    CONFIG_FLAGS,
    CONFIG_KEY,
    MANIFEST_FILE,
    Manifest,
    kept_by,
    listed_cancelled,
    listed_centred,
    listed_norms,
)
from flashnorm.hub import local_folder
from flashnorm.means import is_centred
from flashnorm.planning.planned import PlannedCheckpoint, plan_checkpoint
from flashnorm.planning.tensors import TensorPlan
from flashnorm.verify.files import check_index
from flashnorm.verify.findings import Finding, Findings
from flashnorm.verify.formats import FORMATS
from flashnorm.verify.manifest import (
    check_listed_files,
    check_options,
    check_plan,
    folder_records,
    names_in,
    read_manifest,
    was_cancelled,
    was_centred,
)
from flashnorm.verify.range import infinities, without_too_large
from flashnorm.verify.weights import PROBLEMS_IN_FULL, check_norms

REPORT_VERSION = 1

UNKNOWN = (
    "whether the folded weights are the products of the source's: that takes the source (flashnorm verify MODEL OUT)",
    f"whether the source is the one that {MANIFEST_FILE} names: compare these hashes with files that you trust",
    f"whether {MANIFEST_FILE} is as it was written: it is not signed; compare its SHA-256 with what the publisher says",
    "what the model computes: outputs are compared with the source's only",
)

_SHOWN = 20
_BLOCK = 8 << 20  # bytes of a weight


@dataclass(frozen=True)
class IntegrityReport:
    """What a converted folder says about itself, and what is wrong with it. Counts are of what was found right.

    Attributes:
        converted: the folder.
        manifest: the content of its flashnorm.json, which also names the source.
        manifest_sha256: SHA-256 of flashnorm.json itself, in hexadecimal.
        files: number of files that are as the manifest lists them.
        nbytes: size in bytes of all files that were hashed.
        tensors: number of tensors with the shape that the model's code expects.
        unread: number of tensors that the model's code does not read; only their hash is checked.
        norms: number of norm tensors that are removed, or stored at their identity value.
        seconds: how long the check took.
        findings: what is wrong, at most `PROBLEMS_IN_FULL` findings.
        problems: number of findings in total.
    """

    converted: str
    manifest: Manifest
    manifest_sha256: str
    files: int
    nbytes: int
    tensors: int
    unread: int
    norms: int
    seconds: float
    findings: tuple[Finding, ...]
    problems: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, as far as the check can tell without the source: see `UNKNOWN`."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        what = "is whole, and" if self.ok else "is NOT"
        return f"{self.converted} {what} what its {MANIFEST_FILE} and its model's code say"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        manifest = self.manifest
        source_files = {name: asdict(record) for name, record in manifest.source_files.items()}
        return {
            "version": REPORT_VERSION,
            "ok": self.ok,
            "verdict": self.verdict,
            "converted": self.converted,
            "manifest": {"sha256": self.manifest_sha256, "flashnorm_version": manifest.flashnorm_version},
            "claimed_source": {"id": manifest.source_id, "revision": manifest.revision, "files": source_files},
            "files": self.files,
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "unread": self.unread,
            "norms": self.norms,
            "seconds": self.seconds,
            "problems": self.problems,
            "findings": [finding.to_dict() for finding in self.findings],
            "unknown": list(UNKNOWN),
        }

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __rich__(self) -> RenderableType:
        manifest = self.manifest
        unread = f" ({self.unread} of them it does not read)" if self.unread else ""
        source = f"{manifest.source_id or 'a folder'}{f' at {manifest.revision}' if manifest.revision else ''}"
        return Group(
            _line(
                self.ok,
                f"{self.files} files have their hash, {self.tensors} tensors fit the model's code{unread}, "
                f"{self.norms} norm tensors left ({self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s)",
            ),
            *(Text(f"  {finding}") for finding in self.findings[:_SHOWN]),
            *([Text(f"  and {self.problems - _SHOWN} more")] if self.problems > _SHOWN else []),
            Text(f"  {MANIFEST_FILE} (SHA-256 {self.manifest_sha256})"),
            Text(f"  says that flashnorm {manifest.flashnorm_version} made this from {source}, with these files:"),
            *(Text(f"    {file.sha256}  {name}") for name, file in list(manifest.source_files.items())[:_SHOWN]),
            *([Text("    and more: see --json")] if len(manifest.source_files) > _SHOWN else []),
            Text("  not known without the source:"),
            *(Text(f"  - {what}") for what in UNKNOWN),
            _line(self.ok, f"[bold]{escape(self.verdict)}[/bold]"),
        )

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self, highlight=False)
        return capture.get()


def verify_integrity(
    converted: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    progress: Callable[[int, int], object] | None = None,
    trust_remote_code: bool = False,
) -> IntegrityReport:
    """Check a converted checkpoint without its source.

    Args:
        converted: a folder that `convert` wrote, or its hub id.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the converted folder, relative to `converted`.
        progress: called with the bytes done so far and in total: first of hashed files, then of folded weights read.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        InputError: there is no manifest, or the files are as the manifest says but no plan can be made for them.
    """
    started = time.monotonic()
    folder = local_folder(converted, revision, subfolder)
    if not (folder / MANIFEST_FILE).is_file():
        raise InputError(
            f"{folder}: expected {MANIFEST_FILE}, which `flashnorm convert` writes, found none: this folder does not "
            "say what it was made of; give its source as well (flashnorm verify MODEL OUT), or convert the source again"
        )
    manifest = read_manifest(folder)
    findings = Findings(PROBLEMS_IN_FULL)
    total = sum((folder / name).stat().st_size for name in names_in(folder) if (folder / name).is_file())
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    files = check_listed_files(manifest, folder_records(folder, manifest.files, {}, advance), findings)
    tensors = unread = norms = 0
    try:
        tensors, unread, norms = _check_model(folder, manifest, trust_remote_code, findings, progress)
    except InputError as error:
        if not findings.total:
            raise
        # A file was changed, which is reported already; this error follows from that.
        findings.add(Finding("checkpoint", folder.name, f"could not be looked at any further ({error})"))
    return IntegrityReport(
        converted=str(converted),
        manifest=manifest,
        manifest_sha256=sha256_of(folder / MANIFEST_FILE),
        files=files,
        nbytes=done,
        tensors=tensors,
        unread=unread,
        norms=norms,
        seconds=time.monotonic() - started,
        findings=tuple(findings.kept),
        problems=findings.total,
    )


def _check_model(
    folder: Path,
    manifest: Manifest,
    trust_remote_code: bool,
    findings: Findings,
    progress: Callable[[int, int], object] | None,
) -> tuple[int, int, int]:
    """Compare a checkpoint with a fresh plan: the numbers `tensors`, `unread` and `norms` of `IntegrityReport`."""
    checkpoint = Checkpoint.open(folder)
    planned = plan_checkpoint(
        checkpoint,
        keep=kept_by(manifest.options),
        center=was_centred(checkpoint),
        cancel=was_cancelled(checkpoint),
        trust_remote_code=trust_remote_code,
    )
    planned = without_too_large(planned, checkpoint)
    tensors, stored = planned.tensors, planned.stored
    check_plan(manifest, planned.plan, findings)
    check_index(checkpoint, findings)
    absent = [name for name in stored.absent() if name not in tensors.norms]
    for name in absent:
        findings.add(Finding("tensor", name, "is missing"))
    tensors = _listed(checkpoint, tensors, findings)
    # Whether the source's head was tied is not known here, only that the head is not tied now.
    untied = manifest.options.get("untie") is True and checkpoint.config.get("tie_word_embeddings") is False
    check_options(manifest, checkpoint, planned, tensors, untied, findings)
    norms = check_norms(checkpoint, tensors, findings)
    shapes, fit = tensors.shapes, 0
    for name, info in checkpoint.tensors.items():
        expected = shapes.get(name, info.shape)
        if info.shape == expected:
            fit += 1
        else:
            found, wanted = (str(list(shape)) for shape in (info.shape, expected))
            problem = "has another shape than the model's code expects"
            findings.add(Finding("tensor", name, problem, stored=found, expected=wanted))
    _check_finite(checkpoint, tensors, findings, progress)
    _check_centred(checkpoint, planned, findings)
    return fit, len(stored.unread()), norms


def _check_finite(
    checkpoint: Checkpoint,
    tensors: TensorPlan,
    findings: Findings,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Report folded weights that are infinite. Reads all folded weights."""
    folded = {name: checkpoint.tensors[name] for name in tensors.folds if name in checkpoint.tensors}
    total, done = sum(info.nbytes for info in folded.values()), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    for name, info in folded.items():
        count, first = infinities(checkpoint, name, advance) if info.dtype in FORMATS else (0, -1)
        if count:
            problem = (
                "holds infinite weights: products that do not fit, or the source's own, which only the source tells"
            )
            index = tuple(int(i) for i in np.unravel_index(first, info.shape))
            findings.add(Finding("tensor", name, problem, index, differing=count, elements=math.prod(info.shape)))


def _check_centred(checkpoint: Checkpoint, planned: PlannedCheckpoint, findings: Findings) -> None:
    """Report a config that lists other centred weights than a fresh plan, and weights whose mean is not zero."""
    listed, fresh = listed_centred(checkpoint.config, checkpoint.folder / CONFIG_FILE), planned.plan.centred
    if ({*listed.norms}, {*listed.writers}) != ({*fresh.norms}, {*fresh.writers}):
        findings.add(Finding("config", CONFIG_FILE, f"key '{CONFIG_KEY}.centred' is not what it must be"))
    if listed_cancelled(checkpoint.config, checkpoint.folder / CONFIG_FILE).listed() != planned.plan.cancelled.listed():
        findings.add(Finding("config", CONFIG_FILE, f"key '{CONFIG_KEY}.cancelled' is not what it must be"))
    for name, axis in planned.tensors.centred.items():
        if name in checkpoint.tensors and checkpoint.tensors[name].dtype in FORMATS:
            blocks = checkpoint.read_outputs(name, axis, _BLOCK)
            if not all(is_centred(block, 1, block.dtype) for block in blocks):
                findings.add(Finding("tensor", name, "is listed as centred, and its mean is not zero"))


def _listed(checkpoint: Checkpoint, tensors: TensorPlan, findings: Findings) -> TensorPlan:
    """The plan with the norm tensors that config.json lists: the files use only one name of a shared norm."""
    for key in CONFIG_FLAGS:
        if (flag := checkpoint.config.get(key)) is not True:
            problem = f"key {key!r} is not what it must be"
            findings.add(Finding("config", CONFIG_FILE, problem, None, repr(flag), "True"))
    listed = listed_norms(checkpoint.config, checkpoint.folder / CONFIG_FILE)
    if listed is None:
        findings.add(Finding("config", CONFIG_FILE, "does not list the weightless norms"))
        return tensors
    weightless = {tensors.parameters.get(name, name) for name in listed}
    if odd := weightless ^ set(tensors.parameters.values()):
        problem = f"lists other weightless norms than those that fold, e.g. {min(odd)}"
        findings.add(Finding("config", CONFIG_FILE, problem))
    return replace(tensors, norms={name: tensors.norms[name] for name in listed if name in tensors.norms})


def _line(ok: bool, markup: str) -> Text:
    return Text.from_markup(f"{'[green]✓[/green]' if ok else '[red]✗[/red]'} {markup}")
