"""Fold before or after quantising? KL to the float64 run of the source, for both orders; prints a table in Markdown.

    python -m runtimes.quantised [--only WORD ...] [--models WORD ...]

* *Quantised source*: the norms keep their gains. *Quantised fold*: folded by `flashnorm convert`, then quantised.
* Both start from float32 weights, so that the fold's own rounding does not show.
* A text counts once: its mean KL. The error is the standard error over the texts; that of the ratio is computed of the
  texts' log ratios, as both orders read the same texts.
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from flashnorm.verify.text import DEFAULT_TEXT
from peers.environments import CannotBeInstalled, made

from .compare import Run, run
from .models import MODELS, Model, folders, without_grid
from .table import ENVIRONMENTS, KEEP, Way

ROOT = Path(__file__).parents[2]
IDS = 128  # of each text
REFERENCE = Way("float64", "quantised", "float64", "quantised", ())
WAYS = [
    Way("int8, torchao", "quantised", "torchao int8", "quantised", (KEEP,)),
    Way("int8, HQQ", "quantised", "hqq int8", "quantised", (KEEP,)),
    Way("Q8_0, llama.cpp", "llama_cpp", "Q8_0", "llama_cpp", (KEEP,)),
    Way("int4, torchao", "quantised", "torchao int4", "quantised", (KEEP,)),
    Way("int4, HQQ", "quantised", "hqq int4", "quantised", (KEEP,)),
    Way("Q4_K_M, llama.cpp", "llama_cpp", "Q4_K_M", "llama_cpp", (KEEP,)),
]


def texts(folder: Path) -> list[list[int]]:
    """Ids of eight texts: pieces of the text of `flashnorm verify`, of the licence and of documents here."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = [DEFAULT_TEXT] + [(ROOT / name).read_text() for name in ("LICENSE", "docs/how.md", "CONTRIBUTING.md")]
    ids = [tokenizer(re.sub(r"\s+", " ", text))["input_ids"] for text in whole]
    return [one[start : start + IDS] for one in ids for start in (0, IDS)]


def kl_by_text(reference: np.ndarray, found: np.ndarray) -> list[float]:
    """KL(reference || found) in nats a token, of log-probabilities `[texts * IDS, vocabulary]`; one for each text."""
    by_token = []
    for p, q in zip(reference, found, strict=True):
        wide = p.astype(np.float64)
        by_token.append(float((np.exp(wide) * (wide - q)).sum()))
    return np.array(by_token).reshape(-1, IDS).mean(1).tolist()


def error(values: list[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def row(way: Way, runs: dict[str, Run], reference: np.ndarray) -> str:
    """A line of the table."""
    if failed := [one.error for one in runs.values() if one.error]:
        return f"| {way.name} | not run: {failed[0][:150]} | | |"
    found = {form: kl_by_text(reference, one.log_probabilities) for form, one in runs.items()}  # type: ignore[arg-type]
    cells = [f"{statistics.mean(kls):.2e} ± {error(kls):.0e}" for kls in found.values()]
    logs = [math.log(folded / source) for source, folded in zip(found["source"], found[KEEP], strict=True)]
    ratio = math.exp(statistics.mean(logs))
    return f"| {way.name} ({runs['source'].version}) | {' | '.join(cells)} | {ratio:.2f} ± {ratio * error(logs):.2f} |"


def table(model: Model, ways: list[Way]) -> None:
    """Print that of one model."""
    off_grid = Model(f"{model.name} off the grid", without_grid(model.build))
    of = folders(off_grid, ROOT / "build" / "runtimes")
    ids = texts(of["source"])

    def runs(way: Way, forms: tuple[str, ...]) -> dict[str, Run]:
        interpreter = made(ROOT / ".venv-runtimes" / way.environment, ENVIRONMENTS[way.environment])
        return run(way, interpreter, {form: of[form] for form in forms}, ids, tokens=0)

    reference = runs(REFERENCE, ("source",))["source"]
    if reference.log_probabilities is None:
        sys.exit(reference.error)
    print(f"\n{model.name}, {len(ids)} texts of {IDS} tokens\n")
    print("| weights | KL of the quantised source | KL of the quantised fold | ratio |\n|---|---|---|---|", flush=True)
    for way in ways:
        try:
            print(row(way, runs(way, ("source", KEEP)), reference.log_probabilities), flush=True)
        except CannotBeInstalled as reason:
            print(f"| {way.name} | not run: {reason} | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--models", nargs="*", default=["SmolLM2", "Gemma"])
    arguments = parser.parse_args()
    ways = [way for way in WAYS if any(word.lower() in way.name.lower() for word in arguments.only)]
    for model in MODELS:
        if any(word.lower() in model.name.lower() for word in arguments.models):
            table(model, ways)


if __name__ == "__main__":
    main()
