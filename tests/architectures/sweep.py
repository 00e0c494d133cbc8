"""Folds and proves a tiny model of every architecture that transformers knows, and writes what it found as a table.

* One row for each model type: plan; fold in memory; a checkpoint converted in each form, loaded by `flashnorm.load` and
  by plain transformers. All outputs are compared with the source's in float64.
* A norm that is kept is proven to be impossible by `proof.py`, or it is a gap.
* `make architectures` writes `docs/architectures.md`; a test compares the two.
"""

import argparse
import math
import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import flashnorm
from architectures import causal, families, published
from architectures.proof import prove
from flashnorm.errors import InputError, brief
from flashnorm.plan import FoldPlan, Kept, Kind
from flashnorm.trace.planner import trace
from flashnorm.trace.tracer import Tracer
from flashnorm.verify.float64 import float64_everywhere

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
MADE_WITH = f"Transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}."

MOST_MEMORY = 10 << 30  # bytes of one process, and of its address space
TOLERANCE = 1e-10  # relative to the largest output
SAME_MODEL = 1e-3  # constants that are no weights may be made in float32 when a model is loaded
EXACT, NOTHING, GAP, WRONG, NOT_BUILT = STATUSES = ("exact", "nothing folds", "gap", "WRONG", "not built")
PROVEN = ("impossible", "no effect", "possible by division", "possible up to signs")

EXPLANATION = """\
A tiny model of every model type that Transformers has, with random weights, gains far from one:

* *norms* that it has, *folded* by the plan; those *kept*, why, and how many of them are *proven* by numbers to be
  impossible: no weights of the model can take the gain (or only a positive one, where a ReLU is between), whatever its
  code looks like (`tests/architectures/proof.py`).
* *checkpoint forms* that were converted, verified bit for bit, and loaded by `flashnorm.load` and by plain
  Transformers: without the norms' weights, with them *kept* at the identity, with the output head *untied*.
* *error*: the largest difference of any output from the source's, in float64, relative to the largest output; over all
  of these and the model folded in memory. 1e-10 is the limit.
* *exact*: all of that holds. *nothing folds*: no norm has weights that could take its gain. *gap*: something is left to
  do, see the note. *not built*: Transformers could not build and run the tiny model, or save and load it.

[Norms that do nothing](removable.md) has, for the causal language models, the norms whose division cancels, and the
LayerNorms that can become RMSNorms.
"""

FULL_SIZE = "## Published models at full size"
PUBLISHED = """\
The hyperparameters that were published, planned on the meta device: the norms of the language model, how many fold, why
others stay, and how many weights take a gain; the norms of vision and audio towers apart. Seconds of one core (an AMD
EPYC), to build the model without weights and to plan it. `tests/architectures/test_published.py` derives the counts,
and holds the number of parameters against the published size.
"""


class NotLoadedError(ValueError):
    """Transformers does not load the source's checkpoint, so that there is nothing to compare with."""


@dataclass(frozen=True)
class Row:
    """What the sweep found about a model type.

    Attributes:
        norms, folded: how many the tiny model has, and how many of them fold.
        kept: why others stay -> how many.
        proven: how many of the kept norms the numbers prove to be impossible.
        forms: the checkpoint forms that were converted and loaded in both ways.
        error: the largest difference of any output from the source's, relative to the largest output; None if not run.
        status: one of the constants above.
        note: what is to be said besides.
    """

    model_type: str
    norms: int = 0
    folded: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    proven: int = 0
    forms: tuple[str, ...] = ()
    error: float | None = None
    status: str = NOT_BUILT
    note: str = ""

    def cells(self) -> list[str]:
        """The row of the table; the error is the last cell but two."""
        kept = "; ".join(f"{count}: {reason}" for reason, count in self.kept.items())
        proven = f"{self.proven} of {sum(self.kept.values())}" if self.kept else ""
        error = "" if self.error is None else f"{self.error:.0e}"
        return [
            self.model_type,
            str(self.norms),
            str(self.folded),
            _cell(kept),
            proven,
            ", ".join(self.forms),
            error,
            self.status,
            _cell(self.note),
        ]


