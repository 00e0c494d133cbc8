"""What is asked of Transformers beyond its documented interface, to plan, fold, load and verify.

What is asked of it to generate is in `generation.py`.

Used elsewhere without a function here, as they are attributes of every model and config that say what they are:
`main_input_name`, `config_class`, `get_text_config`, and `tie_word_embeddings`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

# --- from a config to a model


def class_for(auto: Any, config: PretrainedConfig) -> Any | None:
    """The model class that an auto class chooses for a config, without any code that a checkpoint carries; or None."""
    if type(config) not in auto._model_mapping:
        return None
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def has_code_for(auto: Any, config: PretrainedConfig) -> bool:
    """Whether the config names code of the checkpoint's own for an auto class (`auto_map` in config.json)."""
    return auto.__name__ in (getattr(config, "auto_map", None) or {})


def built(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of a class, as an auto class makes it: dtype and attention are what the config asks for."""
    return model_class._from_config(config)


@contextmanager
def plain_operators(model: nn.Module) -> Iterator[None]:
    """Attention and experts made of plain operators meanwhile, in a model of Transformers and in those within it.

    Set in each config, where `set_attn_implementation` would look whether a package or a device is there.
    """
    settings: list[tuple[Any, str, Any]] = []
    for module in model.modules() if isinstance(model, PreTrainedModel) else ():
        if isinstance(module, PreTrainedModel):
            for attribute, value in (("_attn_implementation", "eager"), ("_experts_implementation", "batched_mm")):
                if (old := getattr(module.config, attribute, None)) is not None:
                    settings.append((module.config, attribute, old))
                    setattr(module.config, attribute, value)
    try:
        yield
    finally:
        for config, attribute, old in reversed(settings):
            setattr(config, attribute, old)


def use_experts_for_float64(model: PreTrainedModel) -> None:
    """Let the experts of a float64 model be a loop; the grouped product that is their default has no float64."""
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


# --- between a model and a checkpoint


def as_stored(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` would write for these parameters: stored name -> tensor.

    Made by operators of PyTorch alone, so that a dispatch mode sees where each element goes.
    """
    return revert_weight_conversion(model, state)


def prefix_of_base(model: PreTrainedModel) -> str:
    """What the names of a base model's tensors begin with where it is a part of a model: "model.", say; or nothing."""
    return f"{model.base_model_prefix}." if model.base_model_prefix else ""


def optional_tensors(model: PreTrainedModel) -> tuple[str, ...]:
    """Patterns (`re.search`) of tensors whose absence `from_pretrained` does not report."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def ignore_stored(model_class: Any, tensors: Iterable[str]) -> None:
    """Let `from_pretrained` of a class pass over tensors of the files that the model has no parameter for.

    `_keys_to_ignore_on_load_unexpected` are patterns (`re.search`).
    """
    exactly = ["^" + name.replace(".", r"\.") + "$" for name in tensors]
    model_class._keys_to_ignore_on_load_unexpected = [
        *(model_class._keys_to_ignore_on_load_unexpected or ()),
        *exactly,
    ]


def initialise(model: PreTrainedModel, module: nn.Module) -> None:
    """Give a module's own parameters the values that `from_pretrained` gives those that the files lack."""
    model._init_weights(module)


def forget_ties(model: nn.Module, parameters: Collection[str] | Mapping[str, Any]) -> None:
    """Let a model of Transformers not tie these parameters, which it has no more (`all_tied_weights_keys`)."""
    if isinstance(model, PreTrainedModel):
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {name: source for name, source in ties.items() if name not in parameters}
