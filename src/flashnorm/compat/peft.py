"""What FlashNorm relies on in PEFT, and in Transformers' support of it. Only the functions import PEFT."""

import json
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

config_file = find_adapter_config_file
"""The path of an adapter's `adapter_config.json`, given the adapter's folder or hub id; None if it has none."""


def wrappers(model: nn.Module, path: str) -> Iterator[Any]:
    """PEFT's wrappers around a module, and around the modules that contain it."""
    module: Any = model
    for part in path.split("."):
        module = getattr(module, part)
        while _is_wrapper(module):
            yield module
            module = _wrapped(module)


def _is_wrapper(module: nn.Module) -> bool:
    return hasattr(module, "adapter_layer_names")


def _wrapped(wrapper: Any) -> nn.Module:
    return wrapper.base_layer if "base_layer" in dict(wrapper.named_children()) else wrapper.original_module


def holds(wrapper: Any, adapter: str) -> bool:
    """Whether one of PEFT's wrappers has weights of an adapter."""
    return any(adapter in attrgetter(name)(wrapper) for name in wrapper.adapter_layer_names)


def adapters_in(wrapper: Any) -> set[str]:
    """The names of the adapters that one of PEFT's wrappers has weights of."""
    return {adapter for name in wrapper.adapter_layer_names for adapter in attrgetter(name)(wrapper)}


# --- a model with adapters, as a whole


def base_and_configs(model: nn.Module) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model without PEFT's own model around it, and the configs of its adapters; none for an ordinary model."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return model, {}
    return (model.get_base_model() if hasattr(model, "get_base_model") else model), configs  # type: ignore[operator]


def unwrap_(model: nn.Module) -> None:
    """Take PEFT's wrappers out of a model, in place. Their modules, and so the parameters, stay the same objects."""
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(attribute, None)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            while _is_wrapper(child):
                child = _wrapped(child)
            setattr(module, name, child)


def wrappers_of(model: nn.Module) -> list[Any]:
    """All of PEFT's wrappers in a model."""
    return [module for module in model.modules() if _is_wrapper(module)]


def is_merged(wrapper: Any) -> bool:
    """Whether a wrapper's adapters are merged into the weight of the layer that it wraps."""
    return bool(getattr(wrapper, "merged_adapters", ()))


def saved_config(config: Any) -> dict[str, Any]:
    """What PEFT would write into adapter_config.json."""
    return json.loads(json.dumps(config.to_dict(), default=list))


def saved_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What PEFT would save of an adapter, by its names there; most tensors share memory with their parameters."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def lora_layer(model: nn.Module, adapter: str, b: Tensor) -> Any:
    """The wrapper of a linear layer whose LoRA has this parameter as its `B`."""
    layers = (wrapper for wrapper in wrappers_of(model) if adapter in getattr(wrapper, "lora_B", {}))
    return next(layer for layer in layers if layer.lora_B[adapter].weight is b)


def add_lora_bias(layer: Any, adapter: str, bias: Tensor) -> None:
    """Give a LoRA a bias, as if it had been made with `lora_bias`."""
    b = layer.lora_B[adapter]
    b.bias = nn.Parameter(bias.to(b.weight), requires_grad=b.weight.requires_grad)
    layer.lora_bias[adapter] = True