HEADINGS = ["type", "norms", "folded", "kept, and why", "proven", "checkpoint forms", "error", "status", "note"]
ERROR, STATUS = HEADINGS.index("error"), HEADINGS.index("status")


@dataclass(frozen=True)
class Family:
    """Model types of one kind, and how to make and run a tiny model of each."""

    title: str
    model_types: Callable[[], list[str]]
    build: Callable[[str], PreTrainedModel]
    run: Callable[[PreTrainedModel, int], Tensor]


TITLES = {
    "image-text-to-text": "Image-text-to-text models",
    "seq2seq": "Encoder-decoder models",
    "speech-seq2seq": "Speech encoder-decoder models",
    "masked-lm": "Masked language models",
    "plain": "Embedding, vision and other plain models",
}
FAMILIES = {"causal-lm": Family("Causal language models", causal.model_types, causal.build, causal.run)}
FAMILIES |= {
    name: Family(title, partial(families.model_types, name), partial(families.build, name), families.run)
    for name, title in TITLES.items()
}


def examine(name: str, model_type: str) -> Row:
    """Everything about one model type of a family. Never raises; the row says what went wrong."""
    family = FAMILIES[name]
    _quiet()
    # The model in memory is planned, and folded at the end. Nothing changes it between, so that it is traced once. That
    # is before it runs, as a run may leave constants in the modules.
    trace_of = cache(_trace)
    try:
        model = family.build(model_type)
        with suppress(Exception):
            trace_of(model)
        before = outputs(family, model)
    except Exception as error:
        return Row(model_type, note=_what(error))
    row = Row(model_type, status=GAP)
    try:
        with patch("flashnorm.planning.planned.trace", trace_of):
            plan = flashnorm.plan(model)
        row = replace(
            row,
            norms=plan.norms,
            folded=len(plan.folds),
            kept=dict(Counter(_why(kept) for kept in plan.kept.values())),
        )
        proofs = prove(model, plan, family.run)
        row = replace(row, proven=sum(proof.verdict in PROVEN for proof in proofs.values()))
        with patch("flashnorm.planning.planned.trace", _trace_once({})):
            forms, error = _round_trips(family, model, plan, before)
        if plan.folds:
            with patch("flashnorm.models.in_memory.trace", trace_of):
                folded = flashnorm.fold_(model)
            error = max(error, difference(before, outputs(family, folded)))
    except Exception as problem:
        status = NOT_BUILT if isinstance(problem, NotLoadedError) else GAP
        return replace(row, status=status, note=_what(problem))
    row = replace(row, forms=tuple(forms), error=error if forms else None)
    if not error <= TOLERANCE:
        return replace(row, status=WRONG)
    open_questions = [f"{proof.norm} is {proof.verdict}" for proof in proofs.values() if proof.verdict not in PROVEN]
    if open_questions:
        return replace(row, note="; ".join(dict.fromkeys(map(_short, open_questions))))
    return replace(row, status=EXACT if forms else NOTHING)


def _trace(model: PreTrainedModel, inputs: Any = None) -> Tracer:
    """The trace of a model in float64. What its code makes in float32, whatever the model is in, is float64 as well."""
    with float64_everywhere():
        return trace(model, inputs)


def _trace_once(traces: dict[str, Tracer]) -> Callable[[PreTrainedModel], Tracer]:
    """`trace`, whose answer for a config is kept: the forms are planned again and again, to convert, verify, load."""

    def trace_once(model: PreTrainedModel, inputs: Any = None) -> Tracer:
        config = model.config.to_json_string()
        if config not in traces:
            traces[config] = _trace(model, inputs)
        return traces[config]

    return trace_once


