"""Fold before or after quantising? KL to the float64 run of the source, for both orders; writes docs/quantised.md.

    python -m runtimes.quantised [--only WORD ...] [--models WORD ...]

* *Quantised source*: the norms keep their gains. *Quantised fold*: folded by `flashnorm convert`, then quantised.
* Both start from float32 weights, so that the fold's own rounding does not show.
* A text counts once, by its mean KL. As both orders read the same texts, what is compared is the ratio of a text's two
  KLs; the interval is of the geometric mean of these ratios, by bootstrap over the texts.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peers.environments import CannotBeInstalled, made

from .compare import Run, divergences, run
from .models import MODELS, Model, folders, without_grid
from .page import put_table, table_of
from .table import ENVIRONMENTS, KEEP, Way
from .texts import IDS, texts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quantised.md"
HEAD = ["weights", "by", "KL of the quantised source", "KL of the quantised fold", "fold / source", "95 % interval"]
DRAWS = 10_000
REFERENCE = Way("float64", "quantised", "float64", "quantised", (), "")


def way(name: str, module: str, variant: str) -> Way:
    """One kind of quantisation, of the source and of the folder with the norms kept."""
    return Way(name, module, variant, "llama_cpp" if module == "llama_cpp" else "quantised", (KEEP,), "")


WAYS = [
    way("8 bits, a scale for each row", "quantised", "torchao int8"),
    way("8 bits, groups of 64", "quantised", "hqq int8"),
    way("8 bits, inputs as well", "quantised", "bitsandbytes int8"),
    way("Q8_0", "llama_cpp", "Q8_0"),
    way("4 bits, groups of 64, by rounding", "quantised", "torchao int4"),
    way("4 bits, groups of 64, optimised", "quantised", "hqq int4"),
    way("NF4", "quantised", "bitsandbytes nf4"),
    way("4 bits, groups of 64, by rounding, symmetric", "quantised", "llmcompressor round"),
    way("4 bits, groups of 64, GPTQ", "quantised", "llmcompressor gptq"),
    way("4 bits, groups of 64, AWQ", "quantised", "llmcompressor awq"),
    way("Q4_0", "llama_cpp", "Q4_0"),
    way("Q4_K_M", "llama_cpp", "Q4_K_M"),
]


@dataclass(frozen=True)
class Orders:
    """KLs of texts to the reference, in nats a token, of the two orders.

    Attributes:
        source, folded: means over the texts.
        ratio: geometric mean over the texts of folded / source.
        low, high: the 95 % interval of this mean.
    """

    source: float
    folded: float
    ratio: float
    low: float
    high: float


def orders(source: np.ndarray, folded: np.ndarray, draws: int = DRAWS) -> Orders:
    """Both orders of some texts.

    Args:
        source, folded: the KL of each text, `[texts]`, positive.
        draws: how often texts are drawn, with replacement, for the interval.
    """
    logs = np.log(folded / source)
    drawn = np.random.default_rng(0).integers(len(logs), size=(draws, len(logs)))
    low, high = np.exp(np.quantile(logs[drawn].mean(1), (0.025, 0.975)))
    return Orders(source.mean(), folded.mean(), float(np.exp(logs.mean())), float(low), float(high))


def row(one: Way, runs: dict[str, Run], reference: np.ndarray) -> list[str]:
    """A line of the table."""
    for form, found in runs.items():
        if found.log_probabilities is None:
            said = found.error[:200].replace("|", "\\|").replace("<", "&lt;")
            return [one.name, "", f"not run, {form}: `{said}`", "", "", ""]
    kls = {form: divergences(reference, found.log_probabilities) for form, found in runs.items()}  # type: ignore[arg-type]
    source, folded = (kls[form].reshape(-1, IDS).mean(1) for form in ("source", KEEP))
    o = orders(source, folded)
    numbers = [f"{o.source:.2e}", f"{o.folded:.2e}", f"{o.ratio:.2f}", f"{o.low:.2f} to {o.high:.2f}"]
    return [one.name, runs["source"].version, *numbers]


def examine(model: Model, ways: list[Way]) -> None:
    """All ways of one model, whose table is written after each."""
    of = folders(Model(f"{model.name} off the grid", without_grid(model.build)), ROOT / "build" / "runtimes")
    ids, begin = texts(of["source"], 0), f"<!-- make quantised: {model.name} -->"

    def runs(one: Way, forms: tuple[str, ...]) -> dict[str, Run]:
        interpreter = made(ROOT / ".venv-runtimes" / one.environment, ENVIRONMENTS[one.environment])
        return run(one, interpreter, {form: of[form] for form in forms}, ids, tokens=0)

    reference = runs(REFERENCE, ("source",))["source"]
    if reference.log_probabilities is None:
        sys.exit(reference.error)
    for one in ways:
        try:
            found = row(one, runs(one, ("source", KEEP)), reference.log_probabilities)
        except CannotBeInstalled as reason:
            found = [one.name, "", f"not run: {reason}", "", "", ""]
        print(f"{model.name}: {', '.join(found)}", flush=True)
        rows = {line[0]: line for line in table_of(PAGE.read_text(), begin)[1:]} | {found[0]: found}
        ordered = [rows[known.name] for known in WAYS if known.name in rows]
        PAGE.write_text(put_table(PAGE.read_text(), begin, [HEAD, *ordered]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--models", nargs="*", default=["SmolLM2", "Gemma"])
    arguments = parser.parse_args()
    ways = [one for one in WAYS if any(word.lower() in f"{one.name} {one.variant}".lower() for word in arguments.only)]
    for model in MODELS:
        if any(word.lower() in model.name.lower() for word in arguments.models):
            examine(model, ways)


if __name__ == "__main__":
    main()
