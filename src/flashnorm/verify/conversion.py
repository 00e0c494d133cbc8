"""What a conversion changed, in numbers, and the versions that made and checked it: the first facts of a report."""

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

from flashnorm.errors import InputError
from flashnorm.files.direct_io import sha256_of
from flashnorm.files.reader import Checkpoint
from flashnorm.format import MANIFEST_FILE
from flashnorm.plan import FoldPlan
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import TensorPlan
from flashnorm.verify.layers import layer_kinds
from flashnorm.verify.manifest import read_manifest
from flashnorm.version import __version__


@dataclass(frozen=True)
class Size:
    """How many tensors, bytes, files and folded norm tensors a checkpoint holds."""

    tensors: int
    nbytes: int
    files: int
    folded_norms: int

    @staticmethod
    def of(checkpoint: Checkpoint, tensors: TensorPlan) -> "Size":
        """The size of a source or a converted checkpoint; `tensors` says which norms fold."""
        return Size(
            tensors=len(checkpoint.tensors),
            nbytes=sum(info.nbytes for info in checkpoint.tensors.values()),
            files=len(checkpoint.headers),
            folded_norms=len(tensors.norms.keys() & checkpoint.tensors.keys()),
        )


def _versions() -> dict[str, str]:
    return {
        "flashnorm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        plan: the plan, freshly made from the source.
        before, after: the sizes of the source and of the converted checkpoint.
        written_by: the release of flashnorm that wrote the result, according to its manifest; None if the manifest
            cannot be read.
        source_id, revision: hub id and commit of the source, according to the manifest.
        manifest_sha256: SHA-256 of the manifest itself, in hexadecimal.
        verified_with: the versions of the packages that ran the verification.
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
    def of(planned: PlannedCheckpoint, result: Checkpoint) -> "Conversion":
        """The facts about two checkpoints. A manifest that cannot be read is left to `verify_weights` to report."""
        plan, tensors = planned.plan, planned.tensors
        sizes = Size.of(planned.checkpoint, tensors), Size.of(result, tensors)
        try:
            manifest = read_manifest(result.folder)
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
