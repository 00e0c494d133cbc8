"""Everything in a checkpoint's folder but the weights: what is copied, and what changes in config, index and card.

* Keys are added or set where they are, in their order; what we do not know stays.
* Other formats of the same weights are not taken along: they would be the source's, not the output's.
"""

import copy
import fnmatch
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from flashnorm.checkpoint.header import TensorInfo
from flashnorm.checkpoint.names import CheckpointPlan
from flashnorm.checkpoint.reader import CONFIG_FILE, INDEX_FILE, Checkpoint
from flashnorm.checkpoint.source_files import cannot_read, check_inside, open_file, status_of
from flashnorm.checkpoint.state import CONFIG_KEY, CONFIG_VERSION
from flashnorm.errors import InputError

CARD_FILE = "README.md"
MANIFEST_FILE = "flashnorm.json"
MANIFEST_VERSION = 1

# At the top of the folder. Below it, weights belong to something else (an adapter, a pooling layer) and are copied.
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "*.index.json")
OTHER_FOLDERS = ("original", "onnx", "openvino", "coreml", "metal", "gguf")
TOOL_FOLDERS = (".git", ".cache")


def copied_files(checkpoint: Checkpoint) -> list[str]:
    """The files to copy byte for byte, as paths relative to the folder.

    Raises:
        InputError: a link that leads nowhere or out of the folder, a folder that is a link, or one that cannot be read.
    """
    return sorted(_copied_files(checkpoint))


def _copied_files(checkpoint: Checkpoint) -> Iterator[str]:
    changed = {CONFIG_FILE, INDEX_FILE, CARD_FILE, MANIFEST_FILE, *checkpoint.headers}
    for folder, folders, files in os.walk(checkpoint.folder, onerror=_raise):
        top = Path(folder) == checkpoint.folder
        if top:
            folders[:] = [name for name in folders if name not in (*OTHER_FOLDERS, *TOOL_FOLDERS)]
            files = [name for name in files if name not in changed and not _matches(name, OTHER_WEIGHTS)]
        for name in folders:
            if (path := Path(folder) / name).is_symlink():
                raise InputError(f"{path}: expected a folder, found a link to one; put a copy in its place")
        for name in files:
            path = Path(folder) / name
            if path.is_symlink() and not os.path.exists(path):
                raise InputError(f"{path}: expected a file, found a dangling link; fetch it again, or remove it")
            # No sockets, pipes or devices.
            if stat.S_ISREG(status_of(path).st_mode):
                relative = path.relative_to(checkpoint.folder).as_posix()
                check_inside(checkpoint.folder, relative)
                yield relative


def _raise(error: OSError) -> NoReturn:
    raise cannot_read(Path(error.filename), error) from error


def updated_config(checkpoint: Checkpoint, names: CheckpointPlan) -> bytes:
    """config.json with the keys that say what was done; and with the head untied, if it was."""
    with open_file(checkpoint.folder / CONFIG_FILE) as file:
        ascii_only = file.read().isascii()
    config = copy.deepcopy(checkpoint.config)
    if names.untied:
        config["tie_word_embeddings"] = False
        part = config.get("text_config")
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    config["flash_norm"] = True
    config[CONFIG_KEY] = {"version": CONFIG_VERSION, "weightless": sorted(names.norms)}
    return to_json(config, ascii_only=ascii_only)


def updated_index(checkpoint: Checkpoint, outputs: Mapping[str, list[tuple[str, TensorInfo]]]) -> bytes:
    """The index of the output; `outputs` is shard -> names of its tensors, each with its source tensor."""
    index = checkpoint.index or {}
    tensors = {name: info for shard in outputs.values() for name, info in shard}
    files = {name: file for file, shard in outputs.items() for name, _ in shard}
    known = [name for name in index["weight_map"] if name in files]
    order = dict.fromkeys([*known, *files])
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = sum(info.nbytes for info in tensors.values())
    if isinstance(metadata.get("total_parameters"), int):
        elements = sum(math.prod(info.shape) for info in tensors.values())
        metadata["total_parameters"] += elements - sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    return to_json({**index, "metadata": metadata, "weight_map": {name: files[name] for name in order}})


def hub_identity(folder: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of a snapshot in the hub's cache, as its path tells them; None and None for other folders."""
    found = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$", Path(os.path.abspath(folder)).as_posix())
    return (found[1].replace("--", "/", 1), found[2]) if found else (None, None)


def to_json(data: Any, *, ascii_only: bool = True) -> bytes:
    """JSON as Transformers formats it: indented by two, with a newline at the end."""
    return (json.dumps(data, indent=2, ensure_ascii=ascii_only) + "\n").encode()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
