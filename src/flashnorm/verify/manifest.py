"""Reads the manifest, flashnorm.json, and compares it with a folder's files, a plan and the options that were used.

* A manifest is untrusted data: its form is checked when it is read, and no path in it is opened.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from flashnorm.errors import InputError
from flashnorm.files.others import TOOL_FOLDERS
from flashnorm.files.reader import CONFIG_FILE, Checkpoint, read_json
from flashnorm.files.records import file_record
from flashnorm.format import MANIFEST_FILE, FileRecord, Manifest, kept_by, listed_cancelled, listed_centred, options
from flashnorm.plan import FoldPlan, Form
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import TensorPlan
from flashnorm.verify.findings import Finding, Findings

_NO_FILE = FileRecord("no regular file", 0)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a converted folder. Raises `InputError` if there is none, or it is not a valid one."""
    path = folder / MANIFEST_FILE
    return Manifest.from_dict(read_json(path, "convert the source again"), path)


def patterns_to_keep(folder: Path) -> tuple[str, ...]:
    """The patterns of norms that were not to be folded; none if the manifest cannot be read, which is a finding."""
    try:
        return kept_by(read_manifest(folder).options)
    except InputError:
        return ()


def was_centred(result: Checkpoint) -> bool:
    """Whether a converted folder says, in its config or its manifest, that its LayerNorms are RMSNorms."""
    try:
        if listed_centred(result.config, result.folder / CONFIG_FILE).norms:
            return True
    except InputError:  # which is a finding
        return True
    try:
        return read_manifest(result.folder).options.get("center") is True
    except InputError:
        return False


def was_cancelled(result: Checkpoint) -> Form | None:
    """The form in which a converted folder says, in its config or its manifest, that divisions are cancelled."""
    try:
        if (form := listed_cancelled(result.config, result.folder / CONFIG_FILE).form) is not None:
            return form
    except InputError:  # which is a finding
        pass
    try:
        said = read_manifest(result.folder).options.get("cancel")
    except InputError:
        return None
    return next((form for form in Form if form.value == said), None)


def check_listed_files(manifest: Manifest, found: Mapping[str, FileRecord], findings: Findings) -> int:
    """Report files that are missing, added or changed.

    Args:
        manifest: the manifest of the folder.
        found: the files in the folder, as `folder_records` gives them.

    Returns:
        How many files are as listed.
    """
    found = {name: record for name, record in found.items() if name != MANIFEST_FILE}  # it cannot hold its own hash
    for name in sorted(manifest.files.keys() - found.keys()):
        findings.add(Finding("manifest", MANIFEST_FILE, f"lists {name}, which is not there"))
    for name in sorted(found.keys() - manifest.files.keys()):
        findings.add(Finding("manifest", MANIFEST_FILE, f"does not list {name}"))
    right = 0
    for name in sorted(found.keys() & manifest.files.keys()):
        stored, listed = found[name], manifest.files[name]
        if stored == listed:
            right += 1
        elif stored.size != listed.size:
            findings.add(_other("size", name, str(stored.size), str(listed.size)))
        else:
            findings.add(_other("SHA-256", name, stored.sha256, listed.sha256))
    return right


def check_plan(manifest: Manifest, plan: FoldPlan, findings: Findings) -> None:
    """Report a manifest whose folds, or centred weights, are not those of a fresh plan.

    Kept norms are not compared, because their reasons name lines of the model's code, which change with releases.
    """
    if odd := set(manifest.plan.folds) ^ set(plan.folds):
        first = min(fold.norm for fold in odd)
        findings.add(Finding("manifest", MANIFEST_FILE, f"holds another plan than a fresh one, e.g. for {first}"))
    if manifest.plan.cancelled.listed() != plan.cancelled.listed():
        findings.add(Finding("manifest", MANIFEST_FILE, "holds another plan of what cancels than a fresh one"))
    found, fresh = manifest.plan.centred, plan.centred
    if odd := ({*found.norms} ^ {*fresh.norms}) | {one.name for one in {*found.writers} ^ {*fresh.writers}}:
        problem = f"holds another plan of what is centred than a fresh one, e.g. for {min(odd)}"
        findings.add(Finding("manifest", MANIFEST_FILE, problem))


def check_options(
    manifest: Manifest,
    result: Checkpoint,
    planned: PlannedCheckpoint,
    tensors: TensorPlan,
    untied: bool,
    findings: Findings,
) -> None:
    """Report a manifest whose options are not those that were used.

    Args:
        manifest: the manifest of the converted checkpoint.
        result: the converted checkpoint.
        planned: the fresh plan, made with the same patterns for norms to keep.
        tensors: the plan, in tensor names.
        untied: whether the conversion gave the output head a weight of its own.
    """
    optional = tensors.norms.keys() - set(tensors.spelled_out)  # if empty, --keep-norms makes no difference
    keeps = bool(optional & result.tensors.keys()) if optional else manifest.options.get("keep_norms")
    plan = planned.plan
    did = options(bool(keeps), untied, planned.asked, bool(plan.centred.norms), plan.cancelled.form)
    if manifest.options != did:
        problem = "names other options than were used"
        findings.add(Finding("manifest", MANIFEST_FILE, problem, stored=str(manifest.options), expected=str(did)))


def folder_records(
    folder: Path,
    expected: Collection[str],
    hashes: Mapping[str, str],
    advance: Callable[[int], object] | None = None,
) -> dict[str, FileRecord]:
    """Relative name (with slashes) -> hash and size, of everything in a folder and its subfolders.

    Hidden files, which tools and systems create (.gitattributes, .DS_Store), count only if they are expected. Links to
    folders are not followed. They, pipes and devices are no regular files, and get a record that equals no other.

    Args:
        folder: the folder.
        expected: names of files that count although they may be hidden.
        hashes: SHA-256 of the files whose hash is known already, by name.
        advance: called with the number of bytes that were hashed since the last call.

    Raises:
        InputError: a file cannot be read.
    """
    records: dict[str, FileRecord] = {}
    for name in names_in(folder):
        path = folder / name
        if name not in expected and any(part.startswith(".") for part in name.split("/")):
            continue
        if name in hashes:
            records[name] = FileRecord(hashes[name], path.stat().st_size)
        else:
            records[name] = file_record(path, advance) if path.is_file() else _NO_FILE
    return records


def names_in(folder: Path) -> Iterator[str]:
    """Relative names of everything but folders in a folder and its subfolders, without the folders of tools."""
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if name not in TOOL_FOLDERS]
        for name in (*files, *(name for name in folders if (Path(root) / name).is_symlink())):
            yield (Path(root) / name).relative_to(folder).as_posix()


def _other(what: str, name: str, stored: str, listed: str) -> Finding:
    return Finding("file", name, f"has another {what} than {MANIFEST_FILE} says", stored=stored, expected=listed)
