"""What a conversion changed, in numbers, and what it was made and checked with: the facts at the head of a report."""

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

import flashnorm
from flashnorm.checkpoint.direct_io import sha256_of
from flashnorm.checkpoint.names import CheckpointPlan
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.checkpoint.small_files import MANIFEST_FILE
from flashnorm.errors import InputError
from flashnorm.plan import FoldPlan
from flashnorm.verify.layers import layer_kinds
from flashnorm.verify.manifest import Manifest


@dataclass(frozen=True)
class Size:
    """How many tensors a checkpoint holds, of how many bytes, in how many files; and how many of its folded norms."""

    tensors: int
    nbytes: int
    files: int
    folded_norms: int

    @staticmethod
    def of(checkpoint: Checkpoint, names: CheckpointPlan) -> "Size":
        """The size of a source or a converted checkpoint, `names` saying what folds."""
        return Size(
            tensors=len(checkpoint.tensors),
            nbytes=sum(info.nbytes for info in checkpoint.tensors.values()),
            files=len(checkpoint.headers),
            folded_norms=len(names.norms.keys() & checkpoint.tensors.keys()),
        )


def _versions() -> dict[str, str]:
    return {
        "flashnorm": flashnorm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        plan: what folds into what, freshly made from the source.
        before, after: the two checkpoints.
        written_by: the release of flashnorm that wrote the result, as its manifest says; None if that cannot be read.
        source_id, revision: hub id and commit of the source, as the manifest says.
        manifest_sha256: of the manifest itself, in hexadecimal.
        verified_with: the versions of what checked it.
    """

    plan: FoldPlan
    before: Size
    after: Size
    written_by: str | None = None
    source_id: str | None = None
    revision: str | None = None
    manifest_sha256: str | None = None
    verified_with: dict[str, str] = field(default_factory=_versions)

    @staticmethod
    def of(original: Checkpoint, result: Checkpoint, plan: FoldPlan, names: CheckpointPlan) -> "Conversion":
        """The facts about two checkpoints; a manifest that cannot be read is a finding of the weights' comparison."""
        sizes = Size.of(original, names), Size.of(result, names)
        try:
            manifest = Manifest.read(result.folder)
            digest = sha256_of(result.folder / MANIFEST_FILE)
        except InputError:
            return Conversion(plan, *sizes)
        return Conversion(
            plan, *sizes, manifest.flashnorm_version, manifest.source_id, manifest.revision, manifest_sha256=digest
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "written_by": self.written_by,
            "source_id": self.source_id,
            "revision": self.revision,
            "manifest_sha256": self.manifest_sha256,
            "verified_with": self.verified_with,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "plan": self.plan.to_dict(),
            "layers": [asdict(kind) | {"title": kind.title} for kind in layer_kinds(self.plan)],
        }
