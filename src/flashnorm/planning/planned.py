"""Plans a model; plans a checkpoint as well, in the names of its tensors."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flashnorm.errors import InputError
from flashnorm.files.header import TORCH_DTYPES
from flashnorm.files.reader import INDEX_FILE, Checkpoint
from flashnorm.hub import local_folder
from flashnorm.plan import FoldPlan, Form, Kept
from flashnorm.planning.cancelled import plan_cancelled
from flashnorm.planning.centred import centred_tensors, plan_centred
from flashnorm.planning.checks import quantizations
from flashnorm.planning.config import load_config
from flashnorm.planning.keep import head_weight, into_head, keep_asked
from flashnorm.planning.names import StoredNames, tensor_plan
from flashnorm.planning.quantised import keep_quantised, quantised_tensors
from flashnorm.planning.tensors import TensorPlan
from flashnorm.planning.values import keep_indivisible
from flashnorm.trace.build import meta_model
from flashnorm.trace.planner import trace
from flashnorm.trace.records import unknown
from flashnorm.trace.solve import names_by_parameter, solve
from flashnorm.trace.tracer import Tracer


def plan(
    source: str | Path | PretrainedConfig | nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    revision: str | None = None,
    subfolder: str = "",
    untie: bool = False,
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> FoldPlan:
    """Which norms fold into which linear layers, which norms are kept, and why.

    Args:
        source: a folder with `config.json`, a hub id, a config, or a module on any device. No weights are read.
        example_inputs: the positional arguments of the module's forward, for a module that takes no token ids.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the model's folder, relative to the source's.
        untie: plan as if a tied output head were a parameter of its own, so that the final norm can fold into it.
        keep: patterns for norms that are to be kept, see `keep_asked`.
        trust_remote_code: whether code that comes with a checkpoint may run.

    Raises:
        InputError: there is no such model, its forward cannot be traced, or a pattern fits no norm.
    """
    if isinstance(source, nn.Module):
        tracer = trace(source, example_inputs)
        return keep_asked(solve(tracer), tracer, keep)
    config, folder = config_of(source, revision, subfolder, trust_remote_code)
    tracer = trace(meta_model(config, untie, trust_remote_code), example_inputs)
    if untie:
        tied_model(config, tracer, trust_remote_code, example_inputs)
    return keep_asked(solve(tracer), tracer, keep, folder)


def config_of(
    source: str | Path | PretrainedConfig, revision: str | None, subfolder: str, trust_remote_code: bool
) -> tuple[PretrainedConfig, Path | None]:
    """The config of a model, and the folder that it is in, if it is in one; arguments and errors as for `plan`."""
    if isinstance(source, PretrainedConfig):
        return source, None
    folder = local_folder(source, revision, subfolder, config_only=True)
    return load_config(folder, trust_remote_code, source=source), folder


@dataclass(frozen=True)
class PlannedCheckpoint:
    """A checkpoint and its plan, made once and handed on.

    Attributes:
        checkpoint: the files.
        plan: what folds, in the names of the model's parameters.
        tensors: the same plan in the names of the checkpoint's tensors, and which tensors are untied.
        names: how the checkpoint stores the model, which is on the meta device; None if the plan was made by hand.
        asked: the patterns by which norms were kept, see `keep_asked`.
        read_outside: the parameters that the model's code reads from outside of their module's own forward.
        quantised: the tensors of the model that the checkpoint stores quantised -> how, in words.
    """

    checkpoint: Checkpoint
    plan: FoldPlan
    tensors: TensorPlan
    names: StoredNames | None = None
    asked: tuple[str, ...] = ()
    read_outside: frozenset[str] = frozenset()
    quantised: Mapping[str, str] = field(default_factory=dict)

    @property
    def stored(self) -> StoredNames:
        """`names`, for a checkpoint whose plan was made from its model."""
        assert self.names is not None
        return self.names

    @property
    def model(self) -> PreTrainedModel:
        """The model that was planned, on the meta device. Nobody may change it."""
        return self.stored.model

    def keep(self, reasons: Mapping[str, Kept]) -> "PlannedCheckpoint":
        """The same checkpoint, its plan changed to keep the named norms (parameters) instead of folding them."""
        removed = {name for fold in self.plan.folds if fold.norm in reasons for name in fold.removed}
        tensors = self.tensors.without(self.tensors.tensors_of(removed))
        return replace(self, plan=self.plan.keep(reasons), tensors=tensors)

    def keep_all_but(self, norms: Collection[str], reason: Kept) -> "PlannedCheckpoint":
        """The same checkpoint, its plan changed to fold only these norm tensors."""
        parameters = {self.tensors.parameters.get(name, name) for name in norms}
        return self.keep({fold.norm: reason for fold in self.plan.folds if fold.norm not in parameters})


def plan_checkpoint(
    checkpoint: Checkpoint,
    *,
    untie: bool = False,
    keep: Sequence[str] = (),
    center: bool = False,
    cancel: Form | None = None,
    trust_remote_code: bool = False,
) -> PlannedCheckpoint:
    """Plan a checkpoint by the model that its config names.

    The norm before the output head is kept if the checkpoint holds weights that the model's code does not read: other
    code that reads them (a multi-token-prediction head, say) may use the output head as well, without that norm. A norm
    is also kept if its bias would have to be divided by zero (see `keep_indivisible`), or if someone asks for it (see
    `keep_asked`), or if a linear layer that reads it is stored quantised (see `keep_quantised`). If the checkpoint
    lacks the output head, as embedding models do, the model without it is planned.

    With `center`, LayerNorms become RMSNorms where that is possible (see `plan_centred`). With `cancel`, norms whose
    divisions cancel are not computed (see `plan_cancelled`).

    Raises:
        InputError: as for `plan`, `plan_centred` and `plan_cancelled`, or it cannot be seen how the checkpoint stores
            the parameters.
    """
    config = load_config(checkpoint.folder, trust_remote_code)
    model = meta_model(config, untie, trust_remote_code)
    names = StoredNames(model, checkpoint.tensors)
    ties = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    if not ties and (head := _absent_head(names)) is not None:
        config.architectures = [type(model.base_model).__name__]
        model = meta_model(config, untie, trust_remote_code)
        names = StoredNames(model, checkpoint.tensors)
        remark = f"the checkpoint lacks the output head ({head}), so it is taken for a {type(model).__name__}"
        checkpoint = replace(checkpoint, remarks=(*checkpoint.remarks, remark))
    tracer = trace(model)
    tied: dict[str, str] = {}
    if untie:
        for name, aliases in names_by_parameter(tied_model(config, tracer, trust_remote_code)).items():
            tied |= {alias: name for alias in aliases if alias != name}
    _check_absent(checkpoint, names)
    plan = keep_asked(solve(tracer), tracer, keep, checkpoint.folder)
    unread = _unread_weights(names, checkpoint)
    plan = _keep_before_unread(plan, names, unread)
    quantised = quantised_tensors(checkpoint, names)
    plan = keep_quantised(plan, names, checkpoint, quantised, tied)
    if center:
        plan = plan_centred(plan, names, checkpoint, unread)

    def stored(parameter: str) -> Tensor | None:
        return next((checkpoint.read_tensor(name) for name in names.views(parameter) if names.has(name)), None)

    plan = keep_indivisible(plan, stored)
    if cancel is not None:
        plan = plan_cancelled(plan, names, checkpoint.folder, cancel)
    read_outside = frozenset(tracer.records.read_outside)
    tensors = tensor_plan(plan, names, tied)
    shapes = {name: shape for name, shape in tensors.shapes.items() if name not in quantised}
    tensors = replace(tensors, shapes=shapes, centred=centred_tensors(plan.centred, names))
    return PlannedCheckpoint(checkpoint, plan, tensors, names, tuple(keep), read_outside, quantised)


def _absent_head(names: StoredNames) -> str | None:
    """The tensor of an output head of its own, if the checkpoint lacks it and Transformers has the model without it."""
    model = names.model
    head = head_weight(model)
    of_body = any(parameter is head for parameter in model.base_model.parameters())
    if head is None or of_body or getattr(transformers, type(model.base_model).__name__, None) is None:
        return None
    stored = [tensor for name, one in model.named_parameters() if one is head for tensor in names.views(name)]
    return stored[0] if stored and not any(map(names.holds, stored)) else None


def _check_absent(checkpoint: Checkpoint, names: StoredNames) -> None:
    """Refuse an index that names a tensor of the model that no file holds: a download is incomplete."""
    if absent := sorted(names.shapes().keys() & set(checkpoint.absent)):
        some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise InputError(
            f"{checkpoint.folder / INDEX_FILE}: expected each tensor of the index in a shard, found {len(absent)} in "
            f"none: {some}; fetch index and shards again"
        )


def _unread_weights(names: StoredNames, checkpoint: Checkpoint) -> str | None:
    """The first matrix of the checkpoint that the model's code does not read; None if it reads all."""
    of_weights = {piece for tensor in names.shapes() for piece in names.pieces(tensor)}
    unread = (name for name in names.unread() if name not in of_weights and _may_be_weights(checkpoint, name))
    return next(unread, None)


