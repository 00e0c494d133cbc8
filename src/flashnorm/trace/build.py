"""From a config to a model on the meta device.

* No weights are read: a model of any size is built in a second or two and needs no memory.
* Code that comes with a checkpoint runs only if the caller allows it.
"""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flashnorm.compat.torch import TorchFunctionMode
from flashnorm.compat.transformers import built, class_for, has_code_for
from flashnorm.errors import InputError

# The auto classes that are tried, in this order, for a config that names no architecture of Transformers.
_AUTO_CLASSES = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModel,
)

# The most parameters and buffers of a model: no known model has as many, and they are built in half a minute.
MAX_TENSORS = 200_000

# The longest axis of a parameter: the trace holds an index in memory for each of its elements (`trace/values.py`).
MAX_AXIS = 1 << 26

_META = torch.device("meta")


def model_class(config: PretrainedConfig) -> Any:
    """The model class that a config names, or the one that Transformers' auto classes choose for it.

    Raises:
        InputError: Transformers has no model for this config.
    """
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
            return found
    composite = config.get_text_config() is not config
    # For a config with several parts, the causal LM may be only one of them, so that class is tried last.
    for auto in sorted(_AUTO_CLASSES, key=lambda auto: composite and auto is transformers.AutoModelForCausalLM):
        if (found := class_for(auto, config)) is not None:
            return found
    raise InputError(f"expected the config of a model, found {type(config).__name__}, for which transformers has none")


@torch.inference_mode(False)
def meta_model(config: PretrainedConfig, untie: bool = False, trust_remote_code: bool = False) -> PreTrainedModel:
    """The config's model with all parameters on the meta device; single whole numbers of its code are on the CPU.

    Meanwhile PyTorch's default dtype, which holds for the whole process, is the config's: Transformers sets and
    restores it, as for any model that it builds or loads.

    Args:
        config: any Transformers config. It is not changed.
        untie: build the model as if its output head were a parameter of its own (`tie_word_embeddings` false).
        trust_remote_code: whether code in the checkpoint's folder may run.

    Raises:
        InputError: Transformers cannot build the model, or the model's output head cannot be untied.
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
        with _META, _LimitedSize(), _WithNumbers():
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


class _LimitedSize(TorchFunctionMode):
    """Stops the building of a model with more tensors than any real model: its config is damaged or malicious.

    It counts the tensors that PyTorch functions create without a tensor argument, in the calling thread alone. A hook
    on the registration of modules would act in all threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        of_others = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        self._made += isinstance(result, Tensor) and not of_others
        if self._made > MAX_TENSORS:
            raise InputError(
                f"expected the config of a model of at most {MAX_TENSORS} tensors, found more; is config.json damaged?"
            )
        return result


class _WithNumbers(TorchFunctionMode):
    """Leaves single whole numbers, such as the stride of a convolution, on the CPU: code computes sizes from them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = func is torch.tensor and args and isinstance(args[0], int)
        return func(*args, **({"device": "cpu"} if number else {}) | (kwargs or {}))


def on_meta(tensor: Tensor) -> Tensor:
    """A stand-in for a parameter or buffer on the meta device, without its values."""
    blank = tensor.detach().to(_META)
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank
