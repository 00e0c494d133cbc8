"""Reads a model's config.json; it is checked before Transformers reads it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from flashnorm.errors import InputError, brief
from flashnorm.files.reader import CONFIG_FILE, check_has_config, read_json
from flashnorm.files.source_files import check_inside

# Eight times as many layers as the deepest known model has; a model of this depth is planned in a minute.
MAX_LAYERS = 1_000


def load_config(path: Path, trust_remote_code: bool = False, *, source: str | Path | None = None) -> PretrainedConfig:
    """Read a model's config from a folder with `config.json`, or from the file itself.

    Args:
        path: the folder or the file.
        trust_remote_code: whether code in the folder may run.
        source: what the user gave for it, for messages; None if that is the path.

    Raises:
        InputError: there is no readable config, or it names an architecture that Transformers does not know.
    """
    source = path if source is None else source
    file = path / CONFIG_FILE if os.path.isdir(path) else path
    if os.path.isdir(path):
        check_has_config(path, source)
    if not os.path.lexists(file):
        raise InputError(f"{source}: expected a model's folder or repository, found no {CONFIG_FILE} in it")
    _check_file(file)
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # a config can hold anything, and its class can raise anything
        raise InputError(
            f"{file}: expected the config of an architecture that transformers {transformers.__version__} knows, "
            f"found something else: {brief(error)} (a newer transformers may know it; code from the checkpoint "
            "itself is run with --trust-remote-code only)"
        ) from error


def _check_file(path: Path) -> None:
    """Refuse an unsafe or damaged file, as `files.reader` does, before Transformers reads it."""
    check_inside(path.parent, path.name)
    config = read_json(path, "fetch the whole repository")
    if "configuration_files" in config:
        raise InputError(
            f"{path}: expected one config for all releases of transformers, found configuration_files, which names "
            "others; remove that key"
        )
    # Config classes make lists of that length, and the time of a trace grows faster than the number of layers.
    for key, count in _numbers_of_layers(config):
        if count > MAX_LAYERS:
            raise InputError(f"{path}: expected at most {MAX_LAYERS} layers, found {key} = {count}; is it damaged?")


def _numbers_of_layers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers_of_layers(value)
        elif isinstance(value, int) and key.endswith(("layer", "layers")) and "size" not in key:
            yield key, value
