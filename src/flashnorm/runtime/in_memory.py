"""Folds a model that is in memory."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flashnorm.acceptance import kept_reasons
from flashnorm.checkpoint.biases import add_products, axis_shift
from flashnorm.checkpoint.names import ShiftUse, checkpoint_plan
from flashnorm.checkpoint.shard import axis_gain
from flashnorm.checkpoint.state import CONFIG_VERSION
from flashnorm.errors import InputError
from flashnorm.fold import PRECISION, Gain, divide_bias, fold_weight, gain_of
from flashnorm.plan import FoldPlan
from flashnorm.planning import gain_uses, keep_indivisible, keep_too_large
from flashnorm.runtime.adapters import FOLDED, guard_adapters
from flashnorm.runtime.weightless import make_weightless, needs_readable_weights, under_all_names
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

    def value_of(name: str) -> Tensor:
        return _value(model, name).cpu()

    plan = keep_too_large(keep_indivisible(plan_of(model, example_inputs), value_of), value_of)
    if not plan.folds:
        raise InputError(f"expected a model with norms to fold, found none ({plan.summary()}){kept_reasons(plan)}")
    gains = _gains(model, plan)
    biases = _biases(model, plan)
    norms = {name: identity for fold in plan.folds for name, identity in fold.leaving.items()}
    norms = under_all_names(model, norms)
    readable = needs_readable_weights(model, norms, example_inputs)
    with torch.no_grad():
        for name, (axis, gain) in gains.items():
            weight = model.get_parameter(name)
            weight.copy_(fold_weight(weight.detach().cpu(), gain, axis))
        for name, value in biases.items():
            model.get_parameter(name).copy_(value)
    if isinstance(model, PreTrainedModel):
        mark_config(model.config, checkpoint_plan(plan, model, ()).norms)
        model.name_or_path = (model.name_or_path or "") + FOLDED
    make_weightless(model, norms, readable)
    guard_adapters(model, list(norms), [linear.name for fold in plan.folds for linear in fold.linears])
    return model


def mark_config(config: PretrainedConfig, norms: Iterable[str]) -> None:
    """Write into a model's config which norm tensors its checkpoint lacks, so that what it saves says so."""
    config.flash_norm = True
    config.flashnorm = {"version": CONFIG_VERSION, "weightless": sorted(norms)}


def _gains(model: nn.Module, plan: FoldPlan) -> dict[str, tuple[int, Gain]]:
    """Linear's parameter -> the axis that takes gains, and the gain of each of its channels."""
    gains: dict[str, tuple[int, Gain]] = {}
    for (name, axis), parts in gain_uses(plan).items():
        weight = _value(model, name)
        norms = {part.norm: _value(model, part.norm).cpu() for part in parts}
        try:
            gains[name] = axis, axis_gain(weight.shape[axis], parts, norms)
        except ValueError as error:
            raise InputError(f"{name} cannot be folded: {error}") from error
    return gains


def _biases(model: nn.Module, plan: FoldPlan) -> dict[str, Tensor]:
    """Every bias that the plan changes -> its new value, on the CPU."""
    changed: dict[str, Tensor] = {}
    for fold in plan.folds:
        if fold.bias is None:
            continue
        beta = _value(model, fold.bias).cpu()
        if fold.bias_stays:
            gain = gain_of(_value(model, fold.norm).cpu().flatten(), fold.offset)
            changed[fold.bias] = divide_bias(beta.flatten(), gain).view_as(beta)
    takers: dict[tuple[str, str, int], list[ShiftUse]] = defaultdict(list)
    for fold in plan.folds:
        if fold.bias_leaves and fold.bias is not None:
            for linear in fold.linears:
                takers[linear.bias or "", linear.name, linear.axis].append(ShiftUse(fold.bias, linear.segments))
    for (name, linear, axis), shifts in takers.items():
        weight = _value(model, linear).cpu().movedim(axis, 1)
        betas = [axis_shift(weight.shape[1], shift, _value(model, shift.bias).cpu().flatten()) for shift in shifts]
        changed[name] = add_products(_value(model, name).cpu(), [weight], betas)
    return changed


def _value(model: nn.Module, name: str) -> Tensor:
    """A parameter's values. Raises `InputError` if there are none, or none to compute with."""
    tensor = model.get_parameter(name).detach()
    if tensor.dtype not in PRECISION or tensor.is_meta:
        found = "no values (it is on the meta device)" if tensor.is_meta else str(tensor.dtype)
        raise InputError(f"expected {name} in memory in a floating dtype, found {found}")
    return tensor
