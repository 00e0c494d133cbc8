"""What transformers makes of a parameter that a checkpoint does not hold: it initialises it, but perhaps not to one.

An absent norm weight is right in plain transformers only if its initial value is the one that multiplies by one. For a
class that stores `w` and multiplies by `1 + w`, that is zero; some model classes initialise it to one all the same.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flashnorm.compat.transformers import initialise
from flashnorm.trace.models import on_meta


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
        parent = _innermost_model(model, owner_name)
        key = (type(parent), type(owner), attribute, identity)
        if key not in known:
            known[key] = _initialises_to(parent, owner, attribute, identity)
        if not known[key]:
            wrong.add(name)
    return wrong


def _innermost_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model that a module is or is in: it is the one that transformers lets initialise the module."""
    while not isinstance(found := model.get_submodule(name), PreTrainedModel):
        name = name.rpartition(".")[0]
    return found


def _initialises_to(parent: PreTrainedModel, owner: nn.Module, attribute: str, value: float) -> bool:
    # A copy of all that is in the module: initialising it must not reach the model's own weights.
    memo: dict[int, Any] = {id(tensor): on_meta(tensor) for tensor in (*owner.parameters(), *owner.buffers())}
    shape = owner.get_parameter(attribute).shape
    unset = nn.Parameter(torch.full(shape, torch.nan, device="cpu"), requires_grad=False)
    memo[id(owner.get_parameter(attribute))] = unset
    probe = copy.deepcopy(owner, memo)
    try:
        initialise(parent, probe)
    except Exception:  # it needs more of the module than this; then nothing is promised
        return False
    return bool((probe.get_parameter(attribute) == value).all())
