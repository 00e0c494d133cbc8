"""From `config.json` to a model on the meta device.

* No weights are read: a model of any size is built in a second or two and needs no memory.
* Code that a checkpoint carries is never run unless the caller says so.
"""

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from flashnorm.checkpoint.reader import CONFIG_FILE, read_json
from flashnorm.checkpoint.source_files import check_inside
from flashnorm.compat.torch import module_registrations
from flashnorm.compat.transformers import built, class_for, has_code_for
from flashnorm.errors import InputError, brief
from flashnorm.hub import check_source

# Where a config that names no architecture of transformers' is looked up, in this order.
_AUTO_CLASSES = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModel,
)

# More than any model has; built in half a minute.
MAX_MODULES = 200_000

# Eight times those of the deepest model known; planned in a minute.
MAX_LAYERS = 1_000

# Where each element of an axis comes from is a number in memory (`trace/values.py`).
MAX_AXIS = 1 << 26

_META = torch.device("meta")


def load_config(source: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's config: a folder with `config.json`, the file itself, or a hub id.

    Raises:
        InputError: there is no readable config, or it names an architecture that transformers does not know.
    """
    check_source(source)
    path = Path(source)
    if os.path.isdir(path) and not os.path.lexists(path / CONFIG_FILE):
        raise InputError(f"{path}: expected a model's folder, found no config.json in it")
    if os.path.exists(path):
        _check_file(path / CONFIG_FILE if os.path.isdir(path) else path)
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config can hold, and whatever its class makes of it
        where = path / CONFIG_FILE if os.path.isdir(path) else source
        raise InputError(
            f"{where}: expected the config of an architecture that transformers {transformers.__version__} knows, "
            f"found something else: {brief(error)} (a newer transformers may know it; code from the checkpoint "
            "itself is run with --trust-remote-code only)"
        ) from error


def _check_file(path: Path) -> None:
    """Refuse what `checkpoint.reader` would refuse as well, before Transformers reads the file."""
    check_inside(path.parent, path.name)
    config = read_json(path, "fetch the whole repository")
    if "configuration_files" in config:
        raise InputError(
            f"{path}: expected one config for all releases of transformers, found configuration_files, which names "
            "others; remove that key"
        )
    # Config classes make a list of that length, and tracing takes longer than in proportion.
    for key, count in _numbers_of_layers(config):
        if count > MAX_LAYERS:
            raise InputError(f"{path}: expected at most {MAX_LAYERS} layers, found {key} = {count}; is it damaged?")


def _numbers_of_layers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers_of_layers(value)
        elif isinstance(value, int) and key.endswith(("layer", "layers")) and "size" not in key:
            yield key, value


def model_class(config: PretrainedConfig) -> Any:
    """The model class that a config names, or the one that transformers' auto classes choose for it.

    Raises:
        InputError: transformers has no model for this config.
    """
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
            return found
    composite = config.get_text_config() is not config
    # Of a config with several parts, the language model alone would be a part.
    for auto in sorted(_AUTO_CLASSES, key=lambda auto: composite and auto is transformers.AutoModelForCausalLM):
        if (found := class_for(auto, config)) is not None:
            return found
    raise InputError(f"expected the config of a model, found {type(config).__name__}, for which transformers has none")


@torch.inference_mode(False)
def meta_model(config: PretrainedConfig, untie: bool = False, trust_remote_code: bool = False) -> PreTrainedModel:
    """The config's model with all parameters on the meta device.

    Args:
        config: any transformers config. It is not changed.
        untie: as if the output head were a parameter of its own (`tie_word_embeddings` false).
        trust_remote_code: whether code in the checkpoint's folder may run.

    Raises:
        InputError: transformers cannot build the model, or it does not let the head be untied.
    """
    config = copy.deepcopy(config)
    if untie:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    try:
        if untie and getattr(type(config).from_dict(config.to_dict()), "tie_word_embeddings", False):
            raise InputError(
                f"expected a model whose output head can be untied, found {config.model_type}, which ties it whatever "
                "its config says; leave out --untie"
            )
        with _META, _limited_size():
            if trust_remote_code and has_code_for(transformers.AutoModelForCausalLM, config):
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
            else:
                model = built(model_class(config), config)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"expected a config that transformers {transformers.__version__} can build, found that "
            f"{config.model_type} fails: {type(error).__name__}: {error}"
        ) from error
    for name, parameter in model.named_parameters():
        if max(parameter.shape, default=0) > MAX_AXIS:
            raise InputError(
                f"expected parameters of at most {MAX_AXIS} along an axis, found {name} of {list(parameter.shape)}; is "
                "config.json damaged?"
            )
    return model.eval()


@contextmanager
def _limited_size() -> Iterator[None]:
    """Stop the building of a model that has more modules than any model has: its config is damaged, or an attack."""
    thread, modules = threading.get_ident(), 0

    def count() -> None:
        nonlocal modules
        modules += threading.get_ident() == thread
        if modules > MAX_MODULES:
            raise InputError(
                f"expected the config of a model of at most {MAX_MODULES} modules, found more; is config.json damaged?"
            )

    with module_registrations(count):
        yield


def on_meta(tensor: Tensor) -> Tensor:
    """A parameter or buffer without its values."""
    blank = tensor.detach().to(_META)
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank
