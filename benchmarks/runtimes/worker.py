"""What runs inside a runtime's environment: loads one folder after another, and writes what each computes.

    python worker.py MODULE VARIANT REQUEST

* `REQUEST` is a JSON file: the ids of `texts`, how many greedy `tokens` are to follow the first quarter of the first
  text, and `folders`, a list of pairs of a form and a folder.
* Beside it, each form has a folder with `log_probabilities.npy`, `[all ids, vocabulary]` in float32, and `answer.json`:
  the version, the greedy tokens, the number of products with a gain, if the runtime has a graph, and a note.
* If anything fails, `answer.json` holds the error alone: a runtime that refuses a folder is a result. If it refuses the
  source, the others are not tried.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FLASHNORM = Path(__file__).parents[2] / "src"


class Model(Protocol):
    """What `load(variant, folder, form, scratch)` of each module in `workers` gives. Weights and arithmetic: float32.

    Attributes:
        version: name and version of the runtime.
        gains: products with a gain in the graph; None if there is no graph to count in.
        note: what else is to be said of this folder in this runtime.
    """

    version: str
    gains: int | None
    note: str

    def logits(self, ids: list[int]) -> np.ndarray:
        """After each token of a text, `[ids, vocabulary]`."""
        ...

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """So many greedy tokens after a prompt, by the runtime's own way to generate. No token ends them."""
        ...


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension, computed in float64 row by row, as a vocabulary can be large; float32."""
    result = np.empty(logits.shape, np.float32)
    for row, values in zip(result, logits, strict=True):
        wide = values.astype(np.float64)
        wide -= wide.max()
        row[:] = wide - np.log(np.exp(wide).sum())
    return result


def answer(
    module: str, variant: str, folder: Path, form: str, scratch: Path, request: dict[str, Any]
) -> dict[str, Any]:
    """Load, run, and say what came out."""
    texts, tokens = request["texts"], request["tokens"]
    model: Model = importlib.import_module(f"workers.{module}").load(variant, folder, form, scratch)
    found = [log_softmax(np.asarray(model.logits(ids))) for ids in texts]
    np.save(scratch / "log_probabilities.npy", np.concatenate(found))
    generated = model.generate(texts[0][: len(texts[0]) // 4], tokens) if tokens else []
    return {
        "version": model.version,
        "gains": model.gains,
        "note": model.note,
        "tokens": [int(token) for token in generated],
    }


def main() -> None:
    module, variant, file = sys.argv[1:]
    sys.path.append(str(FLASHNORM))
    request = json.loads(Path(file).read_text())
    for form, folder in request["folders"]:
        scratch = Path(file).parent / form
        scratch.mkdir()
        try:
            found = answer(module, variant, Path(folder), form, scratch, request)
        except Exception as error:
            traceback.print_exc()
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        (scratch / "answer.json").write_text(json.dumps(found))
        if form == "source" and "error" in found:
            break  # there is nothing to compare with
    # Libraries of some runtimes crash while they end, when all is written.
    os._exit(0)


if __name__ == "__main__":
    main()
