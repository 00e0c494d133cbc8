"""Verifies a converted checkpoint bit for bit against its source: streaming, for any size.

* Every copied tensor must be byte-identical, and every folded tensor the correctly rounded product, which `products.py`
  checks without sharing code with the conversion. No tensor may be missing, and none may be extra.
* The plan is made afresh and not taken from the manifest, which is checked like everything else.
* All differences are collected and named; verification does not stop at the first one.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashnorm.files.reader import Checkpoint
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import TensorPlan
from flashnorm.verify.files import check_files
from flashnorm.verify.findings import Finding, Findings
from flashnorm.verify.formats import FORMATS, decode
from flashnorm.verify.one_tensor import Pair
from flashnorm.verify.part import Compared, Part, compare_part, compare_part_elsewhere, parts_by_file, total
from flashnorm.verify.range import NO_UNDERFLOW, Underflow
from flashnorm.verify.rounding import Rounding
from flashnorm.workers import Elsewhere

PROBLEMS_IN_FULL = 100


@dataclass(frozen=True)
class WeightsReport:
    """What `verify_weights` checked, and what it found wrong. The first five counts are of what was found right.

    Attributes:
        folded: number of tensors that are the correctly rounded product of the source tensor and its gains.
        biases: number of biases that are the correctly rounded sum or quotient.
        centred: number of tensors that are the source's minus their mean, correctly rounded.
        unchanged: number of tensors that are byte-identical to the source's.
        norms: number of norm tensors that are removed, or stored at their identity value.
        files: number of files whose hash is right.
        nbytes: size of the converted tensors, in bytes.
        seconds: how long the verification took.
        findings: what is wrong, at most `PROBLEMS_IN_FULL` findings.
        problems: number of findings in total.
        rounding: distribution of the rounding errors in a sample of the folded weights; None if nothing was folded.
        underflow: the folded weights that lost bits because they are too small for their dtype.
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
    centred: int = 0

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
            "centred": self.centred,
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
    planned: PlannedCheckpoint,
    result: Checkpoint,
    *,
    advance: Callable[[int], None] | None = None,
    executor: Executor | None = None,
) -> WeightsReport:
    """Compare a converted checkpoint with its source, bit for bit.

    Args:
        planned: the source with a fresh plan.
        result: the converted checkpoint.
        advance: called with the number of bytes of the converted tensors done since the last call.
        executor: what runs the workers that compare a file each; None for this process.

    Raises:
        InputError: one of the two checkpoints cannot be read, or a worker failed.
    """
    started = time.monotonic()
    original, tensors = planned.checkpoint, planned.tensors
    findings = Findings(PROBLEMS_IN_FULL)
    pairs = pairs_of(original, result, tensors, findings)
    compared = _compare(original, result, pairs, tensors, advance or (lambda nbytes: None), executor)
    return weights_report(planned, result, pairs, findings, compared, started)


def weights_report(
    planned: PlannedCheckpoint,
    result: Checkpoint,
    pairs: Sequence[Pair],
    findings: Findings,
    compared: Compared,
    started: float,
) -> WeightsReport:
    """The report on tensors that were compared, after a check of the norms and of all other files.

    Args:
        planned: the source with its plan.
        result: the converted checkpoint; of its tensors, only norms are read.
        pairs, findings: from `pairs_of`.
        compared: what came of all pairs.
        started: when the verification began, by `time.monotonic`.
    """
    original, tensors = planned.checkpoint, planned.tensors
    norms = check_norms(result, tensors, findings, original)
    for finding in (*compared.tensors, *_in_order_of(tensors, compared.biases)):
        findings.add(finding)
    wrong = {finding.name for finding in (*compared.tensors, *compared.biases)}
    files = check_files(planned, result, compared.of_source, compared.of_converted, findings)
    return WeightsReport(
        folded=sum(pair.fold is not None and pair.name not in wrong for pair in pairs),
        biases=compared.right_biases,
        unchanged=sum(not (pair.fold or pair.centre) and pair.name not in wrong for pair in pairs),
        norms=norms,
        files=files,
        nbytes=sum(pair.stored.nbytes for pair in pairs),
        seconds=time.monotonic() - started,
        findings=tuple(findings.kept),
        problems=findings.total,
        rounding=compared.sample.result(),
        underflow=compared.underflow,
        centred=sum(pair.centre is not None and pair.name not in wrong for pair in pairs),
    )


