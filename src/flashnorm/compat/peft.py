"""What is asked of PEFT beyond its documented interface, and of Transformers around it. Needs no PEFT itself."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

config_file = find_adapter_config_file
"""The place of an adapter's `adapter_config.json`, a folder or hub id being given; None if it has none."""


def wrappers(model: nn.Module, path: str) -> Iterator[Any]:
    """PEFT's modules around a module, and around those that it is in."""
    module: Any = model
    for part in path.split("."):
        module = getattr(module, part)
        while hasattr(module, "adapter_layer_names"):
            yield module
            module = module.base_layer if "base_layer" in dict(module.named_children()) else module.original_module


def holds(wrapper: Any, adapter: str) -> bool:
    """Whether one of PEFT's modules has weights of an adapter."""
    return any(adapter in attrgetter(name)(wrapper) for name in wrapper.adapter_layer_names)
