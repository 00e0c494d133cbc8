"""Converts an adapter (PEFT) that was trained on a source to one for the source's FlashNorm version.

* Of the source, the config, the headers and the norms are read; its weights only where `AdapterPlan` names them.
* A factor that takes a gain is the exact product, rounded once to its dtype. Everything else is copied byte for byte.
* All or nothing: the target appears by one rename, with a manifest, as a converted checkpoint does.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashnorm.arithmetic import PRECISION
from flashnorm.convert.acceptance import check_config, check_plan
from flashnorm.convert.on_hub import opened
from flashnorm.errors import InputError
from flashnorm.files.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from flashnorm.files.header import DTYPE_BITS, TORCH_DTYPES, TensorInfo, encode_header
from flashnorm.files.others import other_files
from flashnorm.files.reader import CONFIG_FILE, Checkpoint, read_json
from flashnorm.files.records import file_record
from flashnorm.files.staging import Staging, check_target, copy_file, disk_errors, write_file
from flashnorm.format import (
    ADAPTER_MARK,
    ADAPTER_PLAN,
    CARD_FILE,
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    base_revision,
    folded_base,
    options,
    to_json,
)
from flashnorm.hub import hub_identity, local_folder
from flashnorm.planning.adapter import AdapterPlan, plan_adapter
from flashnorm.planning.adapter_values import AdapterValues
from flashnorm.planning.as_folded import plan_as_folded, undecided
from flashnorm.planning.folded import check_unconverted
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.version import __version__

# Name of a dtype for the converted tensors -> what safetensors calls it.
WIDER = {"float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class AdapterResult:
    """What the conversion of an adapter did.

    Attributes:
        target: the folder that was written.
        kind: the kind of the adapter, as PEFT names it.
        scaled: how many tensors have taken a gain.
        corrected: how many others were changed: biases that a norm's bias goes to, and DoRA's magnitudes.
        unchanged: how many tensors stay as they are.
        base: the name of the base model in the new adapter's config.
        plan_hash: the hash of the folds of the model that the adapter belongs to.
        left_out: files of the adapter's folder that were not copied.
        seconds: wall time.
    """

    target: Path
    kind: str
    scaled: int
    corrected: int
    unchanged: int
    base: str
    plan_hash: str
    left_out: tuple[str, ...]
    seconds: float


def convert_adapter(
    adapter: str | Path,
    model: str | Path,
    target: str | Path,
    *,
    folded: str | Path | None = None,
    revision: str | None = None,
    subfolder: str = "",
    adapter_revision: str | None = None,
    adapter_subfolder: str = "",
    untie: bool = False,
    keep: Sequence[str] = (),
    dtype: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> AdapterResult:
    """Write the version of an adapter that belongs to a model's FlashNorm version.

    A LoRA reads the outputs of norms. The folded model has `x` where the source had `g * x`, so that
    `A* = A diag(g)` gives the same result: `B A (g * x) = B A* x`.

    Args:
        adapter: the adapter's folder, or its hub id. It was trained on `model`.
        model: the source's folder or hub id. Its config, headers and norms are read, and weights only for DoRA and for
            trained biases after a norm with a bias.
        target: the folder to write.
        folded: folder or hub id of the FlashNorm version, to follow what its conversion did; its name becomes the
            adapter's base. None: `convert` with the same `untie` and `keep`, and no further options, made it.
        revision: of `model`; see `convert`.
        subfolder: of `model`; see `convert`.
        adapter_revision: of `adapter`.
        adapter_subfolder: of `adapter`.
        untie: an option of the conversion; not together with `folded`.
        keep: an option of the conversion; not together with `folded`.
        dtype: "float32" or "float64": the dtype of all floating-point tensors, which may not become narrower. None:
            each keeps its own.
        force: replace a target that exists, if everything in it is what flashnorm wrote, unchanged.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: the adapter cannot be converted exactly, is converted already, or does not belong to the model; or
            the model or the target cannot be used.
    """
    started = time.monotonic()
    target = Path(os.path.abspath(target))
    if folded is not None and (untie or keep):
        raise InputError(
            f"{folded}: expected either the FlashNorm version or the options of its conversion, found both; leave out "
            "--untie and --keep"
        )
    original = open_adapter(local_folder(adapter, adapter_revision, adapter_subfolder))
    check_unconverted(original)
    check_target(target, force=force)
    config = None if folded is None else _folded_config(folded)
    with opened(model, revision, subfolder) as source:
        check_config(source)
        planned = plan_as_folded(source, config, untie=untie, keep=keep, trust_remote_code=trust_remote_code)
        check_plan(planned)
        plan = plan_adapter(original, planned)
        if folded is None:
            _check_decided(planned, plan, str(model))
        base = str(folded) if folded is not None else folded_base(str(model), planned.plan.folds_hash())
        job = _Job(original, planned, plan, base, dtype)
        source_id, commit = hub_identity(original.folder)
        key = {"adapter": str(original.folder), "started": time.time_ns()}
        with disk_errors(target), Staging(target, key, force=force) as staging:
            job.write(staging, source_id, commit)
            original.check_unchanged()
            staging.publish()
    folds = len(plan.folds)
    return AdapterResult(
        target=target,
        kind=plan.kind,
        scaled=folds,
        corrected=len(plan.changed) - folds,
        unchanged=len(original.tensors.keys() - plan.changed),
        base=base,
        plan_hash=planned.plan.folds_hash(),
        left_out=job.left_out,
        seconds=time.monotonic() - started,
    )


def _folded_config(folded: str | Path) -> tuple[dict[str, Any], Path]:
    path = local_folder(folded, config_only=True) / CONFIG_FILE
    return read_json(path, "name the folder of the FlashNorm version"), path


def _check_decided(planned: PlannedCheckpoint, plan: AdapterPlan, model: str) -> None:
    for norm, why in undecided(planned).items():
        if norm in plan.norms:
            raise InputError(
                f"{model}: expected to know which norms its FlashNorm version has folded, found that this depends on "
                f"its weights for {norm} ({why}); name the FlashNorm version with --folded"
            )


class _Job:
    """The new tensors and files of an adapter, given its plan."""

    def __init__(
        self, adapter: Checkpoint, planned: PlannedCheckpoint, plan: AdapterPlan, base: str, dtype: str | None
    ) -> None:
        self._adapter, self._planned, self._plan, self._base = adapter, planned, plan, base
        others = other_files(adapter)
        self._copies = [name for name in others.belonging if name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        self.left_out = tuple(name for name in others.left_out if name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        self._layout = {name: (self._dtype(name, info, dtype), info.shape) for name, info in adapter.tensors.items()}
        for name, constant in plan.constants.items():
            tag, shape = self._layout[constant.b]
            self._layout.setdefault(name, (tag, shape[:1]))
        dtypes = {name: tag for name, (tag, _) in self._layout.items()}
        self._values = AdapterValues(adapter, planned.checkpoint, plan, dtypes)

    def write(self, staging: Staging, source_id: str | None, revision: str | None) -> None:
        """Write the adapter into a staging folder."""
        folder = self._adapter.folder
        read: dict[str, FileRecord] = {}
        written: dict[str, FileRecord] = {}
        card = [CARD_FILE] if os.path.lexists(folder / CARD_FILE) else []
        for name in (*self._copies, *card):
            path = staging.model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            read[name] = written[name] = copy_file(folder / name, path)
        read |= {name: file_record(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
        path = staging.model / ADAPTER_WEIGHTS
        with path.open("wb") as file:
            for data in self._bytes():
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written[ADAPTER_WEIGHTS] = file_record(path)
        written[ADAPTER_CONFIG] = write_file(staging.model / ADAPTER_CONFIG, to_json(self._config()))
        manifest = Manifest(
            flashnorm_version=__version__,
            source_id=source_id,
            revision=revision,
            source_files=read,
            left_out=self.left_out,
            earlier=None,
            options=options(False, self._planned.tensors.unties, self._planned.asked),
            plan=self._planned.plan,
            files=written,
        )
        write_file(staging.model / MANIFEST_FILE, manifest.to_json())

    def _config(self) -> dict[str, Any]:
        folds_hash = self._planned.plan.folds_hash()
        # The adapter's own revision is that of the source.
        revision = base_revision(self._base, folds_hash)
        changes: dict[str, Any] = {"base_model_name_or_path": self._base, "revision": revision}
        if self._plan.constants:
            # PEFT wants these together. How an adapter was initialised does not matter any more.
            changes |= {"lora_bias": True, "init_lora_weights": True}
        return self._adapter.config | changes | {ADAPTER_MARK: True, ADAPTER_PLAN: folds_hash}

    def _bytes(self) -> Iterator[bytes]:
        """The new safetensors file, tensor by tensor, in the order of the old one."""
        header = self._adapter.headers[ADAPTER_WEIGHTS]
        sizes = [
            (name, tag, shape, math.prod(shape) * DTYPE_BITS[tag] // 8) for name, (tag, shape) in self._layout.items()
        ]
        yield encode_header(sizes, header.metadata)
        for name, (tag, _) in self._layout.items():
            same = name in self._adapter.tensors and self._adapter.tensors[name].dtype == tag
            if name not in self._plan.changed and same:
                yield bytes(self._adapter.read_bytes(name))
            else:
                yield self._values.value(name).contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def _dtype(self, name: str, info: TensorInfo, wider: str | None) -> str:
        """The dtype of a tensor in the new adapter."""
        floating = TORCH_DTYPES.get(info.dtype) in PRECISION
        if name in self._plan.changed and not floating:
            raise InputError(
                f"{self._adapter.folder / ADAPTER_WEIGHTS}: expected {name} in bfloat16, float16, float32 or float64, "
                f"found {info.dtype}; save the adapter again in one of them"
            )
        if wider is None or not floating:
            return info.dtype
        if wider not in WIDER:
            raise InputError(f"expected a dtype of {', '.join(WIDER)}, found {wider!r}")
        if PRECISION[TORCH_DTYPES[info.dtype]] > PRECISION[TORCH_DTYPES[WIDER[wider]]]:
            raise InputError(
                f"{self._adapter.folder / ADAPTER_WEIGHTS}: expected a dtype as wide as that of {name}, {info.dtype}, "
                f"found {wider}; leave out --dtype"
            )
        return WIDER[wider]