def _round_trips(family: Family, model: PreTrainedModel, plan: FoldPlan, in_memory: Tensor) -> tuple[list[str], float]:
    """Save, convert in every form, load in both ways: the forms, and the largest error.

    `in_memory` is what the model computes.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):  # float64 is for all of it
            type(part)._keep_in_fp32_modules = type(part)._keep_in_fp32_modules_strict = None
    forms: dict[str, dict[str, bool]] = {"weightless": {}, "kept": {"keep_norms": True}} if plan.folds else {}
    if any(kept.kind is Kind.TIED for kept in plan.kept.values()):
        forms["untied"] = {"untie": True}
    largest = 0.0
    if not forms:
        return [], largest  # there is nothing to convert
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        model.save_pretrained(source)
        try:
            before = outputs(family, loaded(type(model).from_pretrained, source))
        except Exception as error:
            raise NotLoadedError(f"transformers does not load what it saved: {brief(error)}") from error
        if not difference(in_memory, before) <= SAME_MODEL:
            raise NotLoadedError("transformers loads another model than it saved")
        for form, options in list(forms.items()):
            target = Path(scratch) / form
            try:
                flashnorm.convert(source, target, **options)
            except InputError:
                if form != "untied":
                    raise
                del forms[form]  # the tied norm does not fold with a head of its own either
                continue
            report = flashnorm.verify(source, target, weights_only=True)
            alone = flashnorm.verify(target, weights_only=True)
            if not (report.ok and alone.ok):
                raise ValueError(f"{form}: {alone if report.ok else report}")
            for load in (flashnorm.load, type(model).from_pretrained):
                found = outputs(family, loaded(load, target))
                largest = max(largest, difference(before, found))
    return list(forms), largest


def loaded(load: Callable[..., PreTrainedModel], folder: Path) -> PreTrainedModel:
    """The model in float64, also those parts that its class makes float32."""
    with float64_everywhere():
        return load(folder, dtype=torch.float64).double()


def outputs(family: Family, model: PreTrainedModel) -> Tensor:
    """All outputs for random inputs, in float64 throughout."""
    with torch.no_grad(), float64_everywhere():
        return family.run(model, 1)


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest number expected. What is infinite or NaN must be so in both."""
    finite = expected.isfinite()
    if found.shape != expected.shape or not torch.equal(found[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return math.inf
    return float((found - expected)[finite].abs().max() / expected[finite].abs().max())


def _why(kept: Kept) -> str:
    return "tied" if kept.kind is Kind.TIED else _short(kept.reason)


def _short(reason: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", reason)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ").strip()


def _what(error: Exception) -> str:
    return _cell(f"{type(error).__name__}: {brief(error)}"[:200])


def _quiet() -> None:
    """Without the remarks and progress bars of libraries."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()


def _start_worker() -> None:
    """A type that takes too much memory fails by itself, instead of whatever the system would stop."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


def _timed(job: tuple[str, str]) -> tuple[str, Row, float]:
    started = time.monotonic()
    return job[0], examine(*job), time.monotonic() - started


def main() -> None:
    """Examine every model type and write the table; or only what is named: what the table says of others stays."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="FAMILY[:TYPE]", help=f"families: {', '.join(FAMILIES)}")
    names = parser.parse_args().names
    try:
        jobs = named(names or list(FAMILIES))
    except InputError as error:
        parser.error(str(error))
    rows: dict[str, dict[str, list[str]]] = {name: {} for name, _ in jobs}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _start_worker) as pool:
        for number, (name, row, seconds) in enumerate(pool.map(_timed, jobs), 1):
            rows[name][row.model_type] = row.cells()
            print(f"[{number}/{len(jobs)}] {seconds:5.1f} s  {' | '.join(row.cells())}", file=sys.stderr, flush=True)
    tables, full_size = read_document(TABLE.read_text())
    if not names:
        full_size = published.markdown(
            map(published.plan_published, filter(published.runs, published.configs().values()))
        )
    for name, found in rows.items():
        table = Table(dict.fromkeys(found, MADE_WITH), found)
        whole = list(found) == FAMILIES[name].model_types()
        tables[name] = table if whole else tables[name].updated(table)
    TABLE.write_text(document(tables, full_size))


def named(names: Sequence[str]) -> list[tuple[str, str]]:
    """The family and the model type of all that is named, each as `FAMILY` or `FAMILY:TYPE`, without repetitions.

    Raises:
        InputError: there is no such family or type.
    """
    jobs: dict[tuple[str, str], None] = {}
    for name in names:
        family, colon, model_type = name.partition(":")
        if family not in FAMILIES:
            raise InputError(f"expected a family out of {', '.join(FAMILIES)}, found {family}")
        known = FAMILIES[family].model_types()
        if colon and model_type not in known:
            raise InputError(f"expected a model type of the family {family}, found {model_type}")
        jobs |= dict.fromkeys((family, one) for one in ([model_type] if colon else known))
    return list(jobs)


@dataclass(frozen=True)
class Table:
    """The rows of a family's model types, each as its cells, and the versions that each was made with: both by type."""

    made_with: dict[str, str]
    rows: dict[str, list[str]]

    def updated(self, other: "Table") -> "Table":
        """These rows with those of another table, in the order of the types."""
        made_with, rows = self.made_with | other.made_with, self.rows | other.rows
        return Table({one: made_with[one] for one in sorted(rows)}, {one: rows[one] for one in sorted(rows)})

    def versions(self) -> list[str]:
        """Lines: the versions of most rows, then for each other versions the types that were examined with them."""
        most, *others = sorted(Counter(self.made_with.values()).items(), key=lambda item: (-item[1], item[0]))
        types = {other: [one for one, made_with in self.made_with.items() if made_with == other] for other, _ in others}
        return [most[0], *(f"{other} {', '.join(found)}." for other, found in types.items())]


def document(tables: Mapping[str, Table], full_size: str) -> str:
    """The tables of model types, and that of published models, as it is to be printed."""
    lines = [
        "# Architectures",
        "",
        "Written by `make architectures`; tests repeat one in ten of the causal language models, and one in thirty "
        "of the others.",
        "",
        *EXPLANATION.splitlines(),
        "",
        *_table(["family", "types", *STATUSES]),
    ]
    for name, table in tables.items():
        counts = Counter(row[STATUS] for row in table.rows.values())
        lines.append(line([FAMILIES[name].title, str(len(table.rows)), *(str(counts[status]) for status in STATUSES)]))
    for name, table in tables.items():
        lines += ["", f"## {FAMILIES[name].title}", "", "\n\n".join(table.versions()), "", *_table(HEADINGS)]
        lines += map(line, table.rows.values())
    return "\n".join(lines) + f"\n\n{FULL_SIZE}\n\n{PUBLISHED}\n{full_size}"


def read_document(text: str) -> tuple[dict[str, Table], str]:
    """Back from the file: family -> its table; and the table of published models."""
    names = {family.title: name for name, family in FAMILIES.items()}
    text, _, full_size = text.partition(f"{FULL_SIZE}\n\n{PUBLISHED}\n")
    tables: dict[str, Table] = {}
    for section in text.split("\n## ")[1:]:
        title, most, *others = [found for found in section.partition("\n|")[0].splitlines() if found]
        lines = [found for found in section.splitlines() if found.startswith("|")][len(_table(HEADINGS)) :]
        cells = [[cell.strip() for cell in found.removeprefix("|").removesuffix("|").split("|")] for found in lines]
        made_with = {row[0]: most for row in cells}
        for other in others:
            version, types = re.fullmatch(r"(Transformers \S+, torch \S+\.) (.+)\.", other).groups()
            made_with |= dict.fromkeys(types.split(", "), version)
        tables[names[title]] = Table(made_with, {row[0]: row for row in cells})
    return tables, full_size


def _table(headings: Sequence[str]) -> list[str]:
    return [line(headings), line(["---"] * len(headings))]


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
