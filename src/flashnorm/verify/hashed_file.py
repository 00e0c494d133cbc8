"""A file that is read in parts and hashed as a whole, in one pass."""

import hashlib
from pathlib import Path
from types import TracebackType

from flashnorm.files.direct_io import DirectReader, buffers

# Bytes that are read at once of parts that only the hash needs.
_PART = 8 << 20


class HashedFile:
    """A file that is hashed, in the order of its bytes, while parts of it are read. A context manager.

    It is open from a `read` until it is closed: of a checkpoint with hundreds of files, few may be open at a time.
    """

    def __init__(self, path: Path, *, wanted: bool = True) -> None:
        """`wanted`: whether the hash is; otherwise the file is only read."""
        self._path = path
        self._wanted = wanted
        self._reader: DirectReader | None = None
        self._size = path.stat().st_size
        self._sha256 = hashlib.sha256()
        self._position = 0

    def read(self, start: int, nbytes: int, buffer: memoryview) -> memoryview:
        """`nbytes` from offset `start`, as a part of `buffer` (see `DirectReader.read`)."""
        if self._reader is None:
            self._reader = DirectReader(self._path)
        return self._reader.read(start, nbytes, buffer)

    def close(self) -> None:
        """Close the file until the next `read`. It can still be hashed, also by another thread."""
        if self._reader is not None:
            self._reader.__exit__(None, None, None)
            self._reader = None

    def hash(self, start: int, data: memoryview) -> None:
        """Hash `data`, the file's bytes from offset `start`, after any bytes before it that are not hashed yet."""
        if self._wanted and start >= self._position:  # otherwise these bytes were read, and hashed, before
            self._catch_up(start)
            self._sha256.update(data)
            self._position += data.nbytes

    def digest(self) -> str:
        """The SHA-256 of the whole file, in hexadecimal."""
        self._catch_up(self._size)
        return self._sha256.hexdigest()

    def _catch_up(self, end: int) -> None:
        if self._position >= end:
            return
        limit = min(_PART, end - self._position)
        ring = buffers(1, limit)
        with DirectReader(self._path) as skipped:
            while self._position < end:
                part = skipped.read(self._position, min(limit, end - self._position), next(ring))
                self._sha256.update(part)
                self._position += part.nbytes

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