def _keep_before_unread(plan: FoldPlan, names: StoredNames, unread: str | None) -> FoldPlan:
    """The plan without folds into the output head, if the model's code does not read a matrix of the checkpoint."""
    if unread is None:
        return plan
    why = unknown(f"{unread}, which the model's code does not read, may go with the output head")
    return plan.keep(dict.fromkeys(into_head(plan, names.model), why))


def _may_be_weights(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a stored tensor may be a matrix of weights: no scale, no positions, no causal mask."""
    info = checkpoint.tensors[name]
    dtype = TORCH_DTYPES.get(info.dtype)
    packed = dtype is not None and not dtype.is_floating_point
    # Where weights are quantised, integers may be weights as well.
    if len(info.shape) < 2 or math.prod(info.shape) == 1 or (packed and not any(quantizations(checkpoint.config))):
        return False
    *outer, rows, columns = info.shape
    if dtype is None or packed or rows != columns or math.prod(outer) != 1:
        return True
    values = checkpoint.read_tensor(name).reshape(rows, columns).float()
    return not torch.equal(values, torch.ones_like(values).tril())


def tied_model(
    config: PretrainedConfig, untied: Tracer, trust_remote_code: bool, inputs: tuple[Any, ...] | None = None
) -> PreTrainedModel:
    """The model as its config has it, after a check that it computes the same as with an output head of its own.

    Args:
        config: the model's config.
        untied: the trace of the model with a head of its own.
        trust_remote_code: whether code that comes with a checkpoint may run.
        inputs: the example inputs of that trace.

    Raises:
        InputError: untying changes the computation (T5's code scales the head's input only if the head is tied).
    """
    model = meta_model(config, False, trust_remote_code)
    found, expected = untied.operators, trace(model, inputs).operators
    if found != expected:
        other = next(iter({*(expected - found), *(found - expected)}))
        raise InputError(
            f"expected a model that computes the same with its output head untied, found that {config.model_type} does "
            f"not ({other.partition(' ')[0]} differs); leave out --untie"
        )
    return model
