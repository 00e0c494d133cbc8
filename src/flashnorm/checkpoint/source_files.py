"""Other people's files, opened with care: a regular file of the checkpoint's own folder, or a refusal.

* What a link leads to would be read, copied into the output, and perhaps published: links must not lead out.
* A pipe or a device named like a file would be waited for, or be read without end.
"""

import os
import stat
import unicodedata
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

from flashnorm.errors import InputError

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read. Raises `InputError` if it is no such file or cannot be read."""
    return os.fdopen(open_handle(path), "rb")


def open_handle(path: Path) -> int:
    """The same as a file descriptor."""
    status_of_file(path)
    try:
        # Should it have become a pipe meanwhile, this does not wait for its other end.
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
    """The same, of a regular file. Raises `InputError` if it is something else."""
    status = status_of(path)
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(f"{path}: expected a file, found {found}; remove it, or fetch the file again")
    return status


def cannot_read(path: Path, error: Exception) -> InputError:
    """The error to raise for a file that cannot be read."""
    return InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def check_inside(folder: Path, name: str) -> None:
    """Refuse a link that leads out of a checkpoint's folder.

    A snapshot in the hub's cache, `snapshots/<commit>`, consists of links into `../../blobs`; these are right.

    Args:
        folder: of the checkpoint.
        name: of the file, relative to it.

    Raises:
        InputError: it leads elsewhere.
    """
    home = Path(os.path.realpath(folder))
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    found = Path(os.path.realpath(folder / name))
    if not any(root in found.parents for root in allowed):
        raise InputError(
            f"{folder / name}: expected a file of this folder, found a link to {found}, outside of it; if you trust "
            "where it leads, put a copy in its place"
        )


def check_names_differ(folder: Path, names: Iterable[str]) -> None:
    """Refuse files whose names differ in upper and lower case only, or in how Unicode composes a letter.

    On some file systems they are one file, and the second would replace the first.

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
