"""The files that vLLM loads a model from: which norms they can do without, and whether anything else is absent."""

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch

from flashnorm.acceptance import quantizations
from flashnorm.checkpoint.names import CheckpointPlan, StoredNames
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.checkpoint.state import weightless_norms
from flashnorm.compat import vllm
from flashnorm.errors import InputError
from flashnorm.planning import plan_checkpoint
from flashnorm.trace.models import load_config, meta_model

# What formats of quantised linears store next to their weights.
_BESIDE_WEIGHTS = re.compile(r"(bias|scales?|scale_inv|zeros|zero_point|shape|g_idx)$")

_log = logging.getLogger("vllm.flashnorm")


def open_files(load_config: Any, model_config: Any) -> Checkpoint | None:
    """The checkpoint's files, opened; None if vLLM does not read its weights from files (or makes them up).

    Args:
        load_config, model_config: vLLM's.

    Raises:
        InputError: they cannot be read.
    """
    if not vllm.reads_files(load_config):
        return None
    if os.path.isdir(model_config.model):
        return Checkpoint.open(model_config.model)
    from huggingface_hub import snapshot_download

    vllm.download(load_config, model_config)
    folder = snapshot_download(
        model_config.model, revision=model_config.revision, cache_dir=load_config.download_dir, local_files_only=True
    )
    return Checkpoint.open(folder)


def planned(checkpoint: Checkpoint, trust_remote_code: bool) -> CheckpointPlan:
    """The plan of a checkpoint's own config; raises `InputError` if there is none."""
    with _plainly():
        return plan_checkpoint(checkpoint, trust_remote_code=trust_remote_code)[1]


def folded_norms(checkpoint: Checkpoint, names: CheckpointPlan) -> list[str]:
    """The norms whose gains are folded, by `weightless_norms`; none of an ordinary checkpoint."""
    with _plainly():
        return list(weightless_norms(checkpoint, names) or ())


def check_complete(checkpoint: Checkpoint, norms: Collection[str], trust_remote_code: bool) -> None:
    """Raise `InputError` if the files lack a tensor that is none of these; vLLM does not notice an absent linear."""
    with _plainly():
        try:
            config = load_config(checkpoint.folder, trust_remote_code)
            names = StoredNames(meta_model(config, trust_remote_code=trust_remote_code), checkpoint.tensors)
        except InputError as error:
            _log.warning("FlashNorm: whether %s is complete could not be checked (%s)", checkpoint.folder, error)
            return
    stored = _quantized_modules(checkpoint)
    absent = [name for name in names.absent() if name not in norms and name.rpartition(".")[0] not in stored]
    if absent:
        raise InputError(
            f"{checkpoint.folder}: expected every weight but those of the folded norms, found {len(absent)} absent: "
            f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}; the checkpoint is damaged: fetch or convert "
            "it again"
        )


def _quantized_modules(checkpoint: Checkpoint) -> set[str]:
    """The modules whose weights are stored, under whatever name (`q_proj.weight_packed`); none if it is unquantised."""
    if not any(quantizations(checkpoint.config)):
        return set()
    return {name.rpartition(".")[0] for name in checkpoint.tensors if not _BESIDE_WEIGHTS.search(name)}


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Tensors are made on the CPU and in float32 meanwhile, whatever vLLM has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
