"""Folds a model that is in memory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flashnorm.arithmetic import PRECISION, Gain, add_products, axis_shift, divide_bias, fold_weight, gain_of
from flashnorm.errors import InputError
from flashnorm.format import config_keys, folded_base
from flashnorm.models.adapted import Adapted
from flashnorm.models.adapters import guard_adapters
from flashnorm.models.weightless import make_weightless, under_all_names
from flashnorm.planning.keep import keep_asked
from flashnorm.planning.names import StoredNames, tensor_plan
from flashnorm.planning.tensors import TensorPlan, by_parameter
from flashnorm.planning.values import keep_indivisible, keep_too_large
from flashnorm.trace.planner import trace
from flashnorm.trace.solve import solve


def fold_(model: nn.Module, example_inputs: tuple[Any, ...] | None = None, *, keep: Sequence[str] = ()) -> nn.Module:
    """Fold every norm that can be folded, in place.

    A folded norm loses its weight. The linear layers that read the norm take its gain; each product is rounded once, to
    the layer's own dtype. Norms that cannot be folded keep their weight; a tied output head keeps the final norm.

    Adapters of the model (PEFT) are folded together with it, as `convert_adapter` does it.

    Args:
        model: a model with its weights in memory, on any device, in any floating dtype; not quantised. It may have
            adapters, or be a `PeftModel`.
        example_inputs: the positional arguments of the model's forward, for a model that takes no token ids.
        keep: shell patterns for norms that are not to be folded, or "final"; see `flashnorm.planning.keep`.

    Returns:
        The same model.

    Raises:
        InputError: the model cannot be traced, has no norm to fold, or has weights or adapters that cannot be folded
            exactly. The model is then unchanged.
    """
    adapted = Adapted.of(model)
    base, parameters = adapted.base, adapted.parameters

    def value_of(name: str) -> Tensor:
        return _value(parameters, name).cpu()

    tracer = trace(adapted.bare, example_inputs)
    widest = solve(tracer)
    plan = keep_too_large(keep_indivisible(keep_asked(widest, tracer, keep), value_of), value_of)
    if not plan.folds:
        raise InputError(f"expected a model with norms to fold, found none ({plan.summary()}){plan.why_kept()}")
    tensors = by_parameter(plan)
    gains, biases = _folded(parameters, tensors), _biases(parameters, tensors)
    changes = adapted.changes(plan)
    norms = under_all_names(adapted.bare, tensors.norms)
    with torch.no_grad():
        for name, (axis, gain) in gains.items():
            weight = parameters[name]
            weight.copy_(fold_weight(weight.detach().cpu(), gain, axis))
        for name, value in biases.items():
            parameters[name].copy_(value)
    if isinstance(base, PreTrainedModel) and isinstance(adapted.bare, PreTrainedModel):
        mark_config(base.config, tensor_plan(plan, StoredNames(adapted.bare, ())).norms)
        base.name_or_path = folded_base(base.name_or_path or "", plan.folds_hash())
    for change in changes:
        change.apply(getattr(base, "name_or_path", ""))
    make_weightless(base, norms, tracer.records.read_outside)
    guard_adapters(base, plan, norms, widest, adapted.configs)
    return model


def mark_config(config: PretrainedConfig, norms: Iterable[str], *others: Any) -> None:
    """Write into a model's config which norm tensors its checkpoint lacks; `others`: see `config_keys`."""
    for key, value in config_keys(norms, *others).items():
        setattr(config, key, value)


def _folded(parameters: Mapping[str, Tensor], tensors: TensorPlan) -> dict[str, tuple[int, Gain]]:
    """Name of a linear layer's weight -> the axis that takes gains, and the gain of each channel of that axis."""
    gains: dict[str, tuple[int, Gain]] = {}
    for name, fold in tensors.folds.items():
        weight = _value(parameters, name)
        norms = {use.norm: _value(parameters, use.norm).cpu() for use in fold.gains}
        try:
            gains[name] = fold.axis, fold.gain(weight.shape[fold.axis], norms)
        except ValueError as error:
            raise InputError(f"{name} cannot be folded: {error}") from error
    return gains


def _biases(parameters: Mapping[str, Tensor], tensors: TensorPlan) -> dict[str, Tensor]:
    """Every bias that the plan changes -> its new value, on the CPU."""
    changed: dict[str, Tensor] = {}
    for name, use in tensors.divided.items():
        beta = _value(parameters, name).cpu()
        gain = gain_of(_value(parameters, use.norm).cpu().flatten(), use.offset)
        changed[name] = divide_bias(beta.flatten(), gain).view_as(beta)
    for name, fold in tensors.biases.items():
        weight = _value(parameters, fold.weight).cpu().movedim(fold.axis, 1)
        betas = [(_value(parameters, shift.bias).cpu().flatten(), shift.segments) for shift in fold.shifts]
        spread = [axis_shift(weight.shape[1], beta, segments) for beta, segments in betas]
        changed[name] = add_products(_value(parameters, name).cpu(), [weight], spread)
    return changed


def _value(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter's values. Raises `InputError` if it has none (meta device) or a dtype that cannot be folded."""
    tensor = parameters[name].detach()
    if tensor.dtype not in PRECISION or tensor.is_meta:
        found = "no values (it is on the meta device)" if tensor.is_meta else str(tensor.dtype)
        raise InputError(f"expected {name} in memory in a floating dtype, found {found}")
    return tensor
