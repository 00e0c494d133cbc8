"""`flashnorm.status`: what of a model runs on the fused kernels, and why the rest does not; and what a folder is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.checkpoint.state import weightless_norms
from flashnorm.hub import local_folder
from flashnorm.planning import plan_checkpoint
from flashnorm.runtime.generate import Generate
from flashnorm.runtime.guard import Substitute
from flashnorm.runtime.layers import FusedForward
from flashnorm.runtime.load import load
from flashnorm.runtime.optimize import proven
from flashnorm.runtime.structure import UnsupportedError

_REPLACED = "what flashnorm.optimize had put there was replaced"


@dataclass(frozen=True)
class Status:
    """What of a model runs on the fused kernels.

    Attributes:
        layers: for each decoder layer why its own code runs, or None: it runs on the kernels.
        generate: why `generate` runs Transformers' own loop whatever it is asked for; None: it runs ours, for greedy
            and sampled text.
    """

    layers: tuple[str | None, ...]
    generate: str | None

    @property
    def fused_layers(self) -> int:
        """How many layers run on the kernels."""
        return sum(reason is None for reason in self.layers)

    @property
    def in_words(self) -> str:
        """What runs, in one line: the fused kernels, or the model's own code, and why."""
        reasons = [reason for reason in dict.fromkeys((*self.layers, self.generate)) if reason is not None]
        if self.layers and not reasons:
            return "on the fused kernels"
        if not self.fused_layers:
            return f"in plain PyTorch: {reasons[0]}" if reasons else "in plain PyTorch: it has no decoder layers"
        return f"{self.fused_layers} of {len(self.layers)} layers on the fused kernels: {'; '.join(reasons)}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"layers": list(self.layers), "fused_layers": self.fused_layers, "generate": self.generate}

    def __str__(self) -> str:
        lines = [f"layers: {self.fused_layers} of {len(self.layers)} run on the fused kernels"]
        lines += [f"  {reason}" for reason in dict.fromkeys(self.layers) if reason is not None]
        loop = "the fused loop, for greedy and sampled text" if self.generate is None else "Transformers' own loop"
        lines.append(f"generate: {loop}" + (f": {self.generate}" if self.generate else ""))
        return "\n".join(lines)


def status(model: PreTrainedModel) -> Status:
    """Which parts of a model run on the fused kernels just now, and why the others do not.

    Args:
        model: any; `optimize` or `load` may have been called before.
    """
    layers = getattr(model.base_model, "layers", None)
    layers = list(layers) if isinstance(layers, torch.nn.ModuleList) else []
    substitutes = [vars(layer).get("forward") for layer in layers] + [vars(model).get("generate")]
    if not any(isinstance(one, Substitute) for one in substitutes):
        reason = _why_not_optimized(model)
        return Status((reason,) * len(layers), reason)
    *reasons, loop = (one.problem() if isinstance(one, FusedForward | Generate) else _REPLACED for one in substitutes)
    return Status(tuple(reasons), loop)


def _why_not_optimized(model: PreTrainedModel) -> str:
    if model.training:
        return "it is in training mode"
    try:
        proven(model)
    except UnsupportedError as reason:
        return str(reason)
    return "it was not optimized; flashnorm.optimize(model) does that"


@dataclass(frozen=True)
class FolderStatus:
    """What a checkpoint's folder is, and what of its model runs on the fused kernels as `flashnorm.load` gives it.

    Attributes:
        folder: as it was given.
        model_type: of its config.
        folded: how many of its norms have no weight, or one that does nothing; None for an ordinary checkpoint.
        foldable: how many norms its plan folds.
        runs: of the loaded model; None for an ordinary checkpoint, which is not loaded.
    """

    folder: str
    model_type: str
    folded: int | None
    foldable: int
    runs: Status | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "folder": self.folder,
            "model_type": self.model_type,
            "is_flashnorm": self.folded is not None,
            "folded_norms": self.folded,
            "foldable_norms": self.foldable,
            "runs": self.runs and self.runs.to_dict(),
        }

    def __str__(self) -> str:
        if self.runs is None:
            return (
                f"{self.folder}: an ordinary {self.model_type} checkpoint; {self.foldable} of its norms can be folded: "
                "flashnorm convert does that"
            )
        return f"{self.folder}: a FlashNorm checkpoint of {self.model_type}, {self.folded} norms folded\n{self.runs}"


def folder_status(source: str | Path, *, trust_remote_code: bool = False) -> FolderStatus:
    """What a checkpoint is, and what of it runs on the fused kernels; a FlashNorm checkpoint is loaded for that.

    Args:
        source: a folder or a hub id.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        InputError: it is no checkpoint, or a damaged one.
    """
    checkpoint = Checkpoint.open(local_folder(source))
    plan, names = plan_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    norms = weightless_norms(checkpoint, names)
    runs = None if norms is None else status(load(source, trust_remote_code=trust_remote_code))
    return FolderStatus(str(source), plan.model_type, None if norms is None else len(norms), len(plan.folds), runs)
