"""Is a converted adapter, on the FlashNorm version of its model, what it was on the source?

* Tensors: every product is recomputed exactly, as for models; everything else must be the same, byte for byte. A sum or
  a ratio (biases, DoRA's magnitudes) is recomputed in float64, and may be off by one unit in its last place.
* Outputs: source with adapter and converted model with converted adapter, both against the first in float64.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from flashnorm.errors import InputError
from flashnorm.files.adapter import ADAPTER_CONFIG, open_adapter
from flashnorm.files.reader import CONFIG_FILE, Checkpoint
from flashnorm.format import ADAPTER_MARK, ADAPTER_PLAN, MANIFEST_FILE, other_folds
from flashnorm.hub import local_folder
from flashnorm.planning.adapter import AdapterPlan, Constant, Magnitude, SavedBias, plan_adapter
from flashnorm.planning.as_folded import plan_as_folded
from flashnorm.planning.folded import check_unconverted
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import ShiftUse, TensorFold
from flashnorm.verify.adapter_outputs import AdapterOutputs, compare_with_adapters
from flashnorm.verify.findings import Finding, Findings
from flashnorm.verify.formats import FORMATS, Array, Scratch, decode
from flashnorm.verify.gains import ExactGain
from flashnorm.verify.manifest import check_listed_files, folder_records, read_manifest
from flashnorm.verify.products import differing
from flashnorm.verify.text import read_text

_SHOWN = 20


@dataclass(frozen=True)
class AdapterReport:
    """The result of `verify_adapter`.

    Attributes:
        source, converted: the adapters, as they were given.
        kind: the kind of the adapter, as PEFT names it.
        products, sums, unchanged: how many tensors are the rounded product, the rounded sum or ratio, and the same.
        findings: what is wrong, the first of it; `problems` counts all.
        outputs: the comparison of outputs; None if it was not asked for.
    """

    source: str
    converted: str
    kind: str
    products: int
    sums: int
    unchanged: int
    problems: int
    findings: tuple[Finding, ...]
    outputs: AdapterOutputs | None = None

    @property
    def ok(self) -> bool:
        """Whether the converted adapter does on the converted model what the adapter does on the source."""
        return not self.problems and (self.outputs is None or self.outputs.ok)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        return f"{self.converted} is {'the same adapter' if self.ok else 'NOT the same adapter'} as {self.source}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "source": self.source,
            "converted": self.converted,
            "kind": self.kind,
            "products": self.products,
            "sums": self.sums,
            "unchanged": self.unchanged,
            "problems": self.problems,
            "findings": [finding.to_dict() for finding in self.findings],
            "outputs": None if self.outputs is None else {"ok": self.outputs.ok, **asdict(self.outputs)},
        }

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __rich__(self) -> RenderableType:
        words = f"{self.kind}: {self.products} tensors are the correctly rounded product, "
        words += f"{self.sums} the rounded sum or ratio, " if self.sums else ""
        parts: list[RenderableType] = [_line(not self.problems, f"{words}{self.unchanged} are unchanged")]
        parts += [Text(f"  {finding}") for finding in self.findings[:_SHOWN]]
        if self.outputs is not None and self.outputs.skipped is not None:
            parts.append(Text(f"- outputs: not compared, {self.outputs.skipped}"))
        for criterion in () if self.outputs is None else self.outputs.criteria:
            parts.append(_line(criterion.ok, f"{escape(criterion.asked)}: {escape(criterion.found)}"))
        return Group(*parts, _line(self.ok, f"[bold]{escape(self.verdict)}[/bold]"))


def _line(ok: bool, markup: str) -> Text:
    return Text.from_markup(f"{'[green]✓[/green]' if ok else '[red]✗[/red]'} {markup}")


def verify_adapter(
    model: str | Path,
    out: str | Path,
    adapter: str | Path,
    out_adapter: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    weights_only: bool = False,
    text: str | Path | None = None,
    stage: Callable[[str], object] = lambda words: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    trust_remote_code: bool = False,
) -> AdapterReport:
    """Compare a converted adapter with the adapter of the source that it was made from.

    The models themselves are compared by `verify`.

    Args:
        model: folder or hub id of the source.
        out: folder of its FlashNorm version.
        adapter: folder or hub id of the adapter of the source.
        out_adapter: folder of the converted adapter.
        revision: of `model`; see `verify`.
        subfolder: of `model`; see `verify`.
        weights_only: do not run the models.
        text: the text to run the models on, or the path of a file that holds it; None for the package's own text.
        stage: called before each run of a model with a few words that say what is run.
        progress: called in each run of a model with the bytes of weights done so far, and in total.
        trust_remote_code: run code that the checkpoints carry.

    Raises:
        InputError: something cannot be read, or the adapter is of a kind that cannot be converted.
    """
    if isinstance(text, Path):
        text = read_text(text)
    original, result = Checkpoint.open(local_folder(model, revision, subfolder)), Checkpoint.open(out)
    before, after = open_adapter(local_folder(adapter)), open_adapter(out_adapter)
    check_unconverted(before)
    folded = result.config, result.folder / CONFIG_FILE
    planned = plan_as_folded(original, folded, trust_remote_code=trust_remote_code)
    plan = plan_adapter(before, planned)
    check = _Check(before, after, result, planned, plan)
    check.run()
    outputs = None
    if not weights_only:
        outputs = compare_with_adapters(
            original,
            result,
            before.folder,
            after.folder,
            text=text,
            stage=stage,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    findings = check.findings
    return AdapterReport(
        str(adapter),
        str(out_adapter),
        plan.kind,
        check.products,
        check.sums,
        check.unchanged,
        findings.total,
        tuple(findings.kept),
        outputs,
    )


class _Check:
    """The comparison of two adapters' files."""

    def __init__(
        self,
        before: Checkpoint,
        after: Checkpoint,
        folded: Checkpoint,
        planned: PlannedCheckpoint,
        plan: AdapterPlan,
    ) -> None:
        self._before, self._after, self._source, self._folded = before, after, planned.checkpoint, folded
        self._planned, self._plan = planned, plan
        self.findings = Findings()
        self.products = self.sums = self.unchanged = 0

    def run(self) -> None:
        expected = self._before.tensors.keys() | self._plan.changed
        for name in sorted(expected - self._after.tensors.keys()):
            self._wrong("tensor", name, "is absent")
        for name in sorted(self._after.tensors.keys() - expected):
            self._wrong("tensor", name, "is in no plan")
        for name in sorted(expected & self._after.tensors.keys()):
            self._tensor(name)
        self._config()
        if os.path.lexists(self._after.folder / MANIFEST_FILE):
            manifest = read_manifest(self._after.folder)
            check_listed_files(manifest, folder_records(self._after.folder, manifest.files, {}), self.findings)
        else:
            self._wrong("manifest", MANIFEST_FILE, "is absent")

    def _tensor(self, name: str) -> None:
        stored = self._after.tensors[name]
        if name in self._before.tensors:
            old = self._before.tensors[name]
            wider = old.dtype in FORMATS and stored.dtype in ("F32", "F64")
            wider = wider and FORMATS[stored.dtype].precision >= FORMATS[old.dtype].precision
            if stored.shape != old.shape or not (stored.dtype == old.dtype or wider):
                self._wrong(
                    "tensor", name, f"is {stored.dtype} {list(stored.shape)}, was {old.dtype} {list(old.shape)}"
                )
                return
        if name in self._plan.folds:
            self._product(name, self._plan.folds[name])
        elif name in self._plan.changed:
            self._sum(name)
        elif stored.dtype == self._before.tensors[name].dtype:
            self.unchanged += self._right(name, self._before.read_bytes(name) == self._after.read_bytes(name))
        else:
            same = np.array_equal(_values(self._before, name), _values(self._after, name), equal_nan=True)
            self.unchanged += self._right(name, same)

    def _right(self, name: str, same: bool) -> bool:
        if not same:
            self._wrong("tensor", name, "was to be copied and differs")
        return same

    def _product(self, name: str, fold: TensorFold) -> None:
        info = self._after.tensors[name]
        tag, form = info.dtype, FORMATS[info.dtype]
        weight = np.empty(info.shape, form.bits)
        widened = _values(self._before, name).reshape(info.shape)
        form.encode(widened.astype(form.wide[0] if tag == "BF16" else _NUMPY[tag]), weight, Scratch())
        stored = np.frombuffer(self._after.read_bytes(name), form.bits)
        trailing = int(np.prod(info.shape[fold.axis + 1 :]))
        lines = (-1, info.shape[fold.axis] if trailing == 1 else trailing)
        gain = self._gain(info.shape[fold.axis], fold)
        wrong = differing(tag, weight.reshape(lines), stored.reshape(lines), gain, 0, trailing)
        if wrong.size:
            at = tuple(int(i) for i in np.unravel_index(int(wrong[0]), info.shape))
            problem = "is not the rounded product"
            self.findings.add(Finding("tensor", name, problem, at, differing=wrong.size, elements=stored.size))
        else:
            self.products += 1

    def _sum(self, name: str) -> None:
        tag = self._after.tensors[name].dtype
        expected, size = self._expected(name)
        found = _values(self._after, name)
        # One unit in the last place of the result, and the error of float64 sums of that size.
        limit = 2.0 ** (1 - FORMATS[tag].precision) * np.abs(expected) + 2.0**-40 * size
        limit = np.maximum(limit, 2.0 ** FORMATS[tag].smallest_power)
        wrong = np.flatnonzero(~(np.abs(found - expected) <= limit))
        if wrong.size:
            at = int(wrong[0])
            self.findings.add(
                Finding(
                    "tensor",
                    name,
                    "is not the rounded sum or ratio",
                    (at,),
                    f"{found[at]:.9g}",
                    f"{expected[at]:.9g}",
                    wrong.size,
                    found.size,
                )
            )
        else:
            self.sums += 1

    def _expected(self, name: str) -> tuple[Array, Array]:
        """The value of a sum or ratio in float64, and the sum of the magnitudes of its terms."""
        if (constant := self._plan.constants.get(name)) is not None:
            return self._constant(constant)
        if (saved := self._plan.biases.get(name)) is not None:
            return self._bias(name, saved)
        value = self._magnitude(name, self._plan.magnitudes[name])
        return value, np.abs(value)

    def _constant(self, constant: Constant) -> tuple[Array, Array]:
        a, b = self._matrix(self._before, constant.a), self._matrix(self._before, constant.b)
        total = np.zeros(len(b)) if constant.before is None else _values(self._before, constant.before)
        beta = self._beta(a.shape[1], constant.shifts)
        return total + b @ (a @ beta), np.abs(total) + np.abs(b) @ (np.abs(a) @ np.abs(beta))

    def _bias(self, name: str, saved: SavedBias) -> tuple[Array, Array]:
        weight = np.moveaxis(
            self._matrix(self._before if saved.in_adapter else self._source, saved.weight), saved.axis, 1
        )
        old, beta = _values(self._before, name), self._beta(weight.shape[1], saved.shifts)
        return old + weight @ beta, np.abs(old) + np.abs(weight) @ np.abs(beta)

    def _magnitude(self, name: str, magnitude: Magnitude) -> Array:
        """By the weights and factors as they are stored, so that the ratio is that of the two models."""
        b, norms = self._matrix(self._before, magnitude.b), []
        for model, weight, adapter in (
            (self._source, magnitude.weight, self._before),
            (self._folded, magnitude.folded, self._after),
        ):
            outputs_first = np.moveaxis(self._matrix(model, weight), magnitude.fold.axis, 1)
            norms.append(
                np.linalg.norm(outputs_first + magnitude.scale * (b @ self._matrix(adapter, magnitude.a)), axis=1)
            )
        return _values(self._before, name) * np.divide(norms[1], norms[0], out=np.ones(len(b)), where=norms[0] > 0)

    def _beta(self, inputs: int, shifts: tuple[ShiftUse, ...]) -> Array:
        total = np.zeros(inputs)
        for shift in shifts:
            beta = _values(self._source, shift.bias)
            for start, first, count in shift.segments or ((0, 0, inputs),):
                total[start : start + count] += beta[first : first + count]
        return total

    def _gain(self, length: int, fold: TensorFold) -> ExactGain:
        gains = [ExactGain.of(_values(self._source, use.norm), use.offset, length, use.segments) for use in fold.gains]
        total = gains[0]
        for gain in gains[1:]:
            total = total * gain
        return total

    def _matrix(self, checkpoint: Checkpoint, name: str) -> Array:
        return _values(checkpoint, name).reshape(checkpoint.tensors[name].shape)

    def _config(self) -> None:
        changes = {"base_model_name_or_path", "revision", ADAPTER_MARK, ADAPTER_PLAN}
        changes |= {"lora_bias", "init_lora_weights"} if self._plan.constants else set()
        before, after = self._before.config, self._after.config
        for key in sorted((before.keys() | after.keys()) - changes):
            if before.get(key) != after.get(key):
                self._wrong("config", f"{ADAPTER_CONFIG}: {key}", f"is {after.get(key)!r}, was {before.get(key)!r}")
        folds_hash = self._planned.plan.folds_hash()
        if other_folds(after | {ADAPTER_PLAN: None}, folds_hash):
            named = [after.get("base_model_name_or_path"), after.get("revision")]
            self._wrong("config", f"{ADAPTER_CONFIG}: base_model_name_or_path, revision", f"are {named}: other folds")
        wanted = {ADAPTER_MARK: True, ADAPTER_PLAN: folds_hash}
        wanted |= {"lora_bias": True} if self._plan.constants else {}
        for key, value in wanted.items():
            if after.get(key) != value:
                self._wrong("config", f"{ADAPTER_CONFIG}: {key}", f"is {after.get(key)!r}, expected {value!r}")

    def _wrong(self, kind: str, name: str, problem: str) -> None:
        self.findings.add(Finding(kind, name, problem))


_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def _values(checkpoint: Checkpoint, name: str) -> Array:
    """A tensor's values as float64, flat."""
    tag = checkpoint.tensors[name].dtype
    if tag not in FORMATS:
        raise InputError(
            f"{checkpoint.folder / checkpoint.tensors[name].file}: expected {name} in a dtype that can be checked, "
            f"found {tag}"
        )
    return decode(tag, np.frombuffer(checkpoint.read_bytes(name), FORMATS[tag].bits)).copy()
