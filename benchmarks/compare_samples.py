"""Compares two runs of lm-eval, sample by sample: the same choices, the same log-likelihoods?

    lm_eval ... --log_samples --output_path ONE
    lm_eval ... --log_samples --output_path OTHER
    python benchmarks/compare_samples.py ONE OTHER

* A choice is the likeliest of a sample's answers. A log-likelihood is of one answer, or of one whole text.
* Of a folder that holds several runs, the newest is taken.
* Prints a Markdown table, and fails if the two did not see the same samples.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("task", "metric", "one", "other", "same choice", "largest difference of a log-likelihood")
_SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")

# Of each task; as `lm_eval.simple_evaluate` has them under "samples", too.
Samples = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Comparison:
    """Two runs on one task."""

    task: str
    samples: int
    metrics: dict[str, tuple[str, str]]  # of each: its value, with the standard error
    same_choice: int | None  # None where there is nothing to choose
    absolute: float  # the largest difference of two log-likelihoods
    relative: float  # the largest one divided by the log-likelihood

    def rows(self) -> list[tuple[str, ...]]:
        """A line of the table for each metric."""
        same = "" if self.same_choice is None else f"{self.same_choice} of {self.samples}"
        difference = f"{self.absolute:.2g} (relative {self.relative:.2g})"
        return [
            (f"{self.task} ({self.samples})", metric, one, other, same, difference)
            for metric, (one, other) in self.metrics.items()
        ]


def compare(one: Samples, other: Samples) -> list[Comparison]:
    """Two runs, task by task.

    Raises:
        SystemExit: they did not see the same samples.
    """
    if one.keys() != other.keys():
        raise SystemExit(f"expected the same tasks in both, found {', '.join(one)} and {', '.join(other)}")
    return [_compared(task, one[task], other[task]) for task in one]


def read(folder: Path) -> Samples:
    """The samples in a folder that lm-eval wrote (`--output_path`).

    Raises:
        SystemExit: there are none.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("samples_*.jsonl"), key=lambda file: file.name):
        if name := _SAMPLES.fullmatch(file.name):
            files[name["task"]] = file  # the newest is the last
    if not files:
        raise SystemExit(f"{folder}: expected samples_*.jsonl in it, found none; run lm-eval with --log_samples")
    return {
        task: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for task, file in files.items()
    }


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Markdown."""
    for row in (columns, ("---",) * len(columns), *rows):
        print(f"| {' | '.join(row)} |")


def _compared(task: str, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Comparison:
    first, second = (sorted(run, key=lambda sample: (sample["filter"], sample["doc_id"])) for run in (first, second))
    if [sample["prompt_hash"] for sample in first] != [sample["prompt_hash"] for sample in second]:
        raise SystemExit(f"{task}: expected the same samples in both, found others; run both with the same options")
    ours, theirs = ([_log_likelihoods(sample) for sample in run] for run in (first, second))
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    choices = [_likeliest(a) == _likeliest(b) for a, b in zip(ours, theirs, strict=True) if len(a) > 1]
    return Comparison(
        task,
        len(first),
        {metric: (_metric(metric, first), _metric(metric, second)) for metric in first[0]["metrics"]},
        sum(choices) if choices else None,
        max(abs(a - b) for a, b in pairs),
        max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs),
    )


def _log_likelihoods(sample: dict[str, Any]) -> list[float]:
    # Of an answer: the value, and whether it is what the model would say. Of a text: the value.
    found = [answer if isinstance(answer, str | float) else answer[0] for answer in sample["filtered_resps"]]
    try:
        return [float(value) for value in found]
    except ValueError:
        raise SystemExit(f"expected log-likelihoods, found the text {found[0]!r}; leave such tasks out") from None


def _likeliest(values: list[float]) -> int:
    return values.index(max(values))


def _metric(name: str, run: list[dict[str, Any]]) -> str:
    """What lm-eval makes of a metric's values, and the standard error over the samples."""
    values, number = [sample[name] for sample in run], len(run)
    if isinstance(values[0], int | float):
        mean = sum(values) / number
        return f"{mean:.4f} ± {_root_of_squares(value - mean for value in values) / number:.4f}"
    # A ratio of two sums, of log-likelihoods and of the words or bytes that they are of; the error is to first order.
    weight = sum(weight for _, weight in values)
    mean = sum(value for value, _ in values) / weight
    error = _root_of_squares(value - mean * weight for value, weight in values) / weight
    if name == "bits_per_byte":
        return f"{-mean / math.log(2):.4f} ± {error / math.log(2):.4f}"
    return f"{math.exp(-mean):.3f} ± {math.exp(-mean) * error:.3f}"


def _root_of_squares(values: Iterable[float]) -> float:
    squares = [value**2 for value in values]
    return math.sqrt(sum(squares) * len(squares) / (len(squares) - 1)) if len(squares) > 1 else math.nan


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path, metavar="ONE")
    parser.add_argument("other", type=Path, metavar="OTHER")
    options = parser.parse_args()
    compared = compare(read(options.one), read(options.other))
    print_table(COLUMNS, [row for comparison in compared for row in comparison.rows()])


if __name__ == "__main__":
    main()
