"""Folds a model that is in memory."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from flashnorm.checkpoint.names import GainUse, checkpoint_plan
from flashnorm.checkpoint.shard import axis_gain
from flashnorm.checkpoint.state import CONFIG_VERSION
from flashnorm.errors import InputError
from flashnorm.fold import PRECISION, Gain, fold_weight
from flashnorm.plan import FoldPlan
from flashnorm.runtime.weightless import make_weightless, needs_readable_weights
from flashnorm.trace.planner import plan_of


def fold_(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> nn.Module:
    """Fold every norm that can be folded, in place.

    Folded norms lose their weight; the linears that read them take it, each rounded once to its own dtype. Norms that
    cannot be folded stay as they are; a tied output head keeps the final norm.

    Args:
        model: a model with its weights in memory, on any device, in any floating dtype. Not one with quantised weights.
        example_inputs: the positional arguments of its forward, for a model that takes no token ids.

    Returns:
        The same model.

    Raises:
        InputError: the model cannot be traced, has no norm to fold, or has weights that cannot be folded exactly.
            It is then unchanged.
    """
    plan = plan_of(model, example_inputs)
    if not plan.folds:
        raise InputError(f"expected a model with norms to fold, found none ({plan.summary()})")
    gains = _gains(model, plan)
    norms = {fold.norm: fold.identity for fold in plan.folds}
    readable = needs_readable_weights(model, norms, example_inputs)
    with torch.no_grad():
        for name, (axis, gain) in gains.items():
            weight = model.get_parameter(name)
            weight.copy_(fold_weight(weight.detach().cpu(), gain, axis))
    if isinstance(model, PreTrainedModel):
        mark_config(model.config, checkpoint_plan(plan, model, ()).norms)
    make_weightless(model, norms, readable)
    return model


def mark_config(config: PretrainedConfig, norms: Iterable[str]) -> None:
    """Write into a model's config which norm tensors its checkpoint lacks, so that what it saves says so."""
    config.flash_norm = True
    config.flashnorm = {"version": CONFIG_VERSION, "weightless": sorted(norms)}


def _gains(model: nn.Module, plan: FoldPlan) -> dict[str, tuple[int, Gain]]:
    """Linear's parameter -> the axis that takes gains, and the gain of each of its channels."""
    uses: dict[tuple[str, int], list[GainUse]] = defaultdict(list)
    for fold in plan.folds:
        for linear in fold.linears:
            uses[linear.name, linear.axis].append(GainUse(fold.norm, fold.offset, linear.segments))
    gains: dict[str, tuple[int, Gain]] = {}
    for (name, axis), parts in uses.items():
        weight = model.get_parameter(name)
        norms = {part.norm: model.get_parameter(part.norm).detach() for part in parts}
        for parameter, tensor in ((name, weight), *norms.items()):
            if tensor.dtype not in PRECISION or tensor.is_meta:
                found = "no values (it is on the meta device)" if tensor.is_meta else str(tensor.dtype)
                raise InputError(f"expected {parameter} in memory in a floating dtype, found {found}")
        try:
            on_cpu = {norm: tensor.cpu() for norm, tensor in norms.items()}
            gains[name] = axis, axis_gain(weight.shape[axis], tuple(parts), on_cpu)
        except ValueError as error:
            raise InputError(f"{name} cannot be folded: {error}") from error
    return gains
