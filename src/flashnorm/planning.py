"""From a model, wherever it is, to its plan; and from a checkpoint to its plan in the names of its tensors."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from flashnorm.checkpoint.names import CheckpointPlan, GainUse, StoredNames, checkpoint_plan
from flashnorm.checkpoint.overflow import too_large
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.checkpoint.shard import axis_gain
from flashnorm.errors import InputError
from flashnorm.fold import PRECISION, exceeds_one, fold_weight, gain_of, is_divisible, largest_weights, overflowed
from flashnorm.plan import FoldPlan, Kept
from flashnorm.trace.models import load_config, meta_model
from flashnorm.trace.planner import names_by_parameter, plan_of, trace
from flashnorm.trace.rules import UNKNOWN_OPERATOR


def plan(
    source: str | Path | PretrainedConfig | nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    untie: bool = False,
    trust_remote_code: bool = False,
) -> FoldPlan:
    """Which norms fold into what, which stay, and why.

    Args:
        source: a folder with `config.json`, a hub id, a config, or a module on any device. No weights are read.
        example_inputs: the positional arguments of the module's forward, for one that takes no token ids.
        untie: plan as if a tied output head were a parameter of its own, so that the final norm can fold into it.
        trust_remote_code: whether code that comes with a checkpoint may run.

    Raises:
        InputError: there is no such model, or its forward cannot be traced.
    """
    if isinstance(source, nn.Module):
        return plan_of(source, example_inputs)
    config = source if isinstance(source, PretrainedConfig) else load_config(source, trust_remote_code)
    if untie:
        check_untied(config, trust_remote_code)
    return plan_of(meta_model(config, untie, trust_remote_code), example_inputs)


def plan_checkpoint(
    checkpoint: Checkpoint, *, untie: bool = False, trust_remote_code: bool = False
) -> tuple[FoldPlan, CheckpointPlan]:
    """The plan of a checkpoint, in the model's names and in those of its tensors.

    The norm before the output head is kept if the checkpoint holds weights that the model's code does not read: what
    reads them (a multi-token-prediction head, say) may read the output head as well, without that norm. So is a norm
    whose bias would have to be divided by zero, see `keep_indivisible`.

    Raises:
        InputError: as `plan`, or the way in which the parameters are stored cannot be seen.
    """
    config = load_config(checkpoint.folder, trust_remote_code)
    if untie:
        check_untied(config, trust_remote_code)
    model = meta_model(config, untie, trust_remote_code)
    plan = plan_of(model)
    stored_names = StoredNames(model, checkpoint.tensors)
    unread = [name for name in stored_names.unread() if len(checkpoint.tensors[name].shape) > 1]
    if unread:
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        heads = {id(part.weight) for part in embeddings if isinstance(part, nn.Module)}
        shared = {name for name, parameter in model.named_parameters() if id(parameter) in heads}
        reason = f"{UNKNOWN_OPERATOR}: {unread[0]}, which the model's code does not read, may go with the output head"
        plan = plan.keep(
            {fold.norm: Kept(reason) for fold in plan.folds if any(linear.name in shared for linear in fold.linears)}
        )

    def stored(parameter: str) -> Tensor | None:
        views = stored_names.views(parameter)
        return next((checkpoint.read_tensor(name) for name in views if name in checkpoint.tensors), None)

    plan = keep_indivisible(plan, stored)
    tied: dict[str, str] = {}
    if untie:
        for name, aliases in names_by_parameter(meta_model(config, False, trust_remote_code)).items():
            tied |= {alias: name for alias in aliases if alias != name}
    return plan, checkpoint_plan(plan, model, checkpoint.tensors, tied)


def check_untied(config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """Whether a model does the same computation with an output head of its own: T5's code scales by what is tied.

    Raises:
        InputError: it does not, or its config does not allow the head to be untied.
    """
    tied, untied = (trace(meta_model(config, untie, trust_remote_code)).operators for untie in (False, True))
    if tied != untied:
        other = next(iter({*(tied - untied), *(untied - tied)}))
        raise InputError(
            f"expected a model that computes the same with its output head untied, found that {config.model_type} does "
            f"not ({other.partition(' ')[0]} differs); leave out --untie"
        )


def keep_indivisible(plan: FoldPlan, value_of: Callable[[str], Tensor | None]) -> FoldPlan:
    """The plan without the folds whose norm bias would stay as `beta / g`, where that cannot be.

    Args:
        plan: the plan, made without values.
        value_of: the values of a parameter of a norm; None if it is absent (then nothing is left to divide).

    Raises:
        InputError: a norm has a dtype that cannot be computed with.
    """
    reasons: dict[str, Kept] = {}
    for fold in plan.folds:
        if fold.bias is None or fold.bias_leaves:
            continue
        weight, bias = value_of(fold.norm), value_of(fold.bias)
        if weight is None or bias is None or not {weight.dtype, bias.dtype} <= PRECISION.keys():
            continue
        possible = is_divisible(bias.flatten(), gain_of(weight.flatten(), fold.offset))
        if not possible.all():
            at = int((~possible).nonzero()[0])
            gain, beta = fold.offset + weight.flatten()[at].item(), bias.flatten()[at].item()
            reasons[fold.norm] = Kept(
                f"its bias has no linear's bias to go to, and cannot be divided by its gain: {beta:g} / {gain:g} in "
                f"channel {at}"
            )
    return plan.keep(reasons)


def gain_uses(plan: FoldPlan) -> dict[tuple[str, int], tuple[GainUse, ...]]:
    """Every linear's parameter, with the axis that takes gains, and the norms' parameters that they come from."""
    uses: dict[tuple[str, int], list[GainUse]] = defaultdict(list)
    for fold in plan.folds:
        for linear in fold.linears:
            uses[linear.name, linear.axis].append(GainUse(fold.norm, fold.offset, linear.segments))
    return {linear: tuple(parts) for linear, parts in uses.items()}


def keep_too_large(plan: FoldPlan, value_of: Callable[[str], Tensor]) -> FoldPlan:
    """The plan without the folds that would make finite weights infinite.

    Args:
        plan: the plan, made without values.
        value_of: the values of a parameter, on the CPU.
    """
    reasons: dict[str, Kept] = {}
    for (name, axis), uses in gain_uses(plan).items():
        weight = value_of(name)
        norms = {use.norm: value_of(use.norm) for use in uses}
        try:
            gain = axis_gain(weight.shape[axis], uses, norms)
        except ValueError:
            continue  # whoever folds it refuses it, and says why
        if exceeds_one(gain).any():
            row = largest_weights(weight, axis)[None]
            reasons = too_large(name, uses, norms, overflowed(row, fold_weight(row, gain, 1), gain, 1)) | reasons
    # Without one of its gains, a weight that takes several can become too large for another.
    return keep_too_large(plan.keep(reasons), value_of) if reasons else plan
