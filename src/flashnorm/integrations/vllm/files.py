"""The files that vLLM loads a model from: which norms may be absent, and whether anything else is absent."""

import contextlib
import logging
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch

from flashnorm.compat import vllm
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.planning.config import load_config
from flashnorm.planning.folded import weightless_norms
from flashnorm.planning.names import StoredNames
from flashnorm.planning.planned import PlannedCheckpoint, plan_checkpoint
from flashnorm.trace.build import meta_model

_log = logging.getLogger("vllm.flashnorm")


def open_files(load_config: Any, model_config: Any) -> Checkpoint | None:
    """The checkpoint's opened files; None if vLLM does not read the weights from its files (dummy weights, say).

    Args:
        load_config, model_config: vLLM's configs.

    Raises:
        InputError: the files cannot be read.
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


def planned(checkpoint: Checkpoint, trust_remote_code: bool) -> PlannedCheckpoint:
    """A checkpoint with the plan for its own config; raises `InputError` if no plan can be made."""
    with _plainly():
        return plan_checkpoint(checkpoint, trust_remote_code=trust_remote_code)


def folded_norms(plan: PlannedCheckpoint) -> list[str]:
    """The norm tensors whose gains are folded, according to `weightless_norms`; empty for an ordinary checkpoint."""
    with _plainly():
        return list(weightless_norms(plan.checkpoint, plan.tensors) or ())


def check_complete(
    checkpoint: Checkpoint, norms: Collection[str], trust_remote_code: bool, names: StoredNames | None = None
) -> None:
    """Refuse files that lack a tensor other than `norms`, because vLLM does not notice an absent linear layer.

    Args:
        checkpoint: the checkpoint's opened files.
        norms: the norm tensors that may be absent.
        trust_remote_code: whether code that comes with the checkpoint may run.
        names: how the checkpoint stores its model; None to find out.

    Raises:
        InputError: another tensor is absent.
    """
    try:
        names = names or _stored_names(checkpoint, trust_remote_code)
    except InputError as error:
        _log.warning("FlashNorm: whether %s is complete could not be checked (%s)", checkpoint.folder, error)
        return
    absent = [name for name in names.absent() if name not in norms]
    if absent:
        raise InputError(
            f"{checkpoint.folder}: expected every weight but those of the folded norms, found {len(absent)} absent: "
            f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}; the checkpoint is damaged: fetch or convert "
            "it again"
        )


def _stored_names(checkpoint: Checkpoint, trust_remote_code: bool) -> StoredNames:
    with _plainly():
        config = load_config(checkpoint.folder, trust_remote_code)
        return StoredNames(meta_model(config, trust_remote_code=trust_remote_code), checkpoint.tensors)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Within the block, new tensors are on the CPU and in float32, whatever vLLM has set.

    The device applies to the calling thread only. The default dtype applies to the whole process, and must be changed
    there, because some operators read it in C++ (see `float64_everywhere`). vLLM also sets it for the process while it
    loads a model, so the block only restores, for a moment, what holds before and after.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
