"""What `--force` may delete: a folder in which everything is what `convert` wrote, and nothing else.

* The manifest lists what was written, but it is a file as any other, and may be damaged or made up. So it decides
  nothing by itself: a file counts as ours only if its bytes have the hash that is listed, and no path in it is opened.
* All files are hashed, shards as well. A model that was trained and saved into the folder has shards of the same size,
  and is someone's work of days; hashing takes a fraction of the time of the conversion that follows.
* Nothing is hashed twice: files whose inode, size and times are as they were before they were hashed are the same.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from flashnorm.checkpoint.reader import read_json
from flashnorm.checkpoint.records import FileRecord, file_record, listed_records
from flashnorm.checkpoint.small_files import MANIFEST_FILE
from flashnorm.checkpoint.source_files import cannot_read
from flashnorm.errors import InputError

_REMEDY = "move what you need out of it, or choose another target"

# Name -> mode, size, inode, times. A folder's name ends with a slash, and only its mode counts.
States = dict[str, tuple[int, ...]]


def check_contents(folder: Path) -> States:
    """Refuse a folder that holds anything that `convert` has not written, as far as names, kinds and sizes tell.

    Returns:
        The state of everything in it, for `check_hashes`.

    Raises:
        InputError: there is something else in it, the manifest is none, or the folder cannot be read.
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
    # A link or a pipe in the place of a file is no file of ours, whatever it leads to.
    odd = [name for name, (mode, *_) in files.items() if not stat.S_ISREG(mode)]
    _refuse_changed(folder, odd or [n for n, (_, size, *_) in files.items() if n in listed and size != listed[n].size])
    return states


def check_hashes(folder: Path, states: States, progress: Callable[[int, int], object] | None = None) -> None:
    """Refuse a folder with a file that has been changed since `convert` wrote it. Reads all of it.

    Args:
        folder: the folder.
        states: of its contents, as `check_contents` gave them.
        progress: called with the bytes that are read so far, and in all.

    Raises:
        InputError: a file is another, or cannot be read.
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
    """What the folder's manifest says was written, but for itself; nothing if there is no manifest."""
    path = folder / MANIFEST_FILE
    if not os.path.lexists(path):
        return {}
    match read_json(path, _REMEDY):
        case {"files": dict(files)} if files:
            return listed_records(files, path)
    raise InputError(f"{path}: expected the manifest of a conversion, found something else; {_REMEDY}")


def _states(folder: Path, ours: set[str]) -> States:
    """The state of everything in a folder and in those of its subfolders that are ours; links are not followed."""
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
