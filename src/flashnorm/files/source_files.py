"""Opens files of unknown origin with care: only regular files in the checkpoint's own folder are accepted.

* A link must not lead out of the folder: what it leads to would be copied into the output and perhaps published. Links
  into the hub's cache may: tools make folders of them, and whoever does not know a file's hash cannot name it.
* A pipe or a device in the place of a file could block the read, or never end.
"""

import os
import stat
import unicodedata
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

from flashnorm.errors import InputError

# This file marks the store of contents that the repositories of a hub's cache share (huggingface_hub 2.4).
_SHARED_STORE = ".huggingface-shared-blobs"

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read. Raises `InputError` if it is no regular file or cannot be read."""
    return os.fdopen(open_handle(path), "rb")


def open_handle(path: Path) -> int:
    """Open a regular file to read, as a file descriptor. Raises `InputError` as `open_file` does."""
    status_of_file(path)
    try:
        # `O_NONBLOCK`: should the file have become a pipe meanwhile, this does not wait for the pipe's other end.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise cannot_read(path, error) from error


def status_of(path: Path) -> os.stat_result:
    """`stat` of a path, or of what a link leads to. Raises `InputError` if there is nothing."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise cannot_read(path, error) from error


def status_of_file(path: Path) -> os.stat_result:
    """`stat` of a regular file, or of one that a link leads to. Raises `InputError` if it is something else."""
    status = status_of(path)
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(f"{path}: expected a file, found {found}; remove it, or fetch the file again")
    return status


def cannot_read(path: Path, error: Exception) -> InputError:
    """The error to raise for a file that cannot be read."""
    return InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def check_inside(folder: Path, name: str) -> None:
    """Refuse a link that leads out of a checkpoint's folder, unless it leads to a file in the hub's cache.

    Args:
        folder: the checkpoint's folder.
        name: the path of the file, relative to the folder.

    Raises:
        InputError: the link leads elsewhere.
    """
    found = Path(os.path.realpath(folder / name))
    if Path(os.path.realpath(folder)) not in found.parents and not _is_blob(found):
        raise InputError(
            f"{folder / name}: expected a file of this folder, found a link to {found}, outside of it; if you trust "
            "where it leads, put a copy in its place"
        )


def _is_blob(file: Path) -> bool:
    """Whether a file is where the hub's cache keeps contents, under names that are hashes of them.

    That is `blobs/HASH` beside the `snapshots` of a repository (`models--*`), or `blobs/HA/HASH` in the store that the
    repositories of a cache share.
    """
    beside = file.parent.parent
    if file.parent.name == "blobs":
        return (beside / "snapshots").is_dir()
    return beside.name == "blobs" and (beside / _SHARED_STORE).is_file()


def check_names_differ(folder: Path, names: Iterable[str]) -> None:
    """Refuse files whose names differ only in upper and lower case, or in how Unicode composes a letter.

    On some file systems such names mean one file, and the second file would replace the first.

    Raises:
        InputError: there are two such names.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise InputError(
                f"{folder}: expected names that differ on every file system, found {other!r} and {name!r}; rename or "
                "remove one of them"
            )
