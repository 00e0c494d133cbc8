"""Every causal language model type that transformers knows: a tiny model with random weights, and how to run it."""

import inspect

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architectures.configs import LEFT_OUT, VOCABULARY, tiny_config
from flashnorm.trace.build import model_class

LARGEST = 60_000_000  # parameters; more is not tiny, and takes too long


class TooLargeError(ValueError):
    """A model that should be tiny is not."""


def model_types() -> list[str]:
    """All of them, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str) -> PreTrainedModel:
    """A tiny model of a type, see `random_model`. Raises whatever the type's classes raise."""
    if model_type in LEFT_OUT:
        raise ValueError(LEFT_OUT[model_type])
    config = tiny_config(model_type)
    return random_model(model_class(config), config)


def random_model(of_class: type[PreTrainedModel], config: PretrainedConfig, largest: int = LARGEST) -> PreTrainedModel:
    """A model in float64 with random weights; gains are far from one, some of them negative.

    Raises:
        TooLargeError: it is not tiny.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in of_class._from_config(config).parameters())
    if size > largest:
        raise TooLargeError(f"{size} parameters in what should be tiny")
    model = of_class._from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in (model._keys_to_ignore_on_save or ()):  # transformers makes it when it loads a model, always so
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            # Short numbers: their products are exact in float32 as well, which some models insist on for some weights.
            parameter.copy_((0.7 + 0.5 * noise if parameter.dim() == 1 else 0.2 * noise).bfloat16())
        for buffer in model.buffers():
            if buffer.dim() == 0 and buffer.is_floating_point() and buffer.isinf():
                buffer.copy_(buffer.sign())  # a bound that bounds nothing before it is trained
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # as transformers may make it when it loads a model
    return model.double()


def run(model: PreTrainedModel, seed: int = 1) -> Tensor:
    """All outputs for random tokens, flat. Experts run one after the other: the grouped kernels have no float64."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    # A cache is the model's own affair: what RWKV keeps in it is scaled as the folded model wants it.
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=ids, **settings)
    leaves = tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return torch.cat([one.flatten() for one in leaves if isinstance(one, Tensor) and one.is_floating_point()])
