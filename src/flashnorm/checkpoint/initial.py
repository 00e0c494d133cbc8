"""What transformers makes of a parameter that a checkpoint does not hold: it initialises it, but perhaps not to one.

An absent norm weight is right in plain transformers only if its initial value is the one that multiplies by one. For a
class that stores `w` and multiplies by `1 + w`, that is zero; some model classes initialise it to one all the same.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel


def wrongly_initialised(model: PreTrainedModel, identities: Mapping[str, float]) -> set[str]:
    """The parameters that transformers would not initialise to their identity value.

    Args:
        model: on any device; it is not changed.
        identities: parameter -> the value that it would need.
    """
    wrong: set[str] = set()
    known: dict[tuple[type, type, str, float], bool] = {}
    for name, identity in identities.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        for parent in _pretrained_parents(model, owner_name):
            key = (type(parent), type(owner), attribute, identity)
            if key not in known:
                known[key] = _initialises_to(parent, owner, attribute, identity)
            if not known[key]:
                wrong.add(name)
            break
    return wrong


def _pretrained_parents(model: PreTrainedModel, name: str) -> Iterator[PreTrainedModel]:
    """The models that a module is in, the innermost first: its `_init_weights` is the one that transformers calls."""
    while name:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
        if isinstance(parent, PreTrainedModel):
            yield parent


def _initialises_to(parent: PreTrainedModel, owner: nn.Module, attribute: str, value: float) -> bool:
    probe = copy.copy(owner)
    probe._parameters = {
        name: None if p is None else nn.Parameter(torch.full(p.shape, torch.nan, device="cpu"), requires_grad=False)
        for name, p in owner._parameters.items()
    }
    probe._buffers = {
        name: None if b is None else torch.zeros_like(b, device="cpu") for name, b in owner._buffers.items()
    }
    try:
        parent._init_weights(probe)
    except Exception:  # it needs more of the module than this; then nothing is promised
        return False
    return bool((probe.get_parameter(attribute) == value).all())
