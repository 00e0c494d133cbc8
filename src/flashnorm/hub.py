"""Where a model is: a folder on disk, or a repository on the Hugging Face hub, fetched by huggingface_hub."""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from flashnorm.errors import InputError, brief

# Weights in other formats are not fetched.
_IGNORED = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "*.ot", "original/*", "onnx/*"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_source(source: str | Path) -> None:
    """Raise `InputError` if this is neither something on disk nor in the form of a hub id."""
    if not os.path.exists(source) and not (isinstance(source, str) and _HUB_ID.fullmatch(source)):
        raise InputError(f"{source}: expected a model's folder, found nothing there")


def local_folder(source: str | Path) -> Path:
    """The folder of a model: the path itself, or the hub's snapshot of a repository, fetched if it is not cached.

    Raises:
        InputError: there is no such folder, and no such repository that can be reached.
    """
    check_source(source)
    if os.path.exists(source):
        return Path(source)
    try:
        return Path(snapshot_download(str(source), ignore_patterns=_IGNORED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"{source}: expected a folder or a hub id, found neither ({brief(error)})") from error
