"""The format of a FlashNorm folder: its file names, the keys in config.json, and the manifest, flashnorm.json.

All code that reads or writes these uses this module.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashnorm.errors import InputError
from flashnorm.plan import Cancelled, Centred, FoldPlan, Form, Writer

CARD_FILE = "README.md"
MANIFEST_FILE = "flashnorm.json"
MANIFEST_VERSION = 1

# Flags that engines know (nano-vllm the first; open changes of vLLM and Transformers the second), and FlashNorm's own
# key, which lists the weightless norms. Its version is 2 if it says as well which LayerNorms become RMSNorms, and 3 if
# it says which norms are not computed.
CONFIG_FLAGS = ("flash_norm", "flashnorm_folded")
CONFIG_KEY = "flashnorm"
CONFIG_VERSIONS = (1, 2, 3)

_NONE_CENTRED, _NONE_CANCELLED = Centred(), Cancelled()

# Keys of an adapter's adapter_config.json: whether it belongs to a folded model, and the hash of that model's folds.
ADAPTER_MARK = "flashnorm"
ADAPTER_PLAN = "flashnorm_plan"

# The end of the name of a folded model that has no folder or hub id to name. No path and no hub id ends like this. The
# beginning of the hash of its folds may follow.
FOLDED_BASE = "#flashnorm"
_FOLDED_BASE = re.compile(rf"{FOLDED_BASE}(?:-([0-9a-f]{{12}}))?$")

# An adapter's `revision` if its base is a folder: with the beginning of the hash of the folder's folds.
_FOLDS_REVISION = re.compile("flashnorm-([0-9a-f]{12})")


def folded_base(model: str, folds_hash: str) -> str:
    """The name, for adapters, of a model that was folded in memory, or by a conversion whose folder is not known."""
    return f"{model}{FOLDED_BASE}-{folds_hash[:12]}"


def is_folded_base(base: str) -> bool:
    """Whether a name ends as those of `folded_base` do, with a hash or without."""
    return _FOLDED_BASE.search(base) is not None


def base_revision(model: str, folds_hash: str) -> str | None:
    """The `revision` of an adapter's base that is a folder, which names the folder's folds; None for a hub id.

    PEFT keeps this key, and drops those that it does not know. Transformers reads no revision of a folder; on the hub,
    it would look for one of this name.
    """
    return f"flashnorm-{folds_hash[:12]}" if os.path.isdir(model) else None


def names_folds(adapter: Mapping[str, Any]) -> bool:
    """Whether an adapter's config says, by its base's name or `revision`, that the base is folded."""
    revision, base = adapter.get("revision"), adapter.get("base_model_name_or_path")
    of_folder = isinstance(revision, str) and _FOLDS_REVISION.fullmatch(revision) is not None
    return of_folder or (isinstance(base, str) and is_folded_base(base))


def other_folds(adapter: Mapping[str, Any], folds_hash: str) -> bool:
    """Whether an adapter's config says that it belongs to a folded model with other folds than those of this hash."""
    said = _FOLDED_BASE.search(str(adapter.get("base_model_name_or_path")))
    of_folder = _FOLDS_REVISION.fullmatch(str(adapter.get("revision")))
    hashes = [adapter.get(ADAPTER_PLAN), said and said[1], of_folder and of_folder[1]]
    return any(found is not None and not folds_hash.startswith(str(found)) for found in hashes)


def config_keys(
    norms: Iterable[str], centred: Centred = _NONE_CENTRED, cancelled: Cancelled = _NONE_CANCELLED
) -> dict[str, Any]:
    """The keys to add to config.json.

    Args:
        norms: the tensors that are absent, or stored at their identity value.
        centred: the LayerNorms that become RMSNorms, and the parameters that are centred for that.
        cancelled: the norms that are not computed.
    """
    version = 3 if cancelled.norms else 2 if centred.norms else 1
    entry: dict[str, Any] = {"version": version, "weightless": sorted(norms)}
    if centred.norms:
        entry["centred"] = {
            "norms": sorted(centred.norms),
            "writers": {writer.name: writer.axis for writer in sorted(centred.writers, key=lambda one: one.name)},
        }
    if cancelled.norms:
        entry["cancelled"] = cancelled.listed()
    return dict.fromkeys(CONFIG_FLAGS, True) | {CONFIG_KEY: entry}


