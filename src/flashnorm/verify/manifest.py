"""Reads flashnorm.json, the manifest, and holds it against a folder's files, a plan and what `convert` did.

* A manifest is data from elsewhere: its form is checked when it is read, and no path in it is opened.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.names import CheckpointPlan
from flashnorm.checkpoint.reader import Checkpoint, read_json
from flashnorm.checkpoint.records import FileRecord, file_record, listed_records
from flashnorm.checkpoint.small_files import MANIFEST_FILE, MANIFEST_VERSION, TOOL_FOLDERS
from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan
from flashnorm.verify.findings import Finding, Findings

_NO_FILE = FileRecord("no regular file", 0)


@dataclass(frozen=True)
class Manifest:
    """What a converted folder's flashnorm.json says.

    Attributes:
        flashnorm_version: the release that wrote it.
        source_id, revision: hub id and commit of the source, None if it was a folder of other origin.
        source_files: the files that were read, by name.
        options: `keep_norms` and `untie`.
        plan: what was folded, in module parameters.
        files: the files that were written, by name; all but the manifest.
    """

    flashnorm_version: str
    source_id: str | None
    revision: str | None
    source_files: dict[str, FileRecord]
    options: dict[str, Any]
    plan: FoldPlan
    files: dict[str, FileRecord]

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Read the manifest of a converted folder. Raises `InputError` if there is none, or it is none of ours."""
        path, remedy = folder / MANIFEST_FILE, "convert the source again"
        match read_json(path, remedy):
            case {
                "version": int(version),
                "flashnorm_version": str(release),
                "source": {"id": None | str() as source, "revision": None | str() as revision, "files": dict(read)},
                "options": dict(options),
                "plan": dict(plan),
                "files": dict(written),
            }:
                pass
            case _:
                raise InputError(f"{path}: expected the manifest of a conversion, found something else; {remedy}")
        if version != MANIFEST_VERSION:
            raise InputError(
                f"{path}: expected a manifest of version {MANIFEST_VERSION}, found version {version}; use the "
                "flashnorm release that wrote it"
            )
        try:
            read_plan = FoldPlan.from_dict(plan)
        except InputError as error:
            raise InputError(f"{path}: {error}; {remedy}") from error
        return Manifest(
            release, source, revision, listed_records(read, path), options, read_plan, listed_records(written, path)
        )

    def check_files(self, found: Mapping[str, FileRecord], findings: Findings) -> int:
        """Report files that are missing, added, or others than those that were written.

        Args:
            found: what is in the folder, as `folder_records` gives it.

        Returns:
            How many files are as listed.
        """
        found = {name: record for name, record in found.items() if name != MANIFEST_FILE}  # it cannot hold its own hash
        for name in sorted(self.files.keys() - found.keys()):
            findings.add(Finding("manifest", MANIFEST_FILE, f"lists {name}, which is not there"))
        for name in sorted(found.keys() - self.files.keys()):
            findings.add(Finding("manifest", MANIFEST_FILE, f"does not list {name}"))
        right = 0
        for name in sorted(found.keys() & self.files.keys()):
            stored, listed = found[name], self.files[name]
            if stored == listed:
                right += 1
            elif stored.size != listed.size:
                findings.add(_other("size", name, str(stored.size), str(listed.size)))
            else:
                findings.add(_other("SHA-256", name, stored.sha256, listed.sha256))
        return right

    def check_plan(self, plan: FoldPlan, findings: Findings) -> None:
        """Report a plan that folds otherwise than a fresh one.

        Why a norm is kept names a line of the model's code, which changes with releases: only the folds must agree.
        """
        if odd := set(self.plan.folds) ^ set(plan.folds):
            first = min(fold.norm for fold in odd)
            findings.add(Finding("manifest", MANIFEST_FILE, f"holds another plan than a fresh one, e.g. for {first}"))

    def check_options(self, result: Checkpoint, names: CheckpointPlan, untied: bool, findings: Findings) -> None:
        """Report other options than were used.

        Args:
            result: the converted checkpoint.
            names: what folds into what.
            untied: whether the output head was given a weight of its own.
        """
        optional = names.norms.keys() - set(names.spelled_out)  # if there is none, keeping norms makes no difference
        keeps = bool(optional & result.tensors.keys()) if optional else self.options.get("keep_norms")
        did = {"keep_norms": keeps, "untie": untied}
        if self.options != did:
            problem = "names other options than were used"
            findings.add(Finding("manifest", MANIFEST_FILE, problem, stored=str(self.options), expected=str(did)))


def folder_records(
    folder: Path,
    expected: Collection[str],
    hashes: Mapping[str, str],
    advance: Callable[[int], object] | None = None,
) -> dict[str, FileRecord]:
    """Hash and size of everything in a folder and its subfolders, by relative names with slashes.

    What tools and systems put into folders (.gitattributes, .DS_Store) counts only if it is expected. Links to folders
    are not followed, and neither they nor pipes and devices are regular files: their record equals no other.

    Args:
        folder: the folder.
        expected: names of files that count even if they are hidden.
        hashes: SHA-256 of files that are known already.
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
    """Everything in a folder and its subfolders that is no folder, without what belongs to tools, as relative names."""
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if name not in TOOL_FOLDERS]
        for name in (*files, *(name for name in folders if (Path(root) / name).is_symlink())):
            yield (Path(root) / name).relative_to(folder).as_posix()


def _other(what: str, name: str, stored: str, listed: str) -> Finding:
    return Finding("file", name, f"has another {what} than {MANIFEST_FILE} says", stored=stored, expected=listed)
