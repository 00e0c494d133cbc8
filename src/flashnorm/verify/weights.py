"""Verifies a converted checkpoint bit for bit against its source: streaming, for any size.

* Every tensor that was to be copied is byte-identical; every folded one is the correctly rounded product, recomputed by
  `products.py`, which shares no code with the conversion. Nothing is missing, nothing extra.
* What folds into what comes from a fresh plan, not from the manifest, which is checked like everything else.
* Whatever differs is collected and named; verification does not stop at the first.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashnorm.checkpoint.names import CheckpointPlan
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.plan import FoldPlan
from flashnorm.verify.biases import check_biases
from flashnorm.verify.files import check_files
from flashnorm.verify.findings import Finding, Findings
from flashnorm.verify.products import FORMATS, decode
from flashnorm.verify.range import NO_UNDERFLOW, Underflow
from flashnorm.verify.rounding import Rounding, RoundingSample
from flashnorm.verify.tensors import Pair, compare_tensors

PROBLEMS_IN_FULL = 100


@dataclass(frozen=True)
class WeightsReport:
    """What `verify_weights` looked at, and what it found wrong.

    Attributes:
        folded: tensors that are the correctly rounded product of the source's and their gains.
        biases: biases that are the correctly rounded sum, or quotient.
        unchanged: tensors that are the source's bytes.
        norms: norm tensors that left the checkpoint, or that are kept at their identity value.
        files: files whose hash is right.
        nbytes: size of the converted tensors, in bytes.
        seconds: that it took.
        findings: what is wrong, at most `PROBLEMS_IN_FULL` of them.
        problems: how many there are in all.
        rounding: how the errors of the folded weights are distributed, of a sample; None if nothing was folded.
        underflow: what folded weights lost at the small end of their dtype's range, of all of them.
    """

    folded: int
    biases: int
    unchanged: int
    norms: int
    files: int
    nbytes: int
    seconds: float
    findings: tuple[Finding, ...]
    problems: int
    rounding: Rounding | None = None
    underflow: Underflow = NO_UNDERFLOW

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "ok": self.ok,
            "folded": self.folded,
            "biases": self.biases,
            "unchanged": self.unchanged,
            "norms": self.norms,
            "files": self.files,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "problems": self.problems,
            "findings": [finding.to_dict() for finding in self.findings],
            "rounding": None if self.rounding is None else self.rounding.to_dict(),
            "underflow": self.underflow.to_dict(),
        }


def verify_weights(
    source: str | Path,
    converted: str | Path,
    names: CheckpointPlan,
    plan: FoldPlan | None = None,
    *,
    advance: Callable[[int], None] | None = None,
) -> WeightsReport:
    """Compare a converted checkpoint with its source, bit for bit.

    Args:
        source: folder of the original checkpoint.
        converted: folder of the converted one.
        names: what folds into what, freshly planned, in the names of the source's tensors.
        plan: the same in the names of the module's parameters, to check the manifest against.
        advance: called with the number of bytes of the converted tensors done since the last call.

    Raises:
        InputError: one of the two is no readable checkpoint.
    """
    started = time.monotonic()
    original, result = Checkpoint.open(source), Checkpoint.open(converted)
    findings = Findings(PROBLEMS_IN_FULL)
    pairs = _pairs(original, result, names, findings)
    norms = check_norms(result, names, findings, original)
    wrong: set[str] = set()

    def report(finding: Finding) -> None:
        wrong.add(finding.name)
        findings.add(finding)

    sample = RoundingSample()
    of_source, of_result, underflow = compare_tensors(
        original, result, pairs, report, advance or (lambda nbytes: None), sample
    )
    biases = check_biases(original, result, names, report)
    files = check_files(original, result, names, plan, of_source, of_result, findings)
    return WeightsReport(
        folded=sum(pair.fold is not None and pair.name not in wrong for pair in pairs),
        biases=biases,
        unchanged=sum(pair.fold is None and pair.name not in wrong for pair in pairs),
        norms=norms,
        files=files,
        nbytes=sum(pair.stored.nbytes for pair in pairs),
        seconds=time.monotonic() - started,
        findings=tuple(findings.kept),
        problems=findings.total,
        rounding=sample.result(),
        underflow=underflow,
    )


def _pairs(original: Checkpoint, result: Checkpoint, names: CheckpointPlan, findings: Findings) -> list[Pair]:
    """The tensors to compare, in the order of the converted checkpoint. What has no partner is a finding."""
    expected = {name: name for name in original.tensors if name not in names.norms} | names.untied
    for name in expected.keys() - result.tensors.keys():
        findings.add(Finding("tensor", name, "is missing"))
    for name in result.tensors.keys() - expected.keys() - names.norms.keys():
        findings.add(Finding("tensor", name, f"is not in the source (in {result.tensors[name].file})"))
    pairs = []
    for name, stored in result.tensors.items():
        if name not in expected:
            continue
        source = original.tensors[expected[name]]
        fold = names.folds.get(name)
        changed_bias = name in names.biases or name in names.divided
        if (source.dtype, source.shape) != (stored.dtype, stored.shape):
            found, wanted = (f"{info.dtype} {list(info.shape)}" for info in (stored, source))
            findings.add(Finding("tensor", name, "has another dtype or shape", stored=found, expected=wanted))
        elif changed_bias and source.dtype in FORMATS:
            continue  # for `check_biases`
        elif fold and (unknown := _unknown(original, source.dtype, (use.norm for use in fold.gains))):
            findings.add(Finding("tensor", name, f"was folded, in a dtype that cannot be checked: {unknown}"))
        else:
            pairs.append(Pair(name, source, stored, fold))
    return pairs


def _unknown(original: Checkpoint, dtype: str, norms: Iterable[str]) -> str | None:
    dtypes = [dtype, *(original.tensors[norm].dtype for norm in norms)]
    return next((dtype for dtype in dtypes if dtype not in FORMATS), None)


def check_norms(
    result: Checkpoint, names: CheckpointPlan, findings: Findings, original: Checkpoint | None = None
) -> int:
    """Folded norms are absent, or all are there at the value by which the module multiplies by one.

    Args:
        result: the converted checkpoint.
        names: what folds into what.
        findings: takes what is wrong.
        original: the source, where it is there to say dtype and shape.

    Returns:
        How many are right.
    """
    present = {name: one for name, one in names.norms.items() if name in result.tensors}
    if len(present) < len(names.norms) and present.keys() != set(names.spelled_out):
        missing = next(name for name in names.norms if name not in present)
        problem = f"{len(names.norms) - len(present)} of {len(names.norms)} folded norms are absent, others are not"
        findings.add(Finding("tensor", missing, problem))
    right = len(names.norms) - len(present)
    for name, one in present.items():
        info = result.tensors[name]
        source = info if original is None else original.tensors[name]
        if (info.dtype, info.shape) != (source.dtype, source.shape) or info.dtype not in FORMATS:
            found, wanted = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (info, source))
            findings.add(Finding("tensor", name, "has another dtype or shape", stored=found, expected=wanted))
            continue
        values = decode(info.dtype, np.frombuffer(result.read_bytes(name), FORMATS[info.dtype].bits))
        places = np.flatnonzero(values != one)
        if places.size:
            findings.add(
                Finding(
                    kind="tensor",
                    name=name,
                    problem="is a folded norm and not at its identity value",
                    index=tuple(int(i) for i in np.unravel_index(places[0], info.shape)),
                    stored=f"{values[places[0]]:.9g}",
                    expected=f"{one:g}",
                    differing=int(places.size),
                    elements=math.prod(info.shape),
                )
            )
        else:
            right += 1
    return right
