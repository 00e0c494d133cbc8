"""The output of a conversion: it grows in a staging folder beside the target and is published by one rename.

* The target appears whole or not at all, whenever the process is killed; an old target stays until the new one replaces
  it.
* A journal beside the output records each shard once the disk has it. A later run with the same key keeps the shards
  whose hash is still the journal's, and takes over the notes that were made while they were written.
* config.json is the last file to appear, so that nothing takes the staging folder for a model.
* Shards are written under other names, each in a file of its own, and take their place when they are finished. So a
  shard may be begun by two processes, or by one that dies; whoever writes for a run that has ended finds its file gone.
* A lock keeps two runs from the same target. It is a plain `flock`, which the system drops when a process dies. The
  filelock package is not used: on a file system without `flock` it falls back to a marker file, which a killed process
  leaves behind, and it makes a folder again that the run before has just removed. Some network file systems keep such
  locks for one host only. So the lock file also says whose run it is, and a run whose lock was taken over stops.
* An old target is replaced only if `convert` wrote everything in it. This is checked before the work starts, so that no
  work is done in vain, and again just before the new target takes its place.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from flashnorm.errors import InputError
from flashnorm.files.replaceable import States, check_contents, check_hashes
from flashnorm.files.source_files import open_file
from flashnorm.format import FileRecord

_LOCK = "lock"

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: the file that was read for it, and the file that was written."""

    source: FileRecord
    output: FileRecord


