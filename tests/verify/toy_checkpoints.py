"""Small checkpoints by hand, and their conversions by the real converter."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from any_order import AnyOrder
from flashnorm.convert.whole import convert_checkpoint
from flashnorm.files.reader import Checkpoint
from flashnorm.plan import Fold, FoldPlan, Linear
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import GainUse, TensorFold, TensorPlan
from flashnorm.verify.weights import WeightsReport, verify_weights


@dataclass(frozen=True)
class Converted:
    """A source, its conversion, and the plan between them."""

    source: Path
    folder: Path
    plan: FoldPlan
    names: TensorPlan

    def verify(self) -> WeightsReport:
        """The report of one process, which must be that of workers, whatever is wrong."""
        report = verify_weights(self.planned(), Checkpoint.open(self.folder))
        with AnyOrder(seed=0) as executor:
            of_workers = verify_weights(self.planned(), Checkpoint.open(self.folder), executor=executor)
        assert report == replace(of_workers, seconds=report.seconds)
        return report

    def planned(self) -> PlannedCheckpoint:
        return PlannedCheckpoint(Checkpoint.open(self.source), self.plan, self.names)


def make(
    folder: Path,
    shards: dict[str, dict[str, Tensor]],
    folds: dict[str, tuple[float, dict[str, int]]],
    untied: dict[str, str] | None = None,
    keep_norms: bool = False,
) -> Converted:
    """Write tensors as a checkpoint, `folder / "source"`, and convert it to `folder / "converted"`.

    Args:
        folder: an empty one.
        shards: name of file -> tensors.
        folds: norm -> (offset, {linear: axis}).
        untied: new tensor -> the source tensor that it copies.
        keep_norms: convert so.
    """
    source = folder / "source"
    source.mkdir()
    for file, tensors in shards.items():
        save_file(tensors, source / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "hidden_size": 8, "tie_word_embeddings": bool(untied)}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text('{"model": "of words"}')
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\nIt has 2 layers.\n")
    plan = FoldPlan(
        "llama",
        tuple(
            Fold(norm, offset, tuple(Linear(name, axis) for name, axis in linears.items()))
            for norm, (offset, linears) in folds.items()
        ),
    )
    names = TensorPlan(
        folds={
            linear: TensorFold(axis, (GainUse(norm, offset),))
            for norm, (offset, linears) in folds.items()
            for linear, axis in linears.items()
        },
        norms={norm: 1.0 - offset for norm, (offset, _) in folds.items()},
        untied=untied or {},
        unties=bool(untied),
        parameters={norm: norm for norm in folds},
    )
    converted = Converted(source, folder / "converted", plan, names)
    convert_checkpoint(converted.planned(), converted.folder, keep_norms=keep_norms)
    return converted


def two_shards(
    dtype: torch.dtype = torch.bfloat16, gain_dtype: torch.dtype | None = None
) -> dict[str, dict[str, Tensor]]:
    """A toy model in two shards: an embedding, two norms with their linears, an untouched matrix, integers."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    gain_dtype = gain_dtype or dtype
    return {
        "model-00001-of-00002.safetensors": {
            "embed.weight": random(50, 24),
            "layers.0.norm.weight": random(24, dtype=gain_dtype),
            "layers.0.q.weight": random(40, 24),
            "layers.0.kv.weight": random(24, 33),
        },
        "model-00002-of-00002.safetensors": {
            "layers.0.experts": random(3, 24, 5),
            "layers.0.norm2.weight": random(24, dtype=gain_dtype),
            "layers.0.out.weight": random(24, 40),
            "steps": torch.arange(7),
        },
    }


TWO_SHARDS_FOLDS: dict[str, tuple[float, dict[str, int]]] = {
    "layers.0.norm.weight": (0.0, {"layers.0.q.weight": 1, "layers.0.kv.weight": 0}),
    "layers.0.norm2.weight": (1.0, {"layers.0.experts": 1}),
}
