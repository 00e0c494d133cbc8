"""How Transformers initialises a norm weight that a checkpoint lacks: perhaps not to its identity value.

A model with absent norm weights is right in plain Transformers only if each is initialised to its identity value. For a
class that stores `w` and multiplies by `1 + w`, that value is zero, but some model classes initialise `w` to one.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flashnorm.compat.transformers import initialise
from flashnorm.trace.build import on_meta


def wrongly_initialised(model: PreTrainedModel, identities: Mapping[str, float]) -> set[str]:
    """The parameters that Transformers would not initialise to their identity value.

    Args:
        model: a model on any device; it is not changed.
        identities: parameter -> its identity value.
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
    """The innermost model that is or contains a module: Transformers lets that model initialise the module."""
    while not isinstance(found := model.get_submodule(name), PreTrainedModel):
        name = name.rpartition(".")[0]
    return found


def _initialises_to(parent: PreTrainedModel, owner: nn.Module, attribute: str, value: float) -> bool:
    # The whole module is copied, since initialising it must not reach the model's own weights.
    memo: dict[int, Any] = {id(tensor): on_meta(tensor) for tensor in (*owner.parameters(), *owner.buffers())}
    shape = owner.get_parameter(attribute).shape
    unset = nn.Parameter(torch.full(shape, torch.nan, device="cpu"), requires_grad=False)
    memo[id(owner.get_parameter(attribute))] = unset
    probe = copy.deepcopy(owner, memo)
    try:
        initialise(parent, probe)
    except Exception:  # the copy lacks what initialising needs: nothing is known
        return False
    return bool((probe.get_parameter(attribute) == value).all())
