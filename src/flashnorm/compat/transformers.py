"""What FlashNorm relies on in Transformers beyond its documented interface, to plan, fold, load and verify.

`generation.py` has what it relies on to generate. There are no functions here for attributes that every model or config
has and that explain themselves: `main_input_name`, `config_class`, `get_text_config` and `tie_word_embeddings`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import AutoQuantizationConfig

# --- from a config to a model


def class_for(auto: Any, config: PretrainedConfig) -> Any | None:
    """The model class that an auto class chooses for a config, without running a checkpoint's code; None if none."""
    if type(config) not in auto._model_mapping:
        return None
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def has_code_for(auto: Any, config: PretrainedConfig) -> bool:
    """Whether the checkpoint brings its own code for an auto class (`auto_map` in config.json)."""
    return auto.__name__ in (getattr(config, "auto_map", None) or {})


def built(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A new model of a class, built as an auto class does: with the dtype and attention that the config asks for."""
    return model_class._from_config(config)


def dequantising(config: PretrainedConfig) -> Any | None:
    """The `quantization_config` with which `from_pretrained` dequantises a checkpoint's weights as it loads them.

    None if the format of these weights has no such option (`dequantize`), or if a package that reads it is absent.
    """
    try:
        settings = AutoQuantizationConfig.from_dict(dict(config.quantization_config))
    except (AttributeError, ImportError, TypeError, ValueError):
        return None
    if not hasattr(settings, "dequantize"):
        return None
    settings.dequantize = True
    return settings


@contextmanager
def plain_operators(model: nn.Module) -> Iterator[None]:
    """Make attention and experts of plain operators in the block, in a Transformers model and the models within it.

    This is set in each config, because `set_attn_implementation` would require packages or devices. Layers may have
    configs of their own.
    """
    settings: list[tuple[Any, str, Any]] = []
    for module in model.modules() if isinstance(model, PreTrainedModel) else ():
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            for attribute, value in (("_attn_implementation", "eager"), ("_experts_implementation", "batched_mm")):
                if (old := getattr(config, attribute, None)) not in (None, value):
                    settings.append((config, attribute, old))
                    setattr(config, attribute, value)
    try:
        yield
    finally:
        for config, attribute, old in reversed(settings):
            setattr(config, attribute, old)


def use_experts_for_float64(model: PreTrainedModel) -> None:
    """Make the experts of a float64 model a loop, because their default, a grouped product, has no float64."""
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


# --- between a model and a checkpoint


def as_stored(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` would write for these parameters: stored name -> tensor.

    They are made by PyTorch's operators only, so that a dispatch mode can see where each element goes.
    """
    return revert_weight_conversion(model, state)


def prefix_of_base(model: PreTrainedModel) -> str:
    """The prefix of a base model's tensor names in a model that contains it: "model.", say, or nothing."""
    return f"{model.base_model_prefix}." if model.base_model_prefix else ""


def optional_tensors(model: PreTrainedModel) -> tuple[str, ...]:
    """Patterns (`re.search`) of tensors whose absence `from_pretrained` does not report."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def ignore_stored(model_class: Any, tensors: Iterable[str]) -> None:
    """Make `from_pretrained` of a class ignore tensors in the files that the model has no parameter for.

    `_keys_to_ignore_on_load_unexpected` has patterns for `re.search`.
    """
    exactly = ["^" + name.replace(".", r"\.") + "$" for name in tensors]
    model_class._keys_to_ignore_on_load_unexpected = [
        *(model_class._keys_to_ignore_on_load_unexpected or ()),
        *exactly,
    ]


def initialise(model: PreTrainedModel, module: nn.Module) -> None:
    """Give a module's own parameters the values that `from_pretrained` gives to parameters that the files lack."""
    model._init_weights(module)


def keep_from_initialising(module: nn.Module) -> None:
    """Make `from_pretrained` not initialise a module: code that initialises norms expects each to have its weight."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def forget_ties(model: nn.Module, parameters: Collection[str] | Mapping[str, Any]) -> None:
    """Make a Transformers model stop tying these parameters, which are removed (`all_tied_weights_keys`)."""
    if isinstance(model, PreTrainedModel):
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {name: source for name, source in ties.items() if name not in parameters}
