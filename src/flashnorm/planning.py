"""From a model, wherever it is, to its plan; and from a checkpoint to its plan in the names of its tensors."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from flashnorm.checkpoint.names import CheckpointPlan, StoredNames, checkpoint_plan
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.plan import FoldPlan, Kept
from flashnorm.trace.models import load_config, meta_model
from flashnorm.trace.planner import names_by_parameter, plan_of
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
    return plan_of(meta_model(config, untie, trust_remote_code), example_inputs)


def plan_checkpoint(
    checkpoint: Checkpoint, *, untie: bool = False, trust_remote_code: bool = False
) -> tuple[FoldPlan, CheckpointPlan]:
    """The plan of a checkpoint, in the model's names and in those of its tensors.

    The norm before the output head is kept if the checkpoint holds weights that the model's code does not read: what
    reads them (a multi-token-prediction head, say) may read the output head as well, without that norm.

    Raises:
        InputError: as `plan`, or the way in which the parameters are stored cannot be seen.
    """
    config = load_config(checkpoint.folder, trust_remote_code)
    model = meta_model(config, untie, trust_remote_code)
    plan = plan_of(model)
    unread = [
        name for name in StoredNames(model, checkpoint.tensors).unread() if len(checkpoint.tensors[name].shape) > 1
    ]
    if unread:
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        heads = {id(part.weight) for part in embeddings if isinstance(part, nn.Module)}
        shared = {name for name, parameter in model.named_parameters() if id(parameter) in heads}
        reason = f"{UNKNOWN_OPERATOR}: {unread[0]}, which the model's code does not read, may go with the output head"
        plan = plan.keep(
            {fold.norm: Kept(reason) for fold in plan.folds if any(linear.name in shared for linear in fold.linears)}
        )
    tied: dict[str, str] = {}
    if untie:
        for name, aliases in names_by_parameter(meta_model(config, False, trust_remote_code)).items():
            tied |= {alias: name for alias in aliases if alias != name}
    return plan, checkpoint_plan(plan, model, checkpoint.tensors, tied)
