"""What can be left out of the norms of every causal language model that Transformers knows, proven by numbers.

`make removable` writes `docs/removable.md`: the table, and the text around it. A test compares some rows.
"""

import argparse
import copy
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from transformers import PreTrainedModel

import removed
from architectures import causal, families, sweep
from architectures.configs import LEFT_OUT, tiny_config
from flashnorm.errors import brief
from flashnorm.plan import Kept, Kind, pattern
from flashnorm.planning.removable import removable
from flashnorm.removable import Removable, Verdict
from flashnorm.trace.build import model_class
from flashnorm.trace.inputs import example_calls

PAGE = Path(__file__).parents[2] / "docs" / "removable.md"
HEADINGS = ["type", "divisions", "cancel", "in part", "which", "proven"]
HEADINGS += ["means", "zero", "untied", "proven", "why the others stay", "note"]
_IMAGES = "image-text-to-text"
TITLE = "## The causal language models of Transformers"
_LINE = re.compile(r"^\| (\w[^|]*) \|.*\|$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """What was found of a model type; empty cells if nothing was."""

    model_type: str
    divisions: str = ""
    cancel: str = ""
    in_part: str = ""
    which: str = ""
    divisions_proven: str = ""
    means: str = ""
    zero: str = ""
    untied: str = ""
    means_proven: str = ""
    why: str = ""
    note: str = ""

    def line(self) -> str:
        """The row of the table."""
        return sweep.line([text.replace("|", "/") for text in vars(self).values()])


def examine(model_type: str) -> Row:
    """Everything about one model type. Never raises; the row says what went wrong."""
    sweep._quiet()
    if model_type in LEFT_OUT:
        return Row(model_type, note="its proof takes too long")
    try:
        model, run = _built(model_type)
        found = removable(model)
        verdicts = removed.prove(model, found, run)
        untied = found
        if any(why.kind is Kind.TIED for one in found.centrings for why in one.escapes):
            model = _untied(model)
            untied = removable(model)
        means = removed.prove_centred(model, untied, run)
    except Exception as error:
        return Row(model_type, note=f"{type(error).__name__}: {brief(error)}"[:150])
    return Row(
        model_type,
        str(len(found.divisions)),
        str(len(found.of_verdict(Verdict.CANCELS))),
        str(len(found.of_verdict(Verdict.IN_PART))),
        ", ".join(dict.fromkeys(_short(one.norm) for one in _removed(found))),
        _of(verdicts),
        str(len(found.centrings)),
        str(len(found.centred)),
        str(len(untied.centred)) if untied is not found else "",
        _of(means),
        _why(found, untied),
        "; ".join(dict.fromkeys(f"{_short(norm)}: {why}"[:90] for norm, why in verdicts.items() if _open(why))),
    )


def _short(norm: str) -> str:
    """The name within its layer."""
    return pattern(norm).rpartition("*.")[2]


def _removed(found: Removable) -> list[removed.Division]:
    return [one for one in found.divisions if one.verdict in (Verdict.CANCELS, Verdict.IN_PART)]


def _built(model_type: str) -> tuple[PreTrainedModel, removed.Run]:
    """A tiny model, and what runs it. Norms of a tower for images run with images alone, which have to fit it."""
    config = tiny_config(model_type)
    model = causal.random_model(model_class(config), config)
    if len(example_calls(model)) == 1:
        return model, causal.run
    if families.FAMILIES[_IMAGES].get(model_type) == type(model).__name__:
        model = families.build(_IMAGES, model_type)
    return model, families.run


def _untied(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return causal.random_model(type(model), config)


def _why(found: Removable, untied: Removable) -> str:
    """Why the other divisions and means stay: how many, by the first reason of each."""
    needed = [one for one in found.divisions if one.verdict in (Verdict.IN_PART, Verdict.STAYS)]
    divisions = [next(why for reader in one.readers for why in reader.escapes) for one in needed]
    means = [one.escapes[0] for one in untied.centrings if not one.removable]
    return "; ".join(
        f"{what}: {', '.join(f'{number} {why}' for why, number in Counter(map(_reason, reasons)).items())}"
        for what, reasons in (("divisions", divisions), ("means", means))
        if reasons
    )


def _reason(why: Kept) -> str:
    """A reason without the names of the model's parameters."""
    if why.kind is Kind.TIED:
        return "tied"
    return re.sub(r"^\S+\.\S+ ", "what writes ", re.sub(r"unknown operator: .*", "unknown operator", why.reason))


def _of(verdicts: dict[str, str]) -> str:
    proven = sum(verdict.startswith("proven") for verdict in verdicts.values())
    wrong = sum(verdict.startswith("WRONG") for verdict in verdicts.values())
    return (f"{proven} of {len(verdicts)}" if verdicts else "") + (f", {wrong} WRONG" if wrong else "")


def _open(verdict: str) -> bool:
    return verdict != "proven"


def _timed(model_type: str) -> tuple[Row, float]:
    started = time.monotonic()
    return examine(model_type), time.monotonic() - started


def table(lines: Sequence[str]) -> str:
    """The section with the table, as it is printed."""
    head = [sweep.line(HEADINGS), sweep.line(["---"] * len(HEADINGS))]
    return "\n".join([TITLE, "", sweep.MADE_WITH, "", *head, *lines]) + "\n"


def rows(text: str) -> dict[str, str]:
    """Model type -> its line, from the page."""
    lines = text.partition(TITLE)[2].splitlines()
    return {found[1]: found[0] for line in lines if (found := _LINE.match(line)) and found[1] != HEADINGS[0]}


def main() -> None:
    """Examine every model type and write the table; or only those that are named, and leave the other rows."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    types = parser.parse_args().types or causal.model_types()
    text = PAGE.read_text()
    lines = rows(text) if len(types) < len(causal.model_types()) else {}
    jobs = int(os.environ.get("JOBS", os.cpu_count() or 1))
    with ProcessPoolExecutor(jobs, get_context("spawn"), sweep._start_worker) as pool:
        for number, (row, seconds) in enumerate(pool.map(_timed, types), 1):
            lines[row.model_type] = row.line()
            print(f"[{number}/{len(types)}] {seconds:5.1f} s  {row.line()}", file=sys.stderr, flush=True)
    PAGE.write_text(text.partition(TITLE)[0] + table([lines[one] for one in sorted(lines)]))


if __name__ == "__main__":
    main()
