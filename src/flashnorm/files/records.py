"""The record of a file: its SHA-256 and size, as the manifest lists them."""

from collections.abc import Callable
from pathlib import Path

from flashnorm.files.direct_io import sha256_of
from flashnorm.files.source_files import status_of
from flashnorm.format import FileRecord


def file_record(path: Path, advance: Callable[[int], object] | None = None) -> FileRecord:
    """Hash and size of a file; `advance` is that of `sha256_of`. Raises `InputError` if the file cannot be read."""
    return FileRecord(sha256_of(path, advance=advance), status_of(path).st_size)
