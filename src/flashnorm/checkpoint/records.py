"""What a file was when it was written: SHA-256 and size, as the manifest lists them."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.direct_io import sha256_of
from flashnorm.checkpoint.source_files import status_of
from flashnorm.errors import InputError


@dataclass(frozen=True)
class FileRecord:
    """A file's identity: SHA-256 as hexadecimal text, size in bytes."""

    sha256: str
    size: int

    @staticmethod
    def of(data: bytes) -> "FileRecord":
        """The record of a file that holds these bytes."""
        return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def file_record(path: Path, advance: Callable[[int], object] | None = None) -> FileRecord:
    """Hash and size of a file; `advance` as for `sha256_of`. Raises `InputError` if it cannot be read."""
    return FileRecord(sha256_of(path, advance=advance), status_of(path).st_size)


def listed_records(files: Mapping[str, Any], path: Path) -> dict[str, FileRecord]:
    """The records in a manifest, by file name. Raises `InputError` if there is anything else; `path` is where."""
    records: dict[str, FileRecord] = {}
    for name, entry in files.items():
        match entry:
            case {"sha256": str(sha256), "size": int(size)}:
                records[name] = FileRecord(sha256, size)
            case _:
                raise InputError(f"{path}: expected sha256 and size of {name}, found {str(entry)[:80]}")
    return records
