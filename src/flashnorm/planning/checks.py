"""Checks whether a checkpoint's tensors fit its plan: whether their shapes are right and their dtypes can be folded."""

from collections.abc import Iterator
from typing import Any

from flashnorm.arithmetic import PRECISION
from flashnorm.errors import InputError
from flashnorm.files.header import TORCH_DTYPES
from flashnorm.files.reader import CONFIG_FILE, Checkpoint
from flashnorm.planning.tensors import TensorPlan


def check_shapes(checkpoint: Checkpoint, tensors: TensorPlan) -> None:
    """Refuse tensors that do not fit the model that the config describes.

    Raises:
        InputError: a tensor has another shape.
    """
    for name, expected in tensors.shapes.items():
        source = tensors.untied.get(name, name)
        info = checkpoint.tensors.get(source)
        if info is not None and info.shape != expected:
            raise InputError(
                f"{checkpoint.folder / info.file}: expected {source} with shape {list(expected)}, as config.json has "
                f"it, found {list(info.shape)}; does config.json belong to these weights?"
            )


def check_dtypes(checkpoint: Checkpoint, tensors: TensorPlan) -> None:
    """Refuse norms, biases and weights of a dtype in which they cannot be folded.

    Raises:
        InputError: a tensor has such a dtype.
    """
    changed = (*tensors.norms, *tensors.divided, *tensors.biases, *tensors.folds, *tensors.centred)
    for name in (tensors.untied.get(name, name) for name in changed):
        if name in checkpoint.tensors:
            _check_dtype(checkpoint, name)


def quantizations(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every quantisation that a config declares, for the whole model or for a part of it (`text_config`)."""
    sections = {"": config, **{f"{name}.": part for name, part in config.items() if isinstance(part, dict)}}
    for prefix, section in sections.items():
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                yield prefix + key, section[key]


def is_plain(dtype: str) -> bool:
    """Whether a dtype, under safetensors' name, is one of the floats that a gain can be folded into."""
    return TORCH_DTYPES.get(dtype) in PRECISION


def refuse_quantised(checkpoint: Checkpoint, why: str) -> None:
    """Raise `InputError` if the config declares a quantisation.

    Args:
        checkpoint: the files.
        why: the end of the message: what is wrong, and what to do.
    """
    for section, quantization in quantizations(checkpoint.config):
        method = "an unknown method"
        if isinstance(quantization, dict):
            method = quantization.get("quant_method") or quantization.get("quantization_status") or method
        raise InputError(
            f"{checkpoint.folder / CONFIG_FILE}: expected unquantised weights, found {section} ({method}){why}"
        )


def _check_dtype(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.tensors[name]
    foldable = [dtype for dtype, known in TORCH_DTYPES.items() if known in PRECISION]
    if info.dtype not in foldable:
        raise InputError(
            f"{checkpoint.folder / info.file}: expected tensor {name} as one of {', '.join(foldable)}, found "
            f"{info.dtype}; it cannot be folded or centred exactly: convert the checkpoint in its original precision"
        )
