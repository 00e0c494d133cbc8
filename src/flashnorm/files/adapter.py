"""An adapter (PEFT) in a folder: adapter_config.json and one safetensors file, validated before use."""

import os
from pathlib import Path

from flashnorm.errors import InputError
from flashnorm.files.header import read_header
from flashnorm.files.reader import Checkpoint, FileState, read_json
from flashnorm.files.source_files import check_inside

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def open_adapter(folder: str | Path) -> Checkpoint:
    """Open an adapter. Reads its config and the header of its tensors only.

    Args:
        folder: the adapter's folder.

    Returns:
        The adapter as a checkpoint, whose `config` is adapter_config.json.

    Raises:
        InputError: the folder holds no adapter in safetensors format, or a damaged one.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        raise InputError(
            f"{folder}: expected an adapter's folder, found no {ADAPTER_CONFIG} in it; if the adapter is in a folder "
            "of it, name that one"
        )
    if not os.path.lexists(folder / ADAPTER_WEIGHTS):
        raise InputError(
            f"{folder}: expected {ADAPTER_WEIGHTS}, found none; an adapter in another format is saved again by PEFT: "
            "load it, and save_pretrained() it"
        )
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    for name in names:
        check_inside(folder, name)
    states = {name: FileState.of(folder / name) for name in names}
    config = read_json(folder / ADAPTER_CONFIG)
    header = read_header(folder / ADAPTER_WEIGHTS)
    return Checkpoint(folder, config, {ADAPTER_WEIGHTS: header}, dict(header.tensors), None, states)
