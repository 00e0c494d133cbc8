"""Loads a FlashNorm checkpoint into an ordinary Transformers model.

* The model is built without the folded norms' weights, so nothing is missing, and everything else is required as ever.
* Checkpoints by other tools, which carry no flag, are recognised by exactly the norms that they lack.
"""

import errno
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from flashnorm.acceptance import check_shapes
from flashnorm.checkpoint.names import checkpoint_plan
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.checkpoint.state import weightless_norms
from flashnorm.compat.transformers import ignore_stored
from flashnorm.errors import InputError, brief
from flashnorm.hub import local_folder
from flashnorm.planning import plan_checkpoint
from flashnorm.runtime.adapters import guard_adapters
from flashnorm.runtime.in_memory import mark_config
from flashnorm.runtime.weightless import make_weightless, needs_readable_weights, under_all_names
from flashnorm.trace.models import load_config, meta_model

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.*", "spiece.model", "tekken.json")


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    optimize: bool = True,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a FlashNorm checkpoint: one that `flashnorm convert` wrote, or one of the reference's.

    Args:
        source: a folder or a hub id.
        dtype: of the loaded weights; "auto" is the checkpoint's own.
        device: where the model goes; None leaves it where Transformers puts it.
        optimize: whether to call `flashnorm.optimize` on models that it supports, on the CPU.
        trust_remote_code: whether code that comes with the checkpoint may run.
        kwargs: further arguments of Transformers' `from_pretrained`.

    Returns:
        An ordinary Transformers model in evaluation mode, whose folded norms hold no parameter.

    Raises:
        InputError: it is no FlashNorm checkpoint, or a damaged one.
    """
    folder = local_folder(source)
    checkpoint = Checkpoint.open(folder)
    plan, names = plan_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    # Before Transformers reserves memory for what the config says.
    check_shapes(checkpoint, names)
    norms = weightless_norms(checkpoint, names)
    if norms is None:
        raise InputError(
            f"{folder}: expected a FlashNorm checkpoint, found an ordinary one, with the weights of all its norms; "
            "convert it with `flashnorm convert`, or load it with Transformers and call flashnorm.fold_(model)"
        )
    parameters = {names.parameters[tensor]: identity for tensor, identity in norms.items()}
    blank = meta_model(load_config(folder, trust_remote_code), trust_remote_code=trust_remote_code)
    parameters = under_all_names(blank, parameters)
    readable = needs_readable_weights(blank, parameters, None)
    model = _load(folder, type(blank), parameters, list(norms), readable, dtype=dtype, **kwargs)
    folded = replace(plan, folds=tuple(fold for fold in plan.folds if fold.norm in parameters))
    mark_config(model.config, checkpoint_plan(folded, blank, ()).norms)
    # The name that adapters made from this model will have as their base: a hub id, not its place in the cache.
    model.name_or_path = model.config.name_or_path = str(source)
    guard_adapters(model, list(parameters), [linear.name for fold in folded.folds for linear in fold.linears])
    model = model if device is None else model.to(device)  # type: ignore[arg-type]
    if optimize:
        _optimize(model)
    return model


def _optimize(model: PreTrainedModel) -> None:
    """Let the fused kernels run it where they apply; warn where that is for want of what they need."""
    try:
        from flashnorm.runtime.fused import NO_KERNELS
        from flashnorm.runtime.optimize import optimize_if_supported
    except ImportError as error:  # a name that the kernels' runtime asks of an upstream is gone
        reason = f"the fused kernels do not fit transformers {transformers.__version__} ({error})"
    else:
        reason = NO_KERNELS if optimize_if_supported(model) == NO_KERNELS else None
    if reason is not None:
        warnings.warn(f"the model runs in plain PyTorch: {reason}", stacklevel=3)


def _load(
    folder: Path, base: Any, norms: dict[str, float], tensors: list[str], readable: bool, **kwargs: Any
) -> PreTrainedModel:
    constants: dict[str, float] = {}

    class WithoutNormWeights(base):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            constants.update(make_weightless(self, norms, readable))

    # With --keep-norms the files hold the folded norms' identity values, which have no place to go any more.
    ignore_stored(WithoutNormWeights, tensors)
    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(WithoutNormWeights, attribute, getattr(base, attribute))
    model = load_all(WithoutNormWeights, folder, **kwargs)
    model.__class__ = base
    for name, value in constants.items():
        model.get_buffer(name).fill_(value)
    return model


def load_all(base: Any, folder: Path, **kwargs: Any) -> PreTrainedModel:
    """A class's `from_pretrained` of a folder, with all the weights that the class has.

    Raises:
        InputError: some are absent, or Transformers cannot load them.
        OSError: the disk is full, where weights are offloaded.
    """
    try:
        model, info = base.from_pretrained(folder, output_loading_info=True, **kwargs)
    except Exception as error:  # whatever a config and weights that do not fit each other lead to
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # the caller knows where weights are offloaded to
        raise InputError(
            f"{folder}: expected a checkpoint that Transformers loads, found that it fails: {type(error).__name__}: "
            f"{brief(error)}"
        ) from error
    if absent := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder}: expected every weight but those of folded norms, found {len(absent)} absent: "
            f"{', '.join(absent[:3])}; the checkpoint is damaged: fetch or convert it again"
        )
    return model


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: it has none that transformers can read.
    """
    folder = local_folder(source)
    # Without files, transformers makes an empty tokenizer of the model's type.
    if not any(file.match(pattern) for file in folder.iterdir() for pattern in _TOKENIZER_FILES):
        raise InputError(f"{folder}: expected a tokenizer, found none; copy its files from the source")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise InputError(f"{folder}: expected a tokenizer, found none that can be read ({brief(error)})") from error
