"""Verifies what is in a converted folder besides tensors: config, index, manifest, copied files.

* config.json may differ from the source's only by what the conversion adds, and the model card by what it adds.
* Every other file is the source's, byte for byte; weights in other formats stay behind.
* The manifest must tell the truth: the hash of every file, the source's hashes, the plan.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.direct_io import sha256_of
from flashnorm.checkpoint.names import CheckpointPlan
from flashnorm.checkpoint.reader import CONFIG_FILE, INDEX_FILE, Checkpoint, read_json
from flashnorm.checkpoint.small_files import CARD_FILE, MANIFEST_FILE, TOOL_FOLDERS, copied_files
from flashnorm.checkpoint.state import CONFIG_VERSION
from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan
from flashnorm.verify.findings import Finding, Findings


def check_files(
    original: Checkpoint,
    result: Checkpoint,
    names: CheckpointPlan,
    plan: FoldPlan | None,
    source_hashes: Mapping[str, str],
    result_hashes: Mapping[str, str],
    findings: Findings,
) -> int:
    """Check everything but the tensors, and add what is wrong to `findings`.

    Args:
        original, result: the two checkpoints.
        names: what folds into what.
        plan: the same in module parameters; without it, the plan in the manifest is not checked.
        source_hashes, result_hashes: SHA-256 of the safetensors files, by name.

    Returns:
        How many files have the hash that the manifest gives.
    """
    _check_config(original, result, names, findings)
    _check_index(result, findings)
    copies = set(copied_files(original))
    hashes = dict(result_hashes)
    for name in _files(result.folder):
        # What tools and systems put into folders (.gitattributes, .DS_Store) matters only if it is the source's.
        if name not in hashes and (name in copies or not _is_hidden(name)):
            hashes[name] = sha256_of(result.folder / name)
    _check_copies(original, result, copies, hashes, findings)
    return _check_manifest(original, result, names, plan, source_hashes, hashes, findings)


def _check_config(original: Checkpoint, result: Checkpoint, names: CheckpointPlan, findings: Findings) -> None:
    expected = copy.deepcopy(original.config)
    if names.untied:
        expected["tie_word_embeddings"] = False
        part = expected.get("text_config")
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    expected["flash_norm"] = True
    expected["flashnorm"] = {"version": CONFIG_VERSION, "weightless": sorted(names.norms)}
    found = copy.deepcopy(result.config)
    section = found.get("flashnorm")
    if isinstance(section, dict) and isinstance(section.get("weightless"), list):
        section["weightless"] = sorted(map(str, section["weightless"]))
    for key in [*expected, *(key for key in found if key not in expected)]:
        a, b = found.get(key, _ABSENT), expected.get(key, _ABSENT)
        if a != b:
            problem = f"key {key!r} is not what it must be"
            findings.add(Finding("config", CONFIG_FILE, problem, stored=_short(a), expected=_short(b)))


def _check_index(result: Checkpoint, findings: Findings) -> None:
    if result.index is None:
        return
    # That its names and files agree with the shards was checked on opening.
    total = (result.index.get("metadata") or {}).get("total_size")
    expected = sum(info.nbytes for info in result.tensors.values())
    if total is not None and total != expected:
        problem = "metadata.total_size is not the size of the tensors"
        findings.add(Finding("index", INDEX_FILE, problem, stored=str(total), expected=str(expected)))


def _check_copies(
    original: Checkpoint, result: Checkpoint, copies: set[str], hashes: Mapping[str, str], findings: Findings
) -> None:
    for name in sorted(copies - hashes.keys()):
        findings.add(Finding("file", name, "was not copied"))
    for name in sorted(copies & hashes.keys()):
        if sha256_of(original.folder / name) != hashes[name]:
            findings.add(Finding("file", name, "is not the source's, byte for byte"))
    ours = {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, CARD_FILE, *result.headers}
    for name in sorted(hashes.keys() - copies - ours):
        findings.add(Finding("file", name, "is not in the source"))
    card = original.folder / CARD_FILE
    if card.is_file():
        text = _without_front_matter(card)
        if not (result.folder / CARD_FILE).is_file():
            findings.add(Finding("file", CARD_FILE, "is missing"))
        elif text.strip() not in _without_front_matter(result.folder / CARD_FILE):
            findings.add(Finding("file", CARD_FILE, "does not contain the source's text"))


def _check_manifest(
    original: Checkpoint,
    result: Checkpoint,
    names: CheckpointPlan,
    plan: FoldPlan | None,
    source_hashes: Mapping[str, str],
    hashes: Mapping[str, str],
    findings: Findings,
) -> int:
    try:
        manifest = read_json(result.folder / MANIFEST_FILE)
        listed = {str(name): (entry["sha256"], entry["size"]) for name, entry in manifest["files"].items()}
        sources = {str(name): entry["sha256"] for name, entry in manifest["source"]["files"].items()}
        planned = FoldPlan.from_dict(manifest["plan"])
        options = dict(manifest["options"])
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
        findings.add(Finding("manifest", MANIFEST_FILE, f"cannot be read ({type(error).__name__}: {error})"))
        return 0
    found = {name: (digest, (result.folder / name).stat().st_size) for name, digest in hashes.items()}
    found.pop(MANIFEST_FILE, None)  # it cannot hold its own hash
    for name in sorted(listed.keys() - found.keys()):
        findings.add(Finding("manifest", MANIFEST_FILE, f"lists {name}, which is not there"))
    for name in sorted(found.keys() - listed.keys()):
        findings.add(Finding("manifest", MANIFEST_FILE, f"does not list {name}"))
    right = 0
    for name in sorted(found.keys() & listed.keys()):
        if found[name] == listed[name]:
            right += 1
            continue
        what = "size" if found[name][1] != listed[name][1] else "SHA-256"
        stored, expected = (str(entry[what == "size"]) for entry in (found[name], listed[name]))
        findings.add(
            Finding("file", name, f"has another {what} than {MANIFEST_FILE} says", stored=stored, expected=expected)
        )
    for name, digest in sources.items():
        path = original.folder / name
        actual = source_hashes.get(name) or (sha256_of(path) if path.is_file() else "no such file")
        if actual != digest:
            problem = f"was made from another {name} than the source's"
            findings.add(Finding("manifest", MANIFEST_FILE, problem, stored=digest, expected=actual))
    for name in source_hashes.keys() - sources.keys():
        findings.add(Finding("manifest", MANIFEST_FILE, f"does not list the source's {name}"))
    # Why a norm is kept names a line of the model's code, which changes with releases: only the folds must agree.
    if plan is not None and set(planned.folds) != set(plan.folds):
        odd = next(iter(set(planned.folds) ^ set(plan.folds))).norm
        findings.add(Finding("manifest", MANIFEST_FILE, f"holds another plan than a fresh one, e.g. for {odd}"))
    optional = names.norms.keys() - set(names.spelled_out)  # if there is none, keeping norms makes no difference
    keeps = bool(optional & result.tensors.keys()) if optional or not options else options.get("keep_norms")
    did = {"keep_norms": keeps, "untie": bool(names.untied)}
    if options != did:
        problem = "names other options than were used"
        findings.add(Finding("manifest", MANIFEST_FILE, problem, stored=str(options), expected=str(did)))
    return right


def _files(folder: Path) -> Iterator[str]:
    """The files of a folder and its subfolders, as relative names with slashes."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in TOOL_FOLDERS]
        for name in files:
            yield (Path(root) / name).relative_to(folder).as_posix()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _without_front_matter(card: Path) -> str:
    text = card.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
    parts = text.split("\n---", 1) if text.startswith("---") else []
    return parts[1].partition("\n")[2] if len(parts) == 2 else text


def _short(value: Any) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_ABSENT = object()
