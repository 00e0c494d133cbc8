"""Source and converted model, each in the same runtime; writes the table of docs/runtimes.md.

    python -m runtimes [--only WORD ...] [--models WORD ...]

`--only` and `--models` take ways and models whose names hold one of the words, or are one; all other cells stay.
Exit status 1 if a runtime that took a folder computed another model.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from peers.environments import CannotBeInstalled, made

from .compare import NO_ANSWER, Comparison, Run, compare, divergences, run
from .models import MODELS, folders, text_ids
from .page import PAGE, cell, with_results
from .table import ENVIRONMENTS, WAYS, Way

ROOT = Path(__file__).parents[2]
# KL of the source in a runtime to the source in Transformers, in nats a token; above it, it is not the same model.
ANOTHER_MODEL = 1e-4


def in_transformers(folder: Path) -> np.ndarray:
    """Log-probabilities of a source, `[tokens, vocabulary]`, by Transformers in this process."""
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.tensor([text_ids(folder)])).logits[0].double().log_softmax(-1).numpy()


def results(way: Way, of: dict[str, Path], expected: np.ndarray) -> dict[str, tuple[str, Comparison | str]]:
    """Form -> the runtime's version, and the comparison or why there is none."""
    if way.tokenizer and not (of["source"] / "tokenizer.json").exists():
        return dict.fromkeys(way.forms, ("", "not run: this model has no tokenizer"))
    try:
        interpreter = made(ROOT / ".venv-runtimes" / way.environment, ENVIRONMENTS[way.environment])
    except CannotBeInstalled as error:
        return dict.fromkeys(way.forms, ("", f"not run: {error}"))
    runs = run(way, interpreter, {form: of[form] for form in ("source", *way.forms)}, [text_ids(of["source"])])
    source = runs["source"]
    found = {form: (source.version, said(source, runs[form])) for form in way.forms}
    if source.log_probabilities is not None and way.plain:
        kl = float(divergences(expected, source.log_probabilities).mean())
        print(f"{way.name}: the source's KL to Transformers is {kl:.0e}", flush=True)
        if kl > ANOTHER_MODEL:
            reason = (
                f"not run: of the source already, this runtime computes another model than Transformers, KL {kl:.0e}"
            )
            return dict.fromkeys(way.forms, (source.version, reason))
    return found


def said(source: Run, converted: Run) -> Comparison | str:
    """The comparison, or why there is none."""
    if source.error:
        return f"not run: the source does not run either, `{source.error[:200]}`"
    if converted.error:
        what = "not run" if converted.error.startswith(NO_ANSWER) else "refused"  # it crashed, or took too long
        return f"{what}: `{converted.error[:200]}`"
    return compare(source, converted)


def chosen(every: list[Any], words: list[str]) -> list[Any]:
    """Those whose names hold one of the words; a word that is a whole name takes that one alone."""
    names = {one.name.lower() for one in every}
    fits = {word: names & {word.lower()} or {name for name in names if word.lower() in name} for word in words}
    return [one for one in every if any(one.name.lower() in fits[word] for word in words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--models", nargs="*", default=[""])
    arguments = parser.parse_args()
    ways, models = chosen(WAYS, arguments.only), chosen(MODELS, arguments.models)
    names, different = [model.name for model in MODELS], False
    for model in models:
        of = folders(model, ROOT / "build" / "runtimes")
        expected = in_transformers(of["source"])
        for way in ways:
            found = results(way, of, expected)
            for form, (_, result) in found.items():
                different |= isinstance(result, Comparison) and not result.ok
                print(f"{way.name}, {form}, {model.name}: {cell(result)}", flush=True)
            keyed = {(way.name, form): result for form, result in found.items()}
            PAGE.write_text(with_results(PAGE.read_text(), names, WAYS, model.name, keyed))
    sys.exit(different)


if __name__ == "__main__":
    main()
