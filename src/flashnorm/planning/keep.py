"""Norms that are kept because someone asks for it: a draft head, say, reads what the norm gives with its gain."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan, Kept, Kind
from flashnorm.trace.tracer import Tracer

# Names the norms before the output head, whatever they are called in a model.
FINAL = "final"

# sentence-transformers lists here what it runs after the model: it starts from the last hidden state.
MODULES_FILE = "modules.json"


def keep_asked(plan: FoldPlan, tracer: Tracer, patterns: Sequence[str], folder: Path | None = None) -> FoldPlan:
    """The plan without the folds of norms that are to be kept.

    Args:
        plan: what `solve` makes of the trace.
        tracer: the trace of the model.
        patterns: shell patterns (`*`, `?`, `[...]`) for norm weights, such as `model.norm.weight`, or for their
            modules, such as `model.norm`; or "final", for the last norm and those that the output head reads.
        folder: where the checkpoint is, if there is one. If it holds modules.json, the final norms are kept.

    Raises:
        InputError: a pattern fits none of the model's norms.
    """
    norms = [fold.norm for fold in plan.folds] + list(plan.kept)
    reasons: dict[str, Kept] = {}
    if folder is not None and (folder / MODULES_FILE).is_file():
        why = f"{MODULES_FILE} names what reads the last hidden state (sentence-transformers)"
        reasons = dict.fromkeys(_final(plan, tracer), Kept(why, kind=Kind.ASKED))
    for pattern in patterns:
        found = _final(plan, tracer) if pattern == FINAL else [norm for norm in norms if _fits(norm, pattern)]
        if not found:
            some = ", ".join(norms[:3]) + (", ..." if len(norms) > 3 else "")
            raise InputError(
                f"expected --keep to fit a norm of the model ({some}), found {pattern!r}, which fits none; `flashnorm "
                "plan` lists them"
            )
        reasons = dict.fromkeys(found, Kept(f"it is to be kept (--keep {pattern})", kind=Kind.ASKED)) | reasons
    return plan.keep({fold.norm: reasons[fold.norm] for fold in plan.folds if fold.norm in reasons})


def _fits(norm: str, pattern: str) -> bool:
    return fnmatchcase(norm, pattern) or fnmatchcase(norm.rpartition(".")[0], pattern)


def head_weight(model: nn.Module) -> Any:
    """The weight of a model's output head, which makes logits of hidden states; None if the model has no such head."""
    return _weight(model, "get_output_embeddings")


def into_head(plan: FoldPlan, model: nn.Module) -> set[str]:
    """The norms that fold into the output head, or into what is tied to it."""
    heads = [_weight(model, "get_input_embeddings"), head_weight(model)]
    shared = {name for name, parameter in model.named_parameters() if any(parameter is head for head in heads)}
    return {fold.norm for fold in plan.folds if any(linear.name in shared for linear in fold.linears)}


def _weight(model: nn.Module, getter: str) -> Any:
    """The weight of the layer that a getter of Transformers' models gives; None if there is none."""
    try:
        return getattr(getattr(model, getter)(), "weight", None)
    except (AttributeError, NotImplementedError):  # a plain module, or a model of images or audio
        return None


def _final(plan: FoldPlan, tracer: Tracer) -> Iterable[str]:
    """The norm that the model uses last, and those that fold into the output head."""
    used = [norm for norm, gain in tracer.records.gains.items() if gain.is_norm]
    return dict.fromkeys([*into_head(plan, tracer.model), *used[-1:]])
