"""`flashnorm.status`: which parts of a model run on the fused kernels, and why the others do not; what a folder is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flashnorm.cpu.layers import FusedForward
from flashnorm.decoding.generate import Generate
from flashnorm.decoding.guard import Substitute
from flashnorm.files.reader import Checkpoint
from flashnorm.hub import local_folder
from flashnorm.models.cancelled import CancelledNorm
from flashnorm.models.centred import CentredNorm
from flashnorm.models.load import Loading, use_kernels, warn_of_plain
from flashnorm.models.optimize import on_gpu, problem
from flashnorm.planning.folded import trained_norms, weightless_norms
from flashnorm.planning.planned import plan_checkpoint

_LAYERS_ON_GPU = "on a GPU, layers run the model's own code, and generate runs all of them on the fused kernels"
_REPLACED = "what flashnorm.optimize had put there was replaced"


@dataclass(frozen=True)
class Status:
    """Which parts of a model run on the fused kernels.

    Attributes:
        layers: for each decoder layer, the reason why its own code runs; None if the layer runs on the kernels.
        generate: the reason why `generate` always runs Transformers' own loop; None if it runs FlashNorm's loop for
            greedy and sampled text.
    """

    layers: tuple[str | None, ...]
    generate: str | None

    @property
    def fused_layers(self) -> int:
        """How many layers run on the kernels."""
        return sum(reason is None for reason in self.layers)

    @property
    def in_words(self) -> str:
        """One line that says what runs: the fused kernels, or the model's own code and why."""
        reasons = [reason for reason in dict.fromkeys((*self.layers, self.generate)) if reason is not None]
        if self.layers and not reasons:
            return "on the fused kernels"
        if not self.fused_layers and self.generate is None:
            return f"generate on the fused kernels: {reasons[0]}" if reasons else "generate on the fused kernels"
        if not self.fused_layers:
            return f"in plain PyTorch: {reasons[0]}" if reasons else "in plain PyTorch: it has no decoder layers"
        return f"{self.fused_layers} of {len(self.layers)} layers on the fused kernels: {'; '.join(reasons)}"

    def to_dict(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        return {"layers": list(self.layers), "fused_layers": self.fused_layers, "generate": self.generate}

    def __str__(self) -> str:
        lines = [f"layers: {self.fused_layers} of {len(self.layers)} run on the fused kernels"]
        lines += [f"  {reason}" for reason in dict.fromkeys(self.layers) if reason is not None]
        loop = "the fused loop, for greedy and sampled text" if self.generate is None else "Transformers' own loop"
        lines.append(f"generate: {loop}" + (f": {self.generate}" if self.generate else ""))
        return "\n".join(lines)


def status(model: PreTrainedModel) -> Status:
    """Say which parts of a model run on the fused kernels at the moment, and why the others do not.

    Args:
        model: any model, whether or not `optimize` or `load` prepared it.
    """
    layers = getattr(model.base_model, "layers", None)
    layers = list(layers) if isinstance(layers, torch.nn.ModuleList) else []
    substitutes = [vars(layer).get("forward") for layer in layers] + [vars(model).get("generate")]
    if not any(isinstance(one, Substitute) for one in substitutes):
        reason = _why_not_optimized(model)
        return Status((reason,) * len(layers), reason)
    if on_gpu(model) and isinstance(loop := substitutes[-1], Generate):
        return Status((_LAYERS_ON_GPU,) * len(layers), loop.problem())
    *reasons, loop = (one.problem() if isinstance(one, FusedForward | Generate) else _REPLACED for one in substitutes)
    return Status(tuple(reasons), loop)


def _why_not_optimized(model: PreTrainedModel) -> str:
    if model.training:
        return "it is in training mode"
    if (reason := problem(model)) is not None:
        return str(reason)
    return "it was not optimized; flashnorm.optimize(model) does that"


@dataclass(frozen=True)
class FolderStatus:
    """What a checkpoint is, and which parts of its model, as `flashnorm.load` gives it, run on the fused kernels.

    Attributes:
        folder: the folder or hub id, as it was given.
        model_type: the `model_type` of the checkpoint's config.
        folded: how many norms have no weight, or a weight at its identity value; None for an ordinary checkpoint.
        trained: how many norms that were folded have weights again, because the model was trained since.
        foldable: how many norms the checkpoint's plan folds.
        centred: how many LayerNorms are RMSNorms in the loaded model.
        cancelled: how many norms the loaded model does not compute.
        runs: the status of the loaded model; None for an ordinary checkpoint, which is not loaded.
    """

    folder: str
    model_type: str
    folded: int | None
    trained: int
    foldable: int
    runs: Status | None
    centred: int = 0
    cancelled: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        return {
            "folder": self.folder,
            "model_type": self.model_type,
            "is_flashnorm": self.folded is not None,
            "folded_norms": self.folded,
            "trained_norms": self.trained,
            "foldable_norms": self.foldable,
            "centred_norms": self.centred,
            "cancelled_norms": self.cancelled,
            "runs": self.runs and self.runs.to_dict(),
        }

    def __str__(self) -> str:
        if self.trained:
            return (
                f"{self.folder}: a FlashNorm checkpoint of {self.model_type} that was trained since: {self.trained} of "
                "its folded norms have weights again; `flashnorm convert` folds them"
            )
        if self.runs is None:
            return (
                f"{self.folder}: an ordinary {self.model_type} checkpoint; {self.foldable} of its norms can be folded: "
                "flashnorm convert does that"
            )
        centred = f", {self.centred} LayerNorms are RMSNorms" if self.centred else ""
        centred += f", {self.cancelled} are not computed" if self.cancelled else ""
        head = f"{self.folder}: a FlashNorm checkpoint of {self.model_type}, {self.folded} norms folded{centred}"
        return f"{head}\n{self.runs}"


def folder_status(
    source: str | Path, *, revision: str | None = None, subfolder: str = "", trust_remote_code: bool = False
) -> FolderStatus:
    """Say what a checkpoint is. A FlashNorm checkpoint is loaded, to see what runs on the fused kernels.

    Args:
        source: a folder or a hub id.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the model's folder, relative to the source's.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        InputError: `source` is no checkpoint, or a damaged one.
    """
    checkpoint = Checkpoint.open(local_folder(source, revision, subfolder))
    planned = plan_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    trained = trained_norms(checkpoint, planned.tensors)
    plan, norms, runs = planned.plan, None if trained else weightless_norms(checkpoint, planned.tensors), None
    centred = cancelled = 0
    if norms is not None:
        model = Loading.of(planned).load(dtype="auto")
        warn_of_plain(use_kernels(model))
        runs = status(model)
        centred = sum(isinstance(module, CentredNorm) for module in model.modules())
        cancelled = sum(isinstance(module, CancelledNorm) for module in model.modules())
    folded = None if norms is None else len(norms)
    return FolderStatus(str(source), plan.model_type, folded, len(trained), len(plan.folds), runs, centred, cancelled)
