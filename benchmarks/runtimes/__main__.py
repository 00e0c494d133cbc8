"""Source and converted model, each in the same runtime; writes the table of docs/runtimes.md.

    python -m runtimes [--only WORD ...] [--models WORD ...]

`--only` and `--models` take ways and models whose names hold one of the words; all other cells stay as they are.
Exit status 1 if a runtime that took a folder computed another model.
"""

import argparse
import sys
from pathlib import Path

from peers.environments import CannotBeInstalled, made

from .compare import Comparison, Run, compare, run
from .models import MODELS, folders, text_ids
from .page import FIRST, NOT_RUN, PAGE, cell, rows_of, with_rows
from .table import ENVIRONMENTS, WAYS, Way

ROOT = Path(__file__).parents[2]


def results(way: Way, interpreter: Path, of: dict[str, Path]) -> dict[str, tuple[str, Comparison | str]]:
    """Form -> the runtime's version, and the comparison or what the runtime said instead."""
    runs = run(way, interpreter, {form: of[form] for form in ("source", *way.forms)}, [text_ids(of["source"])])
    source = runs["source"]
    return {form: (source.version, said(source, runs[form])) for form in way.forms}


def said(source: Run, converted: Run) -> Comparison | str:
    """The comparison, or why there is none."""
    if source.error:
        return f"not even the source: `{source.error[:200]}`"
    return f"refused: `{converted.error[:200]}`" if converted.error else compare(source, converted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--models", nargs="*", default=[""])
    arguments = parser.parse_args()
    ways = [way for way in WAYS if any(word.lower() in way.name.lower() for word in arguments.only)]
    models = [model for model in MODELS if any(word.lower() in model.name.lower() for word in arguments.models)]
    names, different = [model.name for model in MODELS], False
    order = [(way.name, form) for way in WAYS for form in way.forms]
    for model in models:
        of = folders(model, ROOT / "build" / "runtimes")
        for way in ways:
            try:
                interpreter = made(ROOT / ".venv-runtimes" / way.environment, ENVIRONMENTS[way.environment])
                found = results(way, interpreter, of)
            except CannotBeInstalled as error:
                found = dict.fromkeys(way.forms, ("", f"not run: {error}"))
            page = PAGE.read_text()
            rows = rows_of(page)
            for form, (version, result) in found.items():
                row = rows.setdefault((way.name, form), [way.name, form, "", *[NOT_RUN] * len(names)])
                row[2] = version or row[2]
                row[len(FIRST) + names.index(model.name)] = cell(result)
                different |= isinstance(result, Comparison) and not result.ok
                print(f"{way.name}, {form}, {model.name}: {cell(result)}", flush=True)
            PAGE.write_text(with_rows(page, names, rows, order))
    sys.exit(different)


if __name__ == "__main__":
    main()