def is_marked(config: Mapping[str, Any]) -> bool:
    """Whether a config says, by a flag or by our key, that norms are folded."""
    return any(config.get(flag) for flag in CONFIG_FLAGS) or config.get(CONFIG_KEY) is not None


@dataclass(frozen=True)
class FileRecord:
    """The identity of a file: SHA-256 in hexadecimal, and size in bytes."""

    sha256: str
    size: int

    @staticmethod
    def of(data: bytes) -> "FileRecord":
        """The record of a file that holds these bytes."""
        return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def listed_records(files: Mapping[str, Any], path: Path) -> dict[str, FileRecord]:
    """File name -> record, from a part of the manifest at `path`. Raises `InputError` if an entry is no record."""
    records: dict[str, FileRecord] = {}
    for name, entry in files.items():
        match entry:
            case {"sha256": str(sha256), "size": int(size)}:
                records[name] = FileRecord(sha256, size)
            case _:
                raise InputError(f"{path}: expected sha256 and size of {name}, found {str(entry)[:80]}")
    return records


@dataclass(frozen=True)
class Manifest:
    """The content of flashnorm.json.

    Attributes:
        flashnorm_version: the release of flashnorm that wrote it.
        source_id, revision: hub id and commit of the source; None if the source was not in the hub's cache.
        source_files: the files of the source that were read, by name.
        left_out: files and folders of the source that do not belong to the model, and were not read.
        earlier: if the source was converted before and trained on since: what its own manifest says of its source.
        options: what `options` gives.
        plan: the plan that was followed, in the names of module parameters.
        files: the files that were written, by name, without the manifest itself.
    """

    flashnorm_version: str
    source_id: str | None
    revision: str | None
    source_files: dict[str, FileRecord]
    left_out: tuple[str, ...]
    earlier: "Earlier | None"
    options: dict[str, Any]
    plan: FoldPlan
    files: dict[str, FileRecord]

    def to_json(self) -> bytes:
        """The manifest as the bytes of its file."""
        source = {"id": self.source_id, "revision": self.revision, "files": _sorted_records(self.source_files)}
        if self.left_out:
            source["left_out"] = list(self.left_out)
        if self.earlier is not None:
            source["earlier"] = asdict(self.earlier)
        return to_json(
            {
                "version": MANIFEST_VERSION,
                "flashnorm_version": self.flashnorm_version,
                "source": source,
                "options": self.options,
                "plan": _without_kinds(self.plan.to_dict()),
                "files": _sorted_records(self.files),
            }
        )

    @staticmethod
    def from_dict(data: Mapping[str, Any], path: Path) -> "Manifest":
        """The manifest from parsed JSON of the file `path`. Raises `InputError` if it is not a valid manifest."""
        remedy = "convert the source again"
        match data:
            case {
                "version": int(version),
                "flashnorm_version": str(release),
                "source": {
                    "id": None | str() as source,
                    "revision": None | str() as revision,
                    "files": dict(read),
                    **others,
                },
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
            release,
            source,
            revision,
            listed_records(read, path),
            _texts(others.get("left_out")),
            Earlier.from_dict(others.get("earlier")),
            options,
            read_plan,
            listed_records(written, path),
        )


@dataclass(frozen=True)
class Earlier:
    """An earlier conversion, of which the source of a conversion is a trained result.

    Attributes:
        flashnorm_version: the release of flashnorm that did it.
        id, revision: hub id and commit of the model that it converted; None if they are not known.
    """

    flashnorm_version: str
    id: str | None
    revision: str | None

    @staticmethod
    def from_dict(data: Any) -> "Earlier | None":
        """Read back what a manifest says; None if there is nothing of that form."""
        match data:
            case {
                "flashnorm_version": str(version),
                "id": None | str() as source,
                "revision": None | str() as revision,
            }:
                return Earlier(version, source, revision)
        return None


def options(
    keep_norms: bool, untie: bool, keep: Sequence[str], center: bool = False, cancel: Form | None = None
) -> dict[str, Any]:
    """A manifest's options; `keep`, `center` and `cancel` are among them where they were used."""
    used = ({"keep": list(keep)} if keep else {}) | ({"center": True} if center else {})
    used |= {"cancel": cancel.value} if cancel else {}
    return {"keep_norms": keep_norms, "untie": untie} | used


def kept_by(manifest_options: Mapping[str, Any]) -> tuple[str, ...]:
    """The patterns under `keep` among a manifest's options; none if there is nothing of that form."""
    return _texts(manifest_options.get("keep"))


