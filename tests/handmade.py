"""A small checkpoint made by hand: every kind of fold that a plan can name, without a model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashnorm.arithmetic import Gain, fold_weight
from flashnorm.files.reader import Checkpoint
from flashnorm.format import FileRecord
from flashnorm.plan import Fold, FoldPlan, Kept, Linear
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import GainUse, TensorFold, TensorPlan

CHANNELS = 12


def listed(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files with the manifest that lists them: a folder of these is one that `convert` may have written."""
    records = {name: asdict(FileRecord.of(data)) for name, data in files.items()}
    return {**files, "flashnorm.json": json.dumps({"files": records}).encode()}


# What `--force` may replace.
OLD = listed({"config.json": b"{}", "model.safetensors": b"old"})


@dataclass
class Handmade:
    """A checkpoint on disk and the plan for it."""

    folder: Path
    tensors: dict[str, Tensor]
    plan: FoldPlan
    names: TensorPlan

    def open(self) -> Checkpoint:
        return Checkpoint.open(self.folder)

    def planned(self) -> PlannedCheckpoint:
        return PlannedCheckpoint(self.open(), self.plan, self.names)

    def expected(self, name: str) -> Tensor:
        """A folded weight, computed from whole tensors."""
        weight = self.tensors[self.names.untied.get(name, name)]
        fold = self.names.folds.get(name)
        if fold is None:
            return weight
        gain = torch.ones(weight.shape[fold.axis], dtype=torch.float64)
        for use in fold.gains:
            norm = self.tensors[use.norm].double() + use.offset
            for start, first, length in use.segments or ((0, 0, len(gain)),):
                gain[start : start + length] *= norm[first : first + length]
        # No gain here needs more than float64's 53 bits.
        return fold_weight(weight, Gain(gain, torch.zeros_like(gain)), fold.axis)


def make(folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1, untie: bool = False) -> Handmade:
    """Write the checkpoint. Its plan folds a plain and an offset norm into all layouts of linears, and keeps one."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "embed.weight": random(40, CHANNELS),
        "layer.norm.weight": random(CHANNELS),
        "layer.linear.weight": random(31, CHANNELS),
        "layer.conv1d.weight": random(CHANNELS, 33),
        "layer.experts.weight": random(3, CHANNELS, 5),
        "layer.out.weight": random(CHANNELS, 7),
        "layer.empty": random(0, 4),
        "layer.steps": torch.arange(5),
        "layer.offset_norm.weight": random(CHANNELS // 2),
        "layer.parts.weight": random(9, CHANNELS),
        "layer.kept_norm.weight": random(CHANNELS),
        "norm.weight": random(CHANNELS),
    }
    plain, offset, final = "layer.norm.weight", "layer.offset_norm.weight", "norm.weight"
    folds = {
        "layer.linear.weight": TensorFold(1, (GainUse(plain, 0.0),)),
        "layer.conv1d.weight": TensorFold(0, (GainUse(plain, 0.0),)),
        "layer.experts.weight": TensorFold(1, (GainUse(plain, 0.0),)),
        # Channels 0 and 1 take no gain, 2 to 7 the offset norm's, its halves swapped, 8 to 11 the plain one's first.
        "layer.parts.weight": TensorFold(
            1, (GainUse(plain, 0.0, ((8, 0, 4),)), GainUse(offset, 1.0, ((2, 3, 3), (5, 0, 3))))
        ),
    }
    norms = {plain: 1.0, offset: 0.0}
    untied = {}
    if untie:
        folds["head.weight"] = TensorFold(1, (GainUse(final, 0.0),))
        norms[final] = 1.0
        untied["head.weight"] = "embed.weight"
    names = TensorPlan(folds=folds, norms=norms, untied=untied, unties=untie)
    plan = FoldPlan(
        model_type="handmade",
        folds=tuple(
            Fold(
                norm,
                1.0 - identity,
                tuple(
                    Linear(name, fold.axis)
                    for name, fold in folds.items()
                    if any(use.norm == norm for use in fold.gains)
                ),
            )
            for norm, identity in norms.items()
        ),
        kept={"layer.kept_norm.weight": Kept("its output is a residual", "aten.add", "layer")},
    )
    write(folder, tensors, shards)
    return Handmade(folder, tensors, plan, names)


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write tensors and config as a checkpoint in so many shards."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "handmade", "z": 1e-6, "tie_word_embeddings": True, "text_config": {"a": [1, 2]}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
        save_file(part, folder / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    elements = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_parameters": elements, "total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def content(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
