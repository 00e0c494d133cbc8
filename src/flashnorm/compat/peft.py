"""What FlashNorm relies on in PEFT, and in Transformers' support of it. This file does not import PEFT."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

config_file = find_adapter_config_file
"""The path of an adapter's `adapter_config.json`, given the adapter's folder or hub id; None if it has none."""


def wrappers(model: nn.Module, path: str) -> Iterator[Any]:
    """PEFT's wrappers around a module, and around the modules that contain it."""
    module: Any = model
    for part in path.split("."):
        module = getattr(module, part)
        while hasattr(module, "adapter_layer_names"):
            yield module
            module = module.base_layer if "base_layer" in dict(module.named_children()) else module.original_module


def holds(wrapper: Any, adapter: str) -> bool:
    """Whether one of PEFT's wrappers has weights of an adapter."""
    return any(adapter in attrgetter(name)(wrapper) for name in wrapper.adapter_layer_names)
