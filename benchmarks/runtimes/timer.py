"""What runs inside a runtime's environment to time two folders: loads both, then calls them in turns.

    python timer.py MODULE VARIANT REQUEST

* `REQUEST` is a JSON file: `ids`, `lengths` of prompts cut from them, `seconds` for each length, and `folders`, a list
  of two pairs of a form and a folder.
* Beside it, `times.json`: the version, and length -> a list of rounds, each the seconds of one call of either folder;
  or an error.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from worker import FLASHNORM, Model

ROUNDS = 11  # at least


def seconds(model: Model, ids: list[int]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    model.logits(ids)
    return time.perf_counter() - begun


def rounds(models: list[Model], ids: list[int], limit: float) -> list[list[float]]:
    """Calls in turns until `limit` seconds have passed; every other round begins with the second model."""
    for model in [*models, *models]:
        model.logits(ids)  # may compile
    found: list[list[float]] = []
    begun = time.perf_counter()
    while len(found) < ROUNDS or time.perf_counter() - begun < limit:
        order = [0, 1] if len(found) % 2 else [1, 0]
        times = {place: seconds(models[place], ids) for place in order}
        found.append([times[0], times[1]])
    return found


def times(module: str, variant: str, file: Path) -> dict[str, Any]:
    """Load both, and time them."""
    request, models = json.loads(file.read_text()), []
    for form, folder in request["folders"]:
        scratch = file.parent / form
        scratch.mkdir()
        models.append(importlib.import_module(f"workers.{module}").load(variant, Path(folder), form, scratch))
    found = {str(n): rounds(models, request["ids"][:n], request["seconds"]) for n in request["lengths"]}
    return {"version": models[0].version, "times": found}


def main() -> None:
    module, variant, file = sys.argv[1:]
    sys.path.append(str(FLASHNORM))
    try:
        found = times(module, variant, Path(file))
    except Exception as error:
        traceback.print_exc()
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    Path(file).with_name("times.json").write_text(json.dumps(found))
    os._exit(0)  # as in worker.py


if __name__ == "__main__":
    main()
