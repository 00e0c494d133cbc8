"""Opens a checkpoint on the Hugging Face hub without fetching it: headers, and the tensors that are asked for.

The folder that stands for it has the small files that say what the model is. In place of every other file it has one of
the same size without content, which takes no room; safetensors files among them begin with their header.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import quote

from huggingface_hub import HfFileSystem
from huggingface_hub.constants import HF_HUB_OFFLINE

from flashnorm.errors import InputError
from flashnorm.files.others import other_files
from flashnorm.files.reader import CONFIG_FILE, INDEX_FILE, Checkpoint, FileState
from flashnorm.files.strict_json import MAX_BYTES
from flashnorm.format import CARD_FILE, MANIFEST_FILE
from flashnorm.hub import hub_errors, is_ignored, local_folder, on_hub

# These files are fetched: they are small, and plans are made from them.
_FETCHED = (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, "modules.json", "*.py")

# Tensors up to this size, in bytes, are kept: norms are read several times.
_SMALL = 1 << 20

# The first request for a file fetches this many bytes: most headers, with one request each.
_HEAD = 1 << 19
_CONNECTIONS = 8


@dataclass(frozen=True)
class HubCheckpoint(Checkpoint):
    """A checkpoint whose tensors are fetched from the hub when they are read.

    Attributes:
        place: hub id, revision and subfolder, as HfFileSystem writes them.
        fetched: the tensors' bytes that are here already, by file and place.
        whole: the files that are here as a whole for the moment, in their places.
        sha256: file name -> hash of a large file, as the hub says.
    """

    place: str = ""
    fetched: Any = None
    whole: set[str] = field(default_factory=set)
    sha256: dict[str, str] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """A commit does not change."""

    def with_states_of(self, names: list[str]) -> "HubCheckpoint":
        """As in a folder; of files that stand for a commit's, only the sizes say something."""
        return replace(self, states=self.states | _sizes(self.folder, names))

    def fetch_small(self, name: str) -> None:
        """Put the content of a file into its place."""
        path = self.folder / name
        path.write_bytes(_range(self.place, name, 0, path.stat().st_size))

    def _read(self, file: str, starts: Sequence[int], nbytes: int) -> bytearray:
        if file in self.whole:
            return super()._read(file, starts, nbytes)
        keys = [(file, start, nbytes) for start in starts]
        found = {key: self.fetched.get(key) or _range(self.place, file, key[1], key[1] + nbytes) for key in keys}
        if nbytes <= _SMALL:
            self.fetched.update(found)
        return bytearray().join(found[key] for key in keys)


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, FileState]:
    return {name: FileState((folder / name).stat().st_size, 0, 0, 0) for name in names}


def open_whole(repository: str, commit: str, subfolder: str, folder: Path) -> HubCheckpoint:
    """Open a checkpoint on the hub to convert it: the folder has all its small files, and none that is not fetched.

    Args:
        repository: the hub id.
        commit: a commit, which does not change.
        subfolder: the model's folder in the repository.
        folder: an empty folder.

    Raises:
        InputError: as for `open_on_hub`.
    """
    try:
        checkpoint = open_on_hub(repository, commit, subfolder, folder)
        for path in folder.rglob("*"):
            if path.is_file() and is_ignored(path.relative_to(folder).as_posix()):
                path.unlink()
        for name in (*other_files(checkpoint).belonging, CARD_FILE):
            if (folder / name).is_file():
                checkpoint.fetch_small(name)
    except InputError as error:
        raise InputError(str(error).replace(str(folder), repository)) from error
    return checkpoint


@contextlib.contextmanager
def opened(source: str | Path, revision: str | None = None, subfolder: str = "") -> Iterator[Checkpoint]:
    """A checkpoint to look at: a folder as it is, a repository on the hub without fetching it (unless offline).

    Args:
        source: the checkpoint's folder, or its hub id.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the model's folder, relative to the source's.

    Raises:
        InputError: there is no such checkpoint, or it cannot be read. Errors name the source, not its stand-in.
    """
    if not on_hub(source) or HF_HUB_OFFLINE:
        yield Checkpoint.open(local_folder(source, revision, subfolder))
        return
    with tempfile.TemporaryDirectory(prefix="flashnorm-") as folder:
        try:
            yield open_on_hub(str(source), revision, subfolder, Path(folder))
        except InputError as error:
            raise InputError(str(error).replace(folder, str(source))) from error


def open_on_hub(repository: str, revision: str | None, subfolder: str, folder: Path) -> HubCheckpoint:
    """Open a checkpoint on the hub.

    Args:
        repository: the hub id.
        revision: branch, tag or commit; None for the main branch.
        subfolder: the model's folder in the repository.
        folder: an empty folder, which stands for the checkpoint as long as it is in use.

    Raises:
        InputError: there is no such repository, it cannot be read, or holds no checkpoint in safetensors format.
    """
    at = repository if revision is None else f"{repository}@{quote(revision, safe='')}"
    place = (PurePosixPath(at) / subfolder).as_posix()
    with hub_errors(repository if revision is None else f"{repository} at {revision}"):
        files = cast(dict[str, dict[str, Any]], HfFileSystem().find(at, detail=True))
    inside = {PurePosixPath(path): info["size"] for path, info in files.items()}
    sizes = {path.relative_to(place).as_posix(): size for path, size in inside.items() if path.is_relative_to(place)}
    if subfolder and not sizes:
        raise InputError(f"{repository}: expected a model in its folder {subfolder!r}, found none; check --subfolder")
    for name, size in sizes.items():
        if ".." in name.split("/"):
            raise InputError(f"{repository}: expected files in its folder, found {name!r}; do not trust it")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            if any(fnmatchcase(name, pattern) for pattern in _FETCHED):
                file.write(_range(place, name, 0, size))
            elif fnmatchcase(name, "*.safetensors") and "/" not in name:
                file.write(_header(place, name, size))
            os.truncate(file.fileno(), size)
    opened = Checkpoint.open(folder)
    given: dict[str, Any] = {one.name: getattr(opened, one.name) for one in fields(opened)}
    given["states"] = _sizes(folder, opened.states)
    large = {PurePosixPath(path): info["lfs"]["sha256"] for path, info in files.items() if info.get("lfs")}
    checkpoint = HubCheckpoint(
        **given,
        place=place,
        fetched={},
        sha256={path.relative_to(place).as_posix(): sha for path, sha in large.items() if path.is_relative_to(place)},
    )
    # Norms have one axis. Each is asked for by a request of its own, so several are under way at a time.
    small = [name for name, info in opened.tensors.items() if len(info.shape) == 1]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for _ in pool.map(checkpoint.read_bytes, small):
            pass
    return checkpoint


def _header(place: str, name: str, size: int) -> bytes:
    head = _range(place, name, 0, min(size, _HEAD))
    length = 8 + int.from_bytes(head[:8], "little")
    if length > 8 + MAX_BYTES:
        return head  # enough for the error when it is read
    more = _range(place, name, len(head), min(size, length)) if len(head) < length else b""
    return (head + more)[:length]


def _range(place: str, name: str, start: int, end: int) -> bytes:
    if start == end:
        return b""
    with hub_errors(f"{place}/{name}"):
        found = cast(bytes, HfFileSystem().cat_file(f"{place}/{name}", start=start, end=end, cache_type="none"))
    if len(found) != end - start:
        raise InputError(f"{place}/{name}: expected {end - start} bytes, found {len(found)}; run again")
    return found