def _compare(
    original: Checkpoint,
    result: Checkpoint,
    pairs: Sequence[Pair],
    tensors: TensorPlan,
    advance: Callable[[int], None],
    executor: Executor | None,
) -> Compared:
    if executor is None:
        return compare_part(Part(original, result, tuple(pairs), tensors), advance)
    parts, done = parts_by_file(original, result, pairs, tensors), dict[str, Compared]()
    with Elsewhere(executor, compare_part_elsewhere, again="run the same command again") as crew:
        for file, part in parts.items():
            crew.ask(file, part)
        while len(done) < len(parts):
            file, compared = crew.next()
            done[file] = compared
            advance(parts[file].nbytes)
    for checkpoint in (original, result):
        checkpoint.check_unchanged()
    return total(done[file] for file in parts)


def _in_order_of(tensors: TensorPlan, findings: Iterable[Finding]) -> list[Finding]:
    """Findings about biases, in the order of the plan."""
    order = {name: place for place, name in enumerate((*tensors.biases, *tensors.divided))}
    return sorted(findings, key=lambda finding: order[finding.name])


def pairs_of(original: Checkpoint, result: Checkpoint, tensors: TensorPlan, findings: Findings) -> list[Pair]:
    """The tensors to compare, in the order of the converted checkpoint. A tensor without a partner is a finding.

    Args:
        original: the source, or some of its files, of which all tensors must have a partner.
        result: the converted checkpoint, or its files of the same names.
        tensors: the plan.
        findings: collects what is wrong.
    """
    there = {name for header in original.headers.values() for name in header.tensors.keys() - header.passed_over}
    expected = {name: name for name in original.tensors if name in there and name not in tensors.norms}
    expected |= {name: source for name, source in tensors.untied.items() if source in there}
    for name in sorted(expected.keys() - result.tensors.keys()):
        findings.add(Finding("tensor", name, "is missing"))
    for name in sorted(result.tensors.keys() - expected.keys() - tensors.norms.keys()):
        findings.add(Finding("tensor", name, f"is not in the source (in {result.tensors[name].file})"))
    pairs = []
    for name, stored in result.tensors.items():
        if name not in expected:
            continue
        source = original.tensors[expected[name]]
        fold = tensors.folds.get(name)
        centre = (expected[name], tensors.centred[name]) if name in tensors.centred else None
        changed_bias = name in tensors.biases or name in tensors.divided
        if (source.dtype, source.shape) != (stored.dtype, stored.shape):
            found, wanted = (f"{info.dtype} {list(info.shape)}" for info in (stored, source))
            findings.add(Finding("tensor", name, "has another dtype or shape", stored=found, expected=wanted))
        elif changed_bias and source.dtype in FORMATS:
            continue  # `check_biases` checks it
        elif fold and (unknown := _unknown(original, source.dtype, (use.norm for use in fold.gains))):
            findings.add(Finding("tensor", name, f"was folded, in a dtype that cannot be checked: {unknown}"))
        elif centre and source.dtype not in FORMATS:
            findings.add(Finding("tensor", name, f"was centred, in a dtype that cannot be checked: {source.dtype}"))
        else:
            pairs.append(Pair(name, source, stored, fold, centre))
    return pairs


def _unknown(original: Checkpoint, dtype: str, norms: Iterable[str]) -> str | None:
    dtypes = [dtype, *(original.tensors[norm].dtype for norm in norms)]
    return next((dtype for dtype in dtypes if dtype not in FORMATS), None)


def check_norms(result: Checkpoint, tensors: TensorPlan, findings: Findings, original: Checkpoint | None = None) -> int:
    """Check that the folded norms are all absent, or stored at their identity value.

    They may be stored if all of them are (--keep-norms), or exactly those that the plan spells out.

    Args:
        result: the converted checkpoint.
        tensors: the plan, in tensor names.
        findings: collects what is wrong.
        original: the source, which gives dtype and shape; None if it is not available.

    Returns:
        How many norms are right.
    """
    present = {name: one for name, one in tensors.norms.items() if name in result.tensors}
    if len(present) < len(tensors.norms) and present.keys() != set(tensors.spelled_out):
        missing = next(name for name in tensors.norms if name not in present)
        problem = f"{len(tensors.norms) - len(present)} of {len(tensors.norms)} folded norms are absent, others are not"
        findings.add(Finding("tensor", missing, problem))
    right = len(tensors.norms) - len(present)
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
