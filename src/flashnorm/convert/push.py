"""Uploads a converted folder to the hub, after a check that it is what `convert` wrote."""

import os
from pathlib import Path

from flashnorm.errors import InputError
from flashnorm.format import MANIFEST_FILE
from flashnorm.hub import upload
from flashnorm.verify.findings import Findings
from flashnorm.verify.manifest import check_listed_files, folder_records, read_manifest


def push(out: str | Path, repository: str, *, private: bool | None = None) -> str:
    """Upload a folder that `convert` wrote to a repository on the Hugging Face hub.

    Each file is hashed first, and the folder must be as its manifest says. If an upload breaks, the next one sends what
    is missing.

    Args:
        out: the folder.
        repository: hub id; the repository is made if it does not exist.
        private: whether it is made private; None for the owner's default.

    Returns:
        The address of the repository.

    Raises:
        InputError: the folder is not what `convert` wrote, or the upload fails: no token, no permission, no connection.
    """
    folder = Path(out)
    if not os.path.lexists(folder / MANIFEST_FILE):
        raise InputError(f"{folder}: expected a folder that `flashnorm convert` wrote, found no {MANIFEST_FILE} in it")
    manifest = read_manifest(folder)
    findings = Findings()
    check_listed_files(manifest, folder_records(folder, manifest.files, {}), findings)
    if findings.total:
        more = f", and {findings.total - 1} more" if findings.total > 1 else ""
        raise InputError(
            f"{folder}: expected what `flashnorm convert` wrote, unchanged, found: {findings.kept[0]}{more}; convert "
            "again, or upload the folder as it is with `hf upload`"
        )
    try:
        return upload(folder, [*manifest.files, MANIFEST_FILE], repository, private=private)
    except InputError as error:
        raise InputError(
            f"{error}; {folder} is complete: `flashnorm push {folder} {repository}` uploads what is missing"
        ) from error
