"""The new config.json and the new index of a converted checkpoint.

* Existing keys keep their order and unknown keys stay; new keys are added at the end.
"""

import copy
import math
from collections.abc import Mapping

from flashnorm.files.header import TensorInfo
from flashnorm.files.reader import CONFIG_FILE, Checkpoint
from flashnorm.files.source_files import open_file
from flashnorm.format import config_keys, to_json
from flashnorm.plan import FoldPlan
from flashnorm.planning.tensors import TensorPlan


def updated_config(checkpoint: Checkpoint, tensors: TensorPlan, plan: FoldPlan) -> bytes:
    """config.json with the keys that say what was done, and `tie_word_embeddings` false if the head was untied."""
    with open_file(checkpoint.folder / CONFIG_FILE) as file:
        ascii_only = file.read().isascii()
    config = copy.deepcopy(checkpoint.config)
    if tensors.unties:
        config["tie_word_embeddings"] = False
        part = config.get("text_config")
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    return to_json(config | config_keys(tensors.norms, plan.centred, plan.cancelled), ascii_only=ascii_only)


def updated_index(checkpoint: Checkpoint, outputs: Mapping[str, list[tuple[str, TensorInfo]]]) -> bytes:
    """The index of the output. `outputs` is shard -> the names of its tensors, each with its source tensor."""
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
