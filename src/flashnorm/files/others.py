"""The files of a checkpoint that a conversion copies unchanged: what belongs to the model, and nothing else.

A folder often holds more: weights in other formats, which would be the source's weights and not the output's, and what
a training run leaves behind (its checkpoints, optimizer states, logs, sometimes keys to services).
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from flashnorm.errors import InputError
from flashnorm.files.reader import CONFIG_FILE, INDEX_FILE, Checkpoint
from flashnorm.files.source_files import cannot_read, check_inside, open_file, status_of
from flashnorm.format import CARD_FILE, MANIFEST_FILE

# Shell patterns, in lower case, for the names of files at the top of the folder.
_TOKENIZER = (
    *("tokenizer*", "*vocab*", "merges*", "*.model", "*.spm", "*.tiktoken", "*.bpe", "bpe.codes", "dict.txt"),
    *("special_tokens_map.json", "added_tokens.json", "tekken.json", "normalizer.json", "emoji.json"),
    *("chat_template*", "*.jinja", "word_shape.json", "word_pronunciation.json"),
)
_SETTINGS = ("*config*.json", "configuration.json", "modules.json", "*label*.json", "*.py")
_PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf")
_WORDS = ("*.md", "*license*", "*licence*", "*notice*", "*policy*", "copying*", "requirements*.txt", ".gitattributes")
_BELONGING = (*_TOKENIZER, *_SETTINGS, *_PICTURES, *_WORDS)

# These do not belong to the output although one of the patterns above may fit.
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "*.index.json")
_OF_TRAINING = ("adapter_*", "train*", "accelerate*", "ds_config*", "deepspeed*", "zero_to_fp32.py")
_NOT_BELONGING = (*_OTHER_WEIGHTS, *_OF_TRAINING)

# Folders that belong to the model as a whole: sentence-transformers' modules, and further chat templates.
_WHOLE_FOLDERS = ("[0-9]_*", "additional_chat_templates")
_MODULES_FILE = "modules.json"

# Of these folders the pictures belong to the model: the model card shows them.
_FOLDERS_OF_PICTURES = ("assets", "figures", "images", "imgs")

TOOL_FOLDERS = (".git", ".cache")


@dataclass(frozen=True)
class OtherFiles:
    """What a checkpoint's folder holds besides the files that a conversion writes anew. Paths are relative to it.

    Attributes:
        belonging: the files that belong to the model, to be copied byte for byte.
        left_out: files that do not, and folders of which nothing belongs to it; a folder's name ends with a slash. The
            folders of git and huggingface_hub are not listed.
    """

    belonging: tuple[str, ...]
    left_out: tuple[str, ...]


def other_files(checkpoint: Checkpoint) -> OtherFiles:
    """Find out which files belong to a checkpoint's model.

    Raises:
        InputError: a link of the model's leads nowhere or out of the folder, a folder of the model is a link, or a
            folder cannot be read.
    """
    folder = checkpoint.folder
    made = {CONFIG_FILE, INDEX_FILE, CARD_FILE, MANIFEST_FILE, *checkpoint.headers}
    belonging: list[str] = []
    left_out: list[str] = []
    modules = tuple(_folders_of_modules(folder))
    for name in _names_in(folder):
        if os.path.isdir(folder / name):
            if name in TOOL_FOLDERS:
                continue
            whole = name in modules or _fits(name, _WHOLE_FOLDERS)
            if not whole and name not in _FOLDERS_OF_PICTURES:
                left_out.append(f"{name}/")
                continue
            inside = [path.relative_to(folder).as_posix() for path in _inside(folder / name)]
            wanted = [path for path in inside if whole or _fits(path.rpartition("/")[2], _PICTURES)]
            belonging += [path for path in wanted if _is_file(folder, path)]
            left_out += [path for path in inside if path not in wanted] if wanted else [f"{name}/"]
        elif name not in made:
            belongs = _fits(name, _BELONGING) and not _fits(name, _NOT_BELONGING) and _is_file(folder, name)
            (belonging if belongs else left_out).append(name)
    # A name that is not UTF-8 would not go into JSON.
    readable = (os.fsencode(name).decode("utf-8", "backslashreplace") for name in left_out)
    return OtherFiles(tuple(sorted(belonging)), tuple(sorted(readable)))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _folders_of_modules(folder: Path) -> Iterator[str]:
    """The folders that sentence-transformers' modules.json names; none if it says nothing of that form."""
    if not (folder / _MODULES_FILE).is_file():
        return
    with open_file(folder / _MODULES_FILE) as file:
        text = file.read()
    try:
        modules = json.loads(text)
    except (ValueError, RecursionError):
        return
    for module in modules if isinstance(modules, list) else []:
        match module:
            case {"path": str(path)}:
                yield path.split("/")[0]


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise cannot_read(folder, error) from error


def _inside(folder: Path) -> Iterator[Path]:
    """The files of a folder of the model, and of its subfolders."""
    if folder.is_symlink():
        raise InputError(f"{folder}: expected a folder, found a link to one; put a copy in its place")
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in folders:
            if (path := Path(root) / name).is_symlink():
                raise InputError(f"{path}: expected a folder, found a link to one; put a copy in its place")
        yield from (Path(root) / name for name in files)


def _is_file(folder: Path, name: str) -> bool:
    """Whether this is a regular file, or a link to one in the folder. Sockets, pipes and devices are left out."""
    path = folder / name
    if path.is_symlink() and not os.path.exists(path):
        raise InputError(f"{path}: expected a file, found a dangling link; fetch it again, or remove it")
    if not stat.S_ISREG(status_of(path).st_mode):
        return False
    check_inside(folder, name)
    return True


def _raise(error: OSError) -> NoReturn:
    raise cannot_read(Path(error.filename), error) from error
