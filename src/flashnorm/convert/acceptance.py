"""What `convert` does not accept. It is refused before anything is written, with a word on what to do instead."""

import os
from pathlib import Path

from flashnorm.errors import InputError
from flashnorm.files.header import TORCH_DTYPES
from flashnorm.files.reader import CONFIG_FILE, Checkpoint
from flashnorm.format import is_marked
from flashnorm.plan import Form, Kind
from flashnorm.planning.checks import check_dtypes, check_shapes, is_plain, quantizations, refuse_quantised
from flashnorm.planning.folded import trained_norms
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import TensorFold, TensorPlan


def check_config(checkpoint: Checkpoint) -> None:
    """Refuse plain weights whose config says that they are quantised. Raises `InputError` if it does."""
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) > 1]
    if all(is_plain(info.dtype) for info in matrices):
        section = next((section for section, _ in quantizations(checkpoint.config)), None)
        refuse_quantised(
            checkpoint,
            f", though every matrix is of plain floats; if they were dequantised, remove {section} from config.json",
        )


def form_of(cancel: str | None) -> Form | None:
    """The form of cancellation of this name. Raises `InputError` if there is none."""
    try:
        return None if cancel is None else Form(cancel)
    except ValueError as error:
        forms = " or ".join(one.value for one in Form)
        raise InputError(f"expected {forms} for --cancel, found {cancel!r}") from error


def check_plan(planned: PlannedCheckpoint) -> None:
    """Refuse a source in which the plan cannot be carried out.

    Raises:
        InputError: the source is converted already and was not trained since, nothing folds (as in a checkpoint that is
            quantised throughout), norms are absent (if all
            are, the source is converted already; if some are, it is damaged), tensors that the plan needs are missing,
            or their shapes or dtypes do not fit.
    """
    checkpoint, plan, tensors = planned.checkpoint, planned.plan, planned.tensors
    if is_marked(checkpoint.config) and not trained_norms(checkpoint, tensors):
        raise InputError(
            f"{checkpoint.folder / CONFIG_FILE}: expected an ordinary checkpoint, found one that is converted already; "
            "use it as it is, or convert the checkpoint that it was made from"
        )
    if not (plan.folds and tensors.norms) and not tensors.centred and not plan.cancelled.norms:
        if any(kept.kind is Kind.QUANTISED for kept in plan.kept.values()):
            refuse_quantised(
                checkpoint,
                "; a gain cannot be folded exactly into quantised weights: convert the unquantised original, then "
                "quantise the result",
            )
        raise InputError(
            f"{checkpoint.folder}: expected norms that can be folded, found none ({plan.summary()})"
            f"{plan.why_kept()}; there is nothing to convert"
        )
    _check_norms_present(checkpoint, tensors)
    check_shapes(checkpoint, tensors)
    check_dtypes(checkpoint, tensors)
    for new, source in tensors.untied.items():
        if source not in checkpoint.tensors:
            raise InputError(
                f"{checkpoint.folder}: expected tensor {source}, of which {new} is to be a copy, found none; "
                "is the checkpoint complete?"
            )
    for name in (tensors.untied.get(name, name) for name in tensors.centred):
        if name not in checkpoint.tensors:
            raise InputError(
                f"{checkpoint.folder}: expected tensor {name} in plain floats, which is to be centred, found none; is "
                "it quantised? Else, is the checkpoint complete, and of the model that its config.json names?"
            )
    for name in (tensors.untied.get(name, name) for name in (*tensors.divided, *tensors.biases)):
        if name not in checkpoint.tensors:
            raise InputError(
                f"{checkpoint.folder}: expected tensor {name}, a bias that the fold changes, found none; is the "
                "checkpoint complete, and of the model that its config.json names?"
            )
    for name, fold in tensors.folds.items():
        _check_fold(checkpoint, tensors, name, fold)


def check_places(source: Path, target: Path) -> None:
    """Raise `InputError` if source and target are the same folder, or one lies in the other."""
    if _lies_in(source, target) or _lies_in(target, source):
        raise InputError(f"{target}: expected a target outside of the source {source}, found it inside (or around) it")


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether `inner`, which need not exist, is `outer` or lies in it, even by another name (link, case, mount)."""
    path = Path(os.path.realpath(inner))
    return os.path.exists(outer) and any(
        os.path.samefile(part, outer) for part in (path, *path.parents) if os.path.exists(part)
    )


def _check_norms_present(checkpoint: Checkpoint, tensors: TensorPlan) -> None:
    absent = [norm for norm in tensors.norms if norm not in checkpoint.tensors]
    if absent and len(absent) == len(tensors.norms):
        raise InputError(
            f"{checkpoint.folder}: expected the weights of {len(absent)} norms, found all of them absent: this "
            "checkpoint is converted already (its config does not say so); use it as it is, or convert the one it was "
            "made from"
        )
    if absent:
        some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise InputError(
            f"{checkpoint.folder}: expected the weights of {len(tensors.norms)} norms, found {len(absent)} absent: "
            f"{some}; the checkpoint is damaged: fetch it again"
        )


def _check_fold(checkpoint: Checkpoint, tensors: TensorPlan, name: str, fold: TensorFold) -> None:
    source = tensors.untied.get(name, name)
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
        # A use without segments covers the whole axis with the whole gain.
        fits = all(a + n <= length and g + n <= size for a, g, n in use.segments) if use.segments else size == length
        if not fits:
            raise InputError(
                f"{path}: expected axis {fold.axis} of {source} to match {use.norm}, found shapes {list(info.shape)} "
                f"and {list(gains.shape)}; does config.json belong to these weights?"
            )
    if len(fold.gains) == 1:
        return
    try:
        fold.gain(length, {use.norm: checkpoint.read_tensor(use.norm) for use in fold.gains})
    except ValueError as error:
        raise InputError(f"{path}: {source} cannot be folded: {error}") from error
