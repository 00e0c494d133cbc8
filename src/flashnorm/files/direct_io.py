"""Large sequential reads and writes past the page cache, where the system allows it.

* Filling the page cache costs more processor time than folding and hashing together (allocating pages, copying into
  them); `O_DIRECT` costs next to none. It requires file offsets, lengths and memory aligned to a block.
* What the page cache has already is read from there, which costs no more time than `O_DIRECT`, and no disk is asked.
* So bytes travel in windows: a window is a stretch of a file between block boundaries, held in an aligned buffer at the
  same place modulo `BLOCK`. The wanted bytes lie somewhere inside the window.
* If a file system refuses `O_DIRECT`, or the system has none, the same windows go through the page cache.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from types import TracebackType

import numpy as np

from flashnorm.errors import InputError
from flashnorm.files.source_files import cannot_read, open_handle

# A multiple of every logical block size in use (512 and 4096), and the size of a page.
BLOCK = 4096

_HASHED_AT_ONCE = 1 << 23  # bytes

_DIRECT = getattr(os, "O_DIRECT", 0)

_MINCORE = getattr(ctypes.CDLL(None), "mincore", None)


def buffers(count: int, nbytes: int) -> Iterator[memoryview]:
    """An endless ring of `count` page-aligned buffers, each with room for a window around any `nbytes` of a file."""
    size = _floor(nbytes) + 3 * BLOCK
    return cycle([memoryview(mmap.mmap(-1, size)) for _ in range(count)])


class DirectReader:
    """A file to be read in windows. A context manager.

    Attributes:
        size: the size of the file when it was opened, in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open the file. Raises `InputError` if it cannot be read."""
        self._path = path
        self._cached = open_handle(path)
        try:
            self._direct = _open_direct(path, os.O_RDONLY | os.O_NONBLOCK)
            status = os.fstat(self._cached)
            self.size = status.st_size
            # The system tells others than its owner, and those who may write to it, that all of a file is in the cache.
            self._asks = status.st_uid == os.geteuid() or os.access(path, os.W_OK)
        except OSError as error:
            os.close(self._cached)
            raise cannot_read(path, error) from error

    def read(self, start: int, nbytes: int, buffer: memoryview) -> memoryview:
        """Bytes `start` to `start + nbytes` of the file, as a part of `buffer`.

        Args:
            buffer: one of `buffers(count, nbytes)`.

        Raises:
            InputError: the file is shorter, or cannot be read.
        """
        first = _floor(start)
        window = buffer[: _floor(start + nbytes + BLOCK - 1) - first]
        wanted = start + nbytes - first
        filled = 0
        while filled < wanted:
            try:
                count = self._read_some(window[filled:], first + filled)
            except OSError as error:
                raise cannot_read(self._path, error) from error
            if count == 0:
                raise InputError(
                    f"{self._path}: expected {start + nbytes} bytes, found the file shorter: it changed meanwhile"
                )
            filled += count
        return window[start - first : wanted]

    def _read_some(self, window: memoryview, offset: int) -> int:
        if self._direct is not None and not (self._asks and _in_page_cache(self._cached, offset, len(window))):
            try:
                return os.preadv(self._direct, [window], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                os.close(self._direct)
                self._direct = None
        return os.preadv(self._cached, [window], offset)

    def __enter__(self) -> "DirectReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in (self._cached, self._direct):
            if handle is not None:
                os.close(handle)


class DirectWriter:
    """A new file that is written in windows from beginning to end. A context manager.

    `window` gives the place in a buffer for the next bytes of the file, and `write` writes them. Any number of windows
    can be handed out ahead; they must be written in the same order. Only the part of a block that is left over at the
    end of a window is copied, into the next window.
    """

    def __init__(self, path: Path) -> None:
        """Make the file, or empty it if there is one. Raises `OSError`."""
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        direct = _open_direct(path, os.O_WRONLY)
        if direct is not None:
            os.close(self._handle)
            self._handle = direct
        self._handed_out = 0
        self._written = 0
        self._rest = b""

    def window(self, nbytes: int, buffer: memoryview) -> memoryview:
        """The part of `buffer` (one of `buffers(count, nbytes)`) that is for the next `nbytes` of the file."""
        start = self._handed_out % BLOCK
        self._handed_out += nbytes
        return buffer[start : start + nbytes]

    def write(self, nbytes: int, buffer: memoryview) -> None:
        """Write the `nbytes` that were put into the window of `buffer`. Raises `OSError`."""
        buffer[: len(self._rest)] = self._rest
        end = len(self._rest) + nbytes
        whole = _floor(end)
        self._write_all(buffer[:whole])
        self._rest = bytes(buffer[whole:end])

    def finish(self) -> None:
        """Write the bytes that are left, cut the file to its size and wait until the disk has it. Raises `OSError`."""
        size = self._written + len(self._rest)
        if self._rest:
            last = next(buffers(1, BLOCK))
            last[: len(self._rest)] = self._rest
            self._write_all(last[:BLOCK])
            os.ftruncate(self._handle, size)
        os.fsync(self._handle)

    def _write_all(self, window: memoryview) -> None:
        while window:
            try:
                count = os.pwrite(self._handle, window, self._written)
            except OSError as error:
                flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~_DIRECT)
                continue
            self._written += count
            window = window[count:]

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._handle)


def sha256_of(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, as hexadecimal text.

    Args:
        path: the file.
        advance: called with the number of bytes that were hashed since the last call.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    ring = buffers(1, _HASHED_AT_ONCE)
    with DirectReader(path) as file:
        for start in range(0, file.size, _HASHED_AT_ONCE):
            part = file.read(start, min(_HASHED_AT_ONCE, file.size - start), next(ring))
            digest.update(part)
            if advance is not None:
                advance(part.nbytes)
    return digest.hexdigest()


def _in_page_cache(handle: int, start: int, nbytes: int) -> bool:
    """Whether a stretch of a file, from the beginning of a page on, is in the page cache as a whole.

    `preadv2` with `RWF_NOWAIT` would not do to find out: what is not in the cache is then read ahead into it.
    """
    nbytes = min(nbytes, os.fstat(handle).st_size - start)
    if _MINCORE is None or nbytes <= 0:
        return False
    try:
        with mmap.mmap(handle, nbytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as pages:
            address = np.frombuffer(pages, np.uint8).ctypes.data
            present = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
            failed = _MINCORE(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_void_p(present.ctypes.data))
    except (OSError, ValueError):  # ValueError: the start is no page's, where pages are larger than `BLOCK`
        return False
    return not failed and bool((present & 1).all())


def _open_direct(path: Path, flags: int) -> int | None:
    if not _DIRECT:
        return None
    try:
        return os.open(path, flags | _DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def _floor(offset: int) -> int:
    return offset // BLOCK * BLOCK
