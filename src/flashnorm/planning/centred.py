"""Which LayerNorms of a checkpoint become RMSNorms, and which of its tensors are centred for that.

* Everything that writes into the input of such a LayerNorm is centred: the trace of streams names it. A stream is
  centred whole or not at all.
* A weight that is centred takes no gain: both together would be rounded twice. The norm whose gain it would take keeps
  its weight.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.plan import Centred, FoldPlan, Kept, Kind, Writer
from flashnorm.planning.names import StoredNames
from flashnorm.trace.planner import trace
from flashnorm.trace.streams import STREAMS, centrings
from flashnorm.trace.values import along, constant_along, constant_except


def confirmed(model: nn.Module, centred: Centred) -> Centred:
    """What of this the model's code, as it is installed now, still allows.

    A LayerNorm whose input has another writer by now, or another reader, is left out: it must subtract the mean.
    """
    writers = {*centred.writers}
    found = {one.norm for one in centrings(trace(model, None, STREAMS)) if one.removable and {*one.writers} <= writers}
    return replace(centred, norms=tuple(norm for norm in centred.norms if norm in found))


def plan_centred(plan: FoldPlan, names: StoredNames, checkpoint: Checkpoint, unread: str | None) -> FoldPlan:
    """The plan with the LayerNorms that become RMSNorms.

    Args:
        plan: the plan without them.
        names: how the checkpoint stores the model.
        checkpoint: the files.
        unread: a matrix of the checkpoint that the model's code does not read; None if it has none.

    Raises:
        InputError: no LayerNorm becomes an RMSNorm, or other code than the model's may read what is centred.
    """
    if unread is not None:
        raise InputError(
            f"{checkpoint.folder}: expected a model whose code reads all matrices, found {unread}, which it does not: "
            "what reads it may read the mean that is to be subtracted; leave out --center"
        )
    found = centrings(trace(names.model, None, STREAMS))
    removable = [one for one in found if one.removable]
    kept = {one.norm: one.escapes[0] for one in found if not one.removable}
    if not removable:
        reasons = dict.fromkeys(one.reason + (f" (at {one.where})" if one.where else "") for one in kept.values())
        why = "; ".join([*reasons][:3]) if reasons else "no norm subtracts a mean"
        tied = any(one.kind is Kind.TIED for one in kept.values())
        raise InputError(
            f"{checkpoint.folder}: expected LayerNorms that can become RMSNorms, found none: {why}; "
            + ("give the head a weight of its own with --untie, or " if tied else "")
            + "leave out --center"
        )
    writers = dict.fromkeys(writer for one in removable for writer in one.writers)
    centred = Centred(tuple(one.norm for one in removable), tuple(writers), kept)
    named = {writer.name for writer in writers}
    reasons = {
        fold.norm: Kept("the weight that would take its gain is centred", where=takers[0], kind=Kind.SHARED)
        for fold in plan.folds
        if (takers := [one for linear in fold.linears for one in (linear.name, linear.bias) if one in named])
    }
    return replace(plan.keep(reasons), centred=centred)


def centred_tensors(centred: Centred, names: StoredNames) -> dict[str, int]:
    """The tensors that hold what is centred -> the axis over which their mean is subtracted.

    Args:
        centred: what is centred, in the names of the model's parameters.
        names: how the checkpoint stores the model. A head that is untied is not centred with its embedding.

    Raises:
        InputError: a parameter is stored in a way that the mapping does not show, or together with others.
    """
    axes: dict[str, int] = {}
    for writer in centred.writers:
        views = names.views(writer.name)
        for tensor, view in views.items():
            axes[tensor] = _axis_in(names, writer, tensor, view.coordinates[writer.axis])
        if not views:
            raise InputError(f"expected to see how checkpoints store {writer.name}, found that transformers hides it")
    return axes


def _axis_in(names: StoredNames, writer: Writer, tensor: str, index: Tensor) -> int:
    """The axis of a stored tensor that runs over the channels that a parameter writes."""
    dims = [dim for dim in range(index.dim()) if not constant_along(index, dim)]
    size = names.model.get_parameter(writer.name).shape[writer.axis]
    if len(names.parts(tensor)) == 1 and len(dims) == 1 and constant_except(index, dims[0]):
        channels = along(index, dims[0])
        if torch.equal(channels.sort().values, torch.arange(size)):
            return dims[0]
    raise InputError(
        f"expected all channels that {writer.name} writes along one axis of the tensor {tensor}, found a part of them, "
        "or other weights beside them; leave out --center"
    )
