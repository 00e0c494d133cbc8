"""What `convert` does not accept. Checked before anything is written; each refusal says what to do instead."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.header import TORCH_DTYPES
from flashnorm.checkpoint.names import CheckpointPlan, TensorFold
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.checkpoint.shard import axis_gain
from flashnorm.checkpoint.state import CONFIG_KEY
from flashnorm.errors import InputError
from flashnorm.fold import PRECISION
from flashnorm.plan import FoldPlan


def check_config(config: dict[str, Any], folder: Path) -> None:
    """Refuse a quantised source and one that is converted already. `config` is config.json, `folder` where it is from.

    Raises:
        InputError: it is one of these.
    """
    path = folder / "config.json"
    if config.get("flash_norm") or CONFIG_KEY in config:
        raise InputError(
            f"{path}: expected an ordinary checkpoint, found one that is converted already; use it as it is, "
            "or convert the checkpoint that it was made from"
        )
    for section, quantization in quantizations(config):
        method = "an unknown method"
        if isinstance(quantization, dict):
            method = quantization.get("quant_method") or quantization.get("quantization_status") or method
        raise InputError(
            f"{path}: expected unquantised weights, found {section} ({method}); a gain cannot be folded exactly into "
            "quantised weights: convert the unquantised original, then quantise the result"
        )


def check_plan(checkpoint: Checkpoint, plan: FoldPlan, names: CheckpointPlan) -> None:
    """Refuse a source in which the plan cannot be carried out.

    Raises:
        InputError: nothing folds, the norms are absent (all: converted already; some: damaged), tensors that
            the plan needs are missing, or their shapes or dtypes do not fit.
    """
    if not plan.folds or not names.norms:
        raise InputError(
            f"{checkpoint.folder}: expected norms that can be folded, found none ({plan.summary()})"
            f"{kept_reasons(plan)}; there is nothing to convert"
        )
    _check_norms_present(checkpoint, names)
    check_shapes(checkpoint, names)
    check_dtypes(checkpoint, names)
    for new, source in names.untied.items():
        if source not in checkpoint.tensors:
            raise InputError(
                f"{checkpoint.folder}: expected tensor {source}, of which {new} is to be a copy, found none; "
                "is the checkpoint complete?"
            )
    for name in (*names.divided, *names.biases):
        if name not in checkpoint.tensors:
            raise InputError(
                f"{checkpoint.folder}: expected tensor {name}, a bias that the fold changes, found none; is the "
                "checkpoint complete, and of the model that its config.json names?"
            )
    for name, fold in names.folds.items():
        _check_fold(checkpoint, names, name, fold)


def check_dtypes(checkpoint: Checkpoint, names: CheckpointPlan) -> None:
    """Refuse norms and weights of a dtype in which they cannot be folded.

    Raises:
        InputError: one is of another dtype.
    """
    changed = (*names.norms, *names.divided, *names.biases, *(names.untied.get(name, name) for name in names.folds))
    for name in changed:
        if name in checkpoint.tensors:
            _check_dtype(checkpoint, name)


def check_shapes(checkpoint: Checkpoint, names: CheckpointPlan) -> None:
    """Refuse tensors that do not fit the model that the config describes.

    Raises:
        InputError: one has another shape.
    """
    for name, expected in names.shapes.items():
        source = names.untied.get(name, name)
        info = checkpoint.tensors.get(source)
        if info is not None and info.shape != expected:
            raise InputError(
                f"{checkpoint.folder / info.file}: expected {source} with shape {list(expected)}, as config.json has "
                f"it, found {list(info.shape)}; does config.json belong to these weights?"
            )


def check_places(source: Path, target: Path) -> None:
    """Raise `InputError` if source and target are the same folder, or one lies in the other."""
    if _lies_in(source, target) or _lies_in(target, source):
        raise InputError(f"{target}: expected a target outside of the source {source}, found it inside (or around) it")


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether `inner`, which need not exist, is `outer` or in it, under whatever name (links, upper case, mounts)."""
    path = Path(os.path.realpath(inner))
    return os.path.exists(outer) and any(
        os.path.samefile(part, outer) for part in (path, *path.parents) if os.path.exists(part)
    )


def quantizations(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every quantisation that a config declares, for the whole model or for a part of it (`text_config`)."""
    sections = {"": config, **{f"{name}.": part for name, part in config.items() if isinstance(part, dict)}}
    for prefix, section in sections.items():
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                yield prefix + key, section[key]


def _check_norms_present(checkpoint: Checkpoint, names: CheckpointPlan) -> None:
    absent = [norm for norm in names.norms if norm not in checkpoint.tensors]
    if len(absent) == len(names.norms):
        raise InputError(
            f"{checkpoint.folder}: expected the weights of {len(absent)} norms, found all of them absent: this "
            "checkpoint is converted already (its config does not say so); use it as it is, or convert the one it was "
            "made from"
        )
    if absent:
        some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise InputError(
            f"{checkpoint.folder}: expected the weights of {len(names.norms)} norms, found {len(absent)} absent: "
            f"{some}; the checkpoint is damaged: fetch it again"
        )


def _check_fold(checkpoint: Checkpoint, names: CheckpointPlan, name: str, fold: TensorFold) -> None:
    source = names.untied.get(name, name)
    if source not in checkpoint.tensors:
        raise InputError(
            f"{checkpoint.folder}: expected tensor {source}, into which a norm folds, found none; "
            "is the checkpoint complete, and of the model that its config.json names?"
        )
    info = checkpoint.tensors[source]
    path = checkpoint.folder / info.file
    if not 0 <= fold.axis < len(info.shape):
        raise InputError(
            f"{path}: expected tensor {source} to have an axis {fold.axis}, found shape {list(info.shape)}"
        )
    length = info.shape[fold.axis]
    for use in fold.gains:
        gains = checkpoint.tensors[use.norm]
        size = gains.nbytes // TORCH_DTYPES[gains.dtype].itemsize
        # A plain use covers the whole axis with the whole gain.
        fits = all(a + n <= length and g + n <= size for a, g, n in use.segments) if use.segments else size == length
        if not fits:
            raise InputError(
                f"{path}: expected axis {fold.axis} of {source} to match {use.norm}, found shapes {list(info.shape)} "
                f"and {list(gains.shape)}; does config.json belong to these weights?"
            )
    if len(fold.gains) == 1:
        return
    try:
        axis_gain(length, fold.gains, {use.norm: checkpoint.read_tensor(use.norm) for use in fold.gains})
    except ValueError as error:
        raise InputError(f"{path}: {source} cannot be folded: {error}") from error


def _check_dtype(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.tensors[name]
    foldable = [dtype for dtype, known in TORCH_DTYPES.items() if known in PRECISION]
    if info.dtype not in foldable:
        raise InputError(
            f"{checkpoint.folder / info.file}: expected tensor {name} as one of {', '.join(foldable)}, found "
            f"{info.dtype}; a gain cannot be folded exactly into it: convert the checkpoint in its original precision"
        )


def kept_reasons(plan: FoldPlan) -> str:
    """For the end of a message: why the norms of a plan stay."""
    reasons = list(dict.fromkeys(kept.reason for kept in plan.kept.values()))
    return f"; why norms stay: {'; '.join(reasons[:5])}" if reasons else ""
