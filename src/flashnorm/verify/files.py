"""Verifies what a converted folder holds besides tensors: config, index, manifest, copied files.

* config.json and the model card may differ from the source's only by what the conversion adds to them.
* Every other file must be the source's, byte for byte, and belong to the model (see `files/others.py`).
* The manifest must be right: the hashes of the folder's files and of the source's, the plan and the options.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashnorm.errors import InputError
from flashnorm.files.direct_io import sha256_of
from flashnorm.files.header import read_header
from flashnorm.files.others import other_files
from flashnorm.files.reader import CONFIG_FILE, INDEX_FILE, Checkpoint
from flashnorm.files.records import file_record
from flashnorm.format import CARD_FILE, CONFIG_KEY, MANIFEST_FILE, FileRecord, config_keys, without_section
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.verify.findings import Finding, Findings
from flashnorm.verify.manifest import (
    check_listed_files,
    check_options,
    check_plan,
    folder_records,
    names_in,
    read_manifest,
)


def check_files(
    planned: PlannedCheckpoint,
    result: Checkpoint,
    source_hashes: Mapping[str, str],
    result_hashes: Mapping[str, str],
    findings: Findings,
) -> int:
    """Check everything but the tensors, and add what is wrong to `findings`.

    Args:
        planned: the source, freshly planned.
        result: the converted checkpoint.
        source_hashes, result_hashes: SHA-256 of the safetensors files of the two checkpoints, by name.

    Returns:
        How many files have the hash that the manifest gives.
    """
    original = planned.checkpoint
    _check_config(planned, result, findings)
    check_index(result, findings)
    copies = set(other_files(original).belonging)
    records = folder_records(result.folder, copies, result_hashes)
    _check_copies(original, result, copies, records, findings)
    return _check_manifest(planned, result, source_hashes, records, findings)


def _check_config(planned: PlannedCheckpoint, result: Checkpoint, findings: Findings) -> None:
    original, tensors = planned.checkpoint, planned.tensors
    expected = copy.deepcopy(original.config)
    if tensors.unties:
        expected["tie_word_embeddings"] = False
        part = expected.get("text_config")
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    expected |= config_keys(tensors.norms, planned.plan.centred, planned.plan.cancelled)
    found = copy.deepcopy(result.config)
    section = found.get(CONFIG_KEY)
    if isinstance(section, dict) and isinstance(section.get("weightless"), list):
        section["weightless"] = sorted(map(str, section["weightless"]))
    for key in [*expected, *(key for key in found if key not in expected)]:
        a, b = found.get(key, _ABSENT), expected.get(key, _ABSENT)
        if a != b:
            problem = f"key {key!r} is not what it must be"
            findings.add(Finding("config", CONFIG_FILE, problem, stored=_short(a), expected=_short(b)))


def check_index(result: Checkpoint, findings: Findings) -> None:
    """Report an index whose total size is not the size of the tensors."""
    if result.index is None:
        return
    # `Checkpoint.open` has checked that the names and files in the index agree with the shards.
    total = (result.index.get("metadata") or {}).get("total_size")
    expected = sum(info.nbytes for info in result.tensors.values())
    if total is not None and total != expected:
        problem = "metadata.total_size is not the size of the tensors"
        findings.add(Finding("index", INDEX_FILE, problem, stored=str(total), expected=str(expected)))


def _check_copies(
    original: Checkpoint,
    result: Checkpoint,
    copies: set[str],
    records: Mapping[str, FileRecord],
    findings: Findings,
) -> None:
    for name in sorted(copies - records.keys()):
        findings.add(Finding("file", name, "was not copied"))
    for name in sorted(copies & records.keys()):
        if file_record(original.folder / name) != records[name]:
            findings.add(Finding("file", name, "is not the source's, byte for byte"))
    ours = {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, CARD_FILE, *result.headers}
    for name in sorted(original.headers.keys() & records.keys() - result.headers.keys()):
        # A file of the source whose tensors were all removed is written without any, and the index does not name it.
        if read_header(result.folder / name).tensors:
            findings.add(Finding("file", name, "holds tensors, but the index does not name it"))
    for name in sorted(records.keys() - copies - ours - original.headers.keys()):
        problem = "does not belong to the model" if os.path.lexists(original.folder / name) else "is not in the source"
        findings.add(Finding("file", name, problem))
    card = original.folder / CARD_FILE
    if card.is_file():
        text = without_section(_without_front_matter(card))
        if not (result.folder / CARD_FILE).is_file():
            findings.add(Finding("file", CARD_FILE, "is missing"))
        elif text.strip() not in _without_front_matter(result.folder / CARD_FILE):
            findings.add(Finding("file", CARD_FILE, "does not contain the source's text"))


def _check_manifest(
    planned: PlannedCheckpoint,
    result: Checkpoint,
    source_hashes: Mapping[str, str],
    records: Mapping[str, FileRecord],
    findings: Findings,
) -> int:
    original, tensors = planned.checkpoint, planned.tensors
    try:
        manifest = read_manifest(result.folder)
    except InputError as error:
        findings.add(Finding("manifest", MANIFEST_FILE, f"cannot be read ({error})"))
        return 0
    right = check_listed_files(manifest, records, findings)
    there = set(names_in(original.folder))
    for name, listed in manifest.source_files.items():
        path = original.folder / name
        hashed = source_hashes.get(name) or (sha256_of(path) if name in there and path.is_file() else "no such file")
        if hashed != listed.sha256:
            problem = f"was made from another {name} than the source's"
            findings.add(Finding("manifest", MANIFEST_FILE, problem, stored=listed.sha256, expected=hashed))
    for name in sorted(source_hashes.keys() - manifest.source_files.keys()):
        findings.add(Finding("manifest", MANIFEST_FILE, f"does not list the source's {name}"))
    check_plan(manifest, planned.plan, findings)
    check_options(manifest, result, planned, tensors, tensors.unties, findings)
    return right


def _without_front_matter(card: Path) -> str:
    text = card.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
    parts = text.split("\n---", 1) if text.startswith("---") else []
    return parts[1].partition("\n")[2] if len(parts) == 2 else text


def _short(value: Any) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_ABSENT = object()