class Staging:
    """The folder in which the output grows. A context manager: an exception removes what a later run cannot resume.

    `.{target}.flashnorm-partial/` beside the target holds `lock`, `journal.json`, `attempts-*/`, and `model/`, the
    future target.

    Attributes:
        model: the folder to write into.
        attempts: the folder to write shards into, before `take` moves them. No other run has a folder of this name.
        notes: JSON values that this run or an earlier one with the same key has noted.
    """

    def __init__(
        self,
        target: Path,
        key: Mapping[str, Any],
        *,
        force: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Check the target. Entering the context makes the staging folder, or takes up that of an earlier run.

        Args:
            target: the folder to publish. Its parent folder is made if there is none.
            key: JSON values; shards of an earlier run are kept only if its key was the same.
            force: replace a target that exists, if everything in it is what `convert` wrote.
            progress: called while the files of such a target are read, with the bytes read so far, and in all.

        Raises:
            InputError: the target exists, or with `force` it holds what may not be deleted. Entering the context raises
                it as well if another run holds the lock, or the staging folder cannot be written.
        """
        self.target = target
        self.folder = staging_folder(target)
        self.model = self.folder / "model"
        self._run = uuid.uuid4().hex
        self.attempts = self.folder / f"attempts-{self._run}"
        self._owned = False
        self._force = force
        self._progress = progress
        self._old: States | None = None
        self._key = json.loads(json.dumps(key))
        self._shards: dict[str, ShardRecord] = {}
        self.notes: dict[str, Any] = {}
        self._lock: int | None = None
        check_target(target, force=force)

    def __enter__(self) -> "Staging":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _refuse_links(self.folder, self.model, self._replaced)
            self._lock = self._take_lock()
            self._restore_replaced()
            # The journal is read first: if the old target is refused, its shards must stay for a later run.
            self._shards, self.notes = self._read_journal()
            os.pwrite(self._lock, self._run.encode(), 0)
            self._owned = True
            self._check_old()
            self._clear_attempts()
            self.attempts.mkdir()
            self.model.mkdir(exist_ok=True)
            _clear(self.model, keep=self._shards)
        except OSError as error:
            self._abandon()
            raise InputError(
                f"{self.folder}: cannot be written ({error.strerror or error}); choose a target in a folder that can"
            ) from error
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # What another run has removed is no fault of the disk, or of a worker's host.
        taken = isinstance(error, (OSError, InputError)) and self._is_another()
        if error is not None:
            self._abandon()
        self._release()
        if taken:
            raise self._taken_over() from error

    def resumable_bytes(self) -> int:
        """Bytes of the shards that an earlier run has finished."""
        return sum(record.output.size for record in self._shards.values())

    def earlier(self, name: str) -> ShardRecord | None:
        """The record of a shard that an earlier run has finished. Whether its file is still the same is not checked."""
        return self._shards.get(name)

    def take(self, attempt: str, name: str) -> None:
        """Give a file in `attempts`, which the disk has, its place in the model. Other attempts at it are removed."""
        self._check_owner()
        (self.attempts / attempt).rename(self.model / name)
        for other in self.attempts.glob(f"{glob.escape(name)}.*"):
            other.unlink(missing_ok=True)

    def attempted_bytes(self) -> int:
        """Bytes of shards that are being written; of several attempts at one, the longest counts."""
        sizes: dict[str, int] = {}
        for path in self.attempts.iterdir():
            name = path.name.rpartition(".")[0]
            with contextlib.suppress(FileNotFoundError):
                sizes[name] = max(sizes.get(name, 0), path.stat().st_size)
        return sum(sizes.values())

    def record(self, name: str, record: ShardRecord) -> None:
        """Note that a shard is finished. The shard must have been synced to the disk."""
        self._shards[name] = record
        self._write_journal()

    def note(self, notes: Mapping[str, Any], outdated: Collection[str]) -> None:
        """Add notes to the journal, and forget the shards that must be written again because of the notes."""
        self.notes |= notes
        self._shards = {name: record for name, record in self._shards.items() if name not in outdated}
        self._write_journal()

    def _write_journal(self) -> None:
        shards = {name: asdict(record) for name, record in self._shards.items()}
        journal = {"key": self._key, "notes": self.notes, "shards": shards}
        self._check_owner()
        sync_folder(self.model)
        new = self.folder / "journal.json.new"
        write_file(new, json.dumps(journal, indent=1).encode())
        new.replace(self._journal)
        sync_folder(self.folder)

    def forget(self) -> None:
        """Let no later run continue with the finished shards; they are removed at the end."""
        self._shards = {}

    def publish(self) -> None:
        """Make `model` the target, in one rename. Everything in it must have been synced to the disk."""
        for folder, _, _ in os.walk(self.model):
            sync_folder(Path(folder))
        self._check_owner()
        if self._force and os.path.lexists(self.target):
            self._check_old()
            _exchange(self.model, self.target, aside=self._replaced)
        else:
            # This fails if someone has made the target meanwhile, unless it is an empty folder.
            self.model.rename(self.target)
        sync_folder(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder, whatever is in it, and let go of the lock."""
        self.forget()
        self._abandon()

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.json"

    @property
    def _replaced(self) -> Path:
        return self.folder / "replaced"

    def _check_old(self) -> None:
        """Check the old target, and its hashes if they were not checked yet or a file was touched since."""
        # Since the last check, another run may have published, or somebody may have begun to work in the target.
        states = check_target(self.target, force=self._force)
        if states is not None and states != self._old:
            check_hashes(self.target, states, self._progress)
        self._old = states

    def _take_lock(self) -> int:
        path = self.folder / _LOCK
        lock = None
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(path.stat(), os.fstat(lock)):
                raise BlockingIOError
        except BaseException as error:
            if lock is not None:
                os.close(lock)
            # The lock file is gone, or another one: the run that had the lock has removed the folder meanwhile.
            if isinstance(error, (BlockingIOError, FileNotFoundError)):
                raise InputError(
                    f"{self.target}: another run is writing this target; wait until it is done, or choose another "
                    "target"
                ) from error
            raise
        return lock

    def _check_owner(self) -> None:
        """Raise `InputError` if another run has taken the lock: this file system keeps locks for one host only."""
        if self._is_another():
            raise self._taken_over()

    def _taken_over(self) -> InputError:
        return InputError(
            f"{self.target}: another run is writing this target, perhaps on another host; wait until it is done, or "
            "choose another target"
        )

    def _is_another(self) -> bool:
        """Whether the folder is another run's by now."""
        try:
            return self._owned and (self.folder / _LOCK).read_bytes() != self._run.encode()
        except FileNotFoundError:
            return True

    def _clear_attempts(self) -> None:
        for folder in self.folder.glob("attempts-*"):
            shutil.rmtree(folder)

    def _abandon(self) -> None:
        """Remove what no later run can use, and let go of the lock."""
        # A failure to remove must not hide the error that led here. Without the lock, the folder is another run's.
        with contextlib.suppress(OSError):
            if self._lock is not None and not self._is_another():
                self._restore_replaced()
                self._clear_attempts()
                for folder in (self.model, self._replaced):
                    if folder.exists():
                        _clear(folder, keep=self._shards)
                if not self._shards:
                    # The lock is removed last: once it is gone, another run may begin to write here.
                    _clear(self.folder, keep={_LOCK})
                    (self.folder / _LOCK).unlink()
                    self.folder.rmdir()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _restore_replaced(self) -> None:
        """Undo the half of an exchange after which a run was killed (if the system cannot exchange in one step)."""
        if self._replaced.exists() and not os.path.lexists(self.target):
            self._replaced.rename(self.target)

    def _read_journal(self) -> tuple[dict[str, ShardRecord], dict[str, Any]]:
        """The shards and the notes of an earlier run with the same key."""
        try:
            journal = json.loads(self._journal.read_bytes())
            if journal["key"] != self._key:
                return {}, {}
            shards = {
                name: ShardRecord(FileRecord(**shard["source"]), FileRecord(**shard["output"]))
                for name, shard in journal["shards"].items()
            }
            return shards, dict(journal["notes"])
        except (OSError, ValueError, KeyError, TypeError):
            # There is no journal yet, or another version of flashnorm has written it.
            return {}, {}


def staging_folder(target: Path) -> Path:
    """The folder in which the output for `target` grows."""
    return target.parent / f".{target.name}.flashnorm-partial"


def check_target(target: Path, *, force: bool) -> States | None:
    """Raise `InputError` if the target exists and is not to be replaced, or holds what `force` may not delete.

    Hashes are not checked here, but in `Staging`.

    Returns:
        The state of the target's contents; None if it does not exist.
    """
    if not os.path.lexists(target):
        return None
    if os.path.ismount(target):
        raise InputError(
            f"{target}: expected a folder that can be renamed, found a mount point; choose a folder in it: {target}/..."
        )
    if not force:
        left = staging_folder(target)
        note = f" ({left} is left from an interrupted run and can be deleted)" if left.exists() else ""
        raise InputError(f"{target}: expected nothing there yet, found it exists; choose another, or --force{note}")
    if target.is_symlink() or not os.path.isdir(target):
        raise InputError(
            f"{target}: expected a folder that convert wrote, to replace it, found a link or no folder; remove it "
            "yourself or choose another target"
        )
    return check_contents(target)


def _refuse_links(*folders: Path) -> None:
    """Refuse links: the folder that a link leads to must not be cleared."""
    for folder in folders:
        if folder.is_symlink():
            raise InputError(f"{folder}: expected a folder of an earlier run, found a link; remove it")


@contextlib.contextmanager
def disk_errors(staging: Path) -> Iterator[None]:
    """Turn a full or failing disk into an `InputError` that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in _DISK_FULL
        found = "the disk is full or a size limit is reached" if full else "the disk does not take what is written"
        raise InputError(
            f"{staging}: {found} ({error.strerror or error}); {'make room' if full else 'mend that'} and run the same "
            "command again: it continues with the shards that are finished"
        ) from error


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a small file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord.of(data)


def copy_file(source: Path, path: Path) -> FileRecord:
    """Copy a file byte for byte and wait until the disk has it. Raises `InputError` if the source cannot be read."""
    digest = hashlib.sha256()
    size = 0
    with open_file(source) as original, path.open("wb", buffering=0) as copy:
        while block := original.read(1 << 20):
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[copy.write(view) :]
            size += len(block)
        os.fsync(copy.fileno())
    return FileRecord(digest.hexdigest(), size)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear(folder: Path, keep: Collection[str]) -> None:
    """Remove everything in a folder but the files to keep; config.json first, so that no half model has one."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "config.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def _exchange(new: Path, old: Path, aside: Path) -> None:
    """Put `new` in the place of `old`: in one step if the system can, else with a moment in which neither is there."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 and renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
        return
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
