"""What `--force` may delete: a folder that holds only what `convert` wrote, unchanged.

* The manifest lists what was written, but it is a file like any other, and may be damaged or forged. So it decides
  nothing by itself: a file counts as ours only if its bytes have the listed hash, and no path from the list is opened.
* All files are hashed, shards as well. A model that was trained and saved into the folder has shards of the same size,
  and may be days of someone's work; hashing takes a fraction of the time of the conversion that follows.
* No file is hashed twice: if its inode, size and times are as before the hashing, its content is the same.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from flashnorm.errors import InputError
from flashnorm.files.reader import read_json
from flashnorm.files.records import file_record
from flashnorm.files.source_files import cannot_read
from flashnorm.format import MANIFEST_FILE, FileRecord, listed_records

_REMEDY = "move what you need out of it, or choose another target"

# Name -> mode, size, inode, times. A folder's name ends with a slash, and only its mode counts.
States = dict[str, tuple[int, ...]]


def check_contents(folder: Path) -> States:
    """Refuse a folder that holds anything that `convert` has not written, as far as names, kinds and sizes tell.

    Returns:
        The state of everything in the folder, for `check_hashes`.

    Raises:
        InputError: the folder holds something else, its manifest is no manifest, or it cannot be read.
    """
    listed = _listed(folder)
    ours = {f"{parent}/" for name in listed for parent in Path(name).parents}
    states = _states(folder, ours)
    written = {MANIFEST_FILE, *listed} if listed else set()
    if others := sorted(name for name in states if name not in ours and name not in written):
        raise InputError(
            _refusal(folder, others, f"not listed in {MANIFEST_FILE}" if listed else f"and no {MANIFEST_FILE}")
        )
    files = {name: state for name, state in states.items() if name in written}
    # A link or a pipe in the place of a file is not what `convert` wrote, whatever the link leads to.
    odd = [name for name, (mode, *_) in files.items() if not stat.S_ISREG(mode)]
    _refuse_changed(folder, odd or [n for n, (_, size, *_) in files.items() if n in listed and size != listed[n].size])
    return states


def check_hashes(folder: Path, states: States, progress: Callable[[int, int], object] | None = None) -> None:
    """Refuse a folder with a file that has been changed since `convert` wrote it. Reads all files in the folder.

    Args:
        folder: the folder.
        states: the states of the folder's contents, from `check_contents`.
        progress: called with the number of bytes that are read so far, and of all bytes to read.

    Raises:
        InputError: a file was changed, or cannot be read.
    """
    listed = _listed(folder)
    names = sorted(states.keys() & listed.keys())
    done, total = 0, sum(listed[name].size for name in names)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    _refuse_changed(folder, [name for name in names if file_record(folder / name, advance) != listed[name]])


def _listed(folder: Path) -> dict[str, FileRecord]:
    """The files that the folder's manifest lists (all but the manifest itself); none if there is no manifest."""
    path = folder / MANIFEST_FILE
    if not os.path.lexists(path):
        return {}
    match read_json(path, _REMEDY):
        case {"files": dict(files)} if files:
            return listed_records(files, path)
    raise InputError(f"{path}: expected the manifest of a conversion, found something else; {_REMEDY}")


def _states(folder: Path, ours: set[str]) -> States:
    """The state of everything in a folder and in its subfolders that are in `ours`; links are not followed."""
    states: States = {}
    inside, waiting = "", [""]
    try:
        while waiting:
            inside = waiting.pop()
            for entry in os.scandir(folder / inside):
                name = inside + entry.name
                at = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(at.st_mode):
                    states[f"{name}/"] = (at.st_mode,)
                    waiting += [f"{name}/"] if f"{name}/" in ours else []
                else:
                    states[name] = (at.st_mode, at.st_size, at.st_ino, at.st_mtime_ns, at.st_ctime_ns)
    except OSError as error:
        raise cannot_read(folder / inside, error) from error
    return states


def _refuse_changed(folder: Path, names: list[str]) -> None:
    if names:
        raise InputError(_refusal(folder, sorted(names), "changed since"))


def _refusal(folder: Path, names: list[str], what: str) -> str:
    found = ", ".join(map(repr, names[:3]))  # quoted: a name may hold anything
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{folder}: expected nothing but what convert wrote, as --force deletes nothing else, found {found}{more}, "
        f"{what}; {_REMEDY}"
    )