def _texts(entry: Any) -> tuple[str, ...]:
    """The texts in an entry of a manifest; none if it is no list."""
    return tuple(text for text in entry if isinstance(text, str)) if isinstance(entry, list) else ()


def _without_kinds(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan's JSON for a manifest of version 1, without `kind`, which the releases that read it do not know."""
    kept = {name: {key: value for key, value in why.items() if key != "kind"} for name, why in plan["kept"].items()}
    return plan | {"kept": kept}


def _sorted_records(records: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: asdict(records[name]) for name in sorted(records)}


def listed_norms(config: Mapping[str, Any], where: str | Path) -> list[str] | None:
    """The norm tensors that a config lists as weightless; None if it lists none.

    Args:
        config: the parsed config.json.
        where: its path, for messages.

    Raises:
        InputError: the key has another content, or another version.
    """
    entry: Any = config.get(CONFIG_KEY)
    # The reference's tool writes `true` and leaves its norms at ones.
    if entry is None or entry is True:
        return None
    names = entry.get("weightless") if isinstance(entry, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f'{where}: expected "{CONFIG_KEY}": {{"version": {CONFIG_VERSIONS[0]}, "weightless": [...]}}, found '
            "something else; convert the source again"
        )
    if entry.get("version") not in CONFIG_VERSIONS:
        raise InputError(
            f"{where}: expected version {' or '.join(map(str, CONFIG_VERSIONS))} of the {CONFIG_KEY} key, found "
            f"{entry.get('version')!r}; use the flashnorm release that wrote it"
        )
    return names


def listed_centred(config: Mapping[str, Any], where: str | Path) -> Centred:
    """The LayerNorms that a config lists as RMSNorms, and what is centred for that; none if it lists none.

    Args:
        config: the parsed config.json.
        where: its path, for messages.

    Raises:
        InputError: the key has another content, or another version.
    """
    match _listed(config, "centred", where):
        case None:
            return _NONE_CENTRED
        case {"norms": [*norms], "writers": dict(writers)}:
            named = all(isinstance(name, str) for name in (*norms, *writers))
            if named and all(isinstance(axis, int) for axis in writers.values()):
                return Centred(tuple(norms), tuple(Writer(name, axis) for name, axis in writers.items()))
    raise InputError(
        f"{where}: expected {CONFIG_KEY}.centred to list norms, and axes of writers, found something else; convert the "
        "source again"
    )


def listed_cancelled(config: Mapping[str, Any], where: str | Path) -> Cancelled:
    """The norms that a config lists as not computed; none if it lists none.

    Args:
        config: the parsed config.json.
        where: its path, for messages.

    Raises:
        InputError: the key has another content, or another version.
    """
    entry = _listed(config, "cancelled", where)
    if entry is None:
        return _NONE_CANCELLED
    try:
        return Cancelled.from_dict(entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: expected {CONFIG_KEY}.cancelled to list norms and in which norms they cancel, found something "
            "else; convert the source again"
        ) from error


def _listed(config: Mapping[str, Any], key: str, where: str | Path) -> Any:
    """What our key of a config says under one of its own keys, None if nothing; errors as for `listed_norms`."""
    listed_norms(config, where)
    entry: Any = config.get(CONFIG_KEY)
    return entry.get(key) if isinstance(entry, dict) else None


# How the sections of a model card begin and end by which a later conversion finds them again.
CARD_BEGIN, CARD_END = "# FlashNorm\n\nThis is ", "Written by flashnorm "
VERIFIED_BEGIN, VERIFIED_END = "## Verified\n", "`flashnorm verify SOURCE THIS_FOLDER` does it again.\n"

_CARD_SECTION = re.compile(
    rf"^{re.escape(CARD_BEGIN)}.*?^{re.escape(CARD_END)}\S+\n"
    rf"(?:\n{re.escape(VERIFIED_BEGIN)}.*?^{re.escape(VERIFIED_END)})?",
    re.DOTALL | re.MULTILINE,
)


def without_section(card: str) -> str:
    """The text of a model card without the section that a conversion added, with what a verification found."""
    return _CARD_SECTION.sub("", card)


def to_json(data: Any, *, ascii_only: bool = True) -> bytes:
    """JSON in the format of Transformers: indented by two spaces, with a newline at the end."""
    return (json.dumps(data, indent=2, ensure_ascii=ascii_only) + "\n").encode()
