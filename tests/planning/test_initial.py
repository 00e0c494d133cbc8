"""What transformers would make of an absent norm weight is asked of its own code, without touching the model."""

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

import tiny
from flashnorm.planning.initial import wrongly_initialised


class Within(nn.Module):
    """A norm weight in a module that has other weights, too."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(4, 4)


class Model(PreTrainedModel):
    """Initialises whatever it finds, and the gain to another value than one."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.part = Within()

    def _init_weights(self, module: nn.Module) -> None:
        for child in (module, *module.children()):
            for parameter in child.parameters(recurse=False):
                parameter.data.fill_(7.0)


def test_classes_that_initialise_to_the_identity_and_one_that_does_not() -> None:
    for model_type, wrong in (("llama", False), ("gemma", False), ("nemotron", True)):
        model = tiny.model(tiny.config(model_type))
        name, identity = "model.norm.weight", 1.0 if model_type == "llama" else 0.0
        assert wrongly_initialised(model, {name: identity}) == ({name} if wrong else set())


def test_the_model_keeps_its_weights() -> None:
    model = Model(LlamaConfig())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert wrongly_initialised(model, {"part.gain": 1.0}) == {"part.gain"}
    assert not wrongly_initialised(model, {"part.gain": 7.0})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
