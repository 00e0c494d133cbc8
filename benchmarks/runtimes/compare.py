"""One run of a model in a runtime, and what two runs have in common."""

import contextlib
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peers import environments

from .table import Way

WORKER = Path(__file__).with_name("worker.py")
TOKENS = 32  # greedy ones, after a quarter of the text
MINUTES = 60  # for all folders of one runtime
NO_ANSWER = "no answer"
# Of a log-probability, between source and converted model in float32: what the order of sums makes of it.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Run:
    """What a runtime computed, or why it did not.

    Attributes:
        version: of the runtime.
        tokens: greedy ones.
        log_probabilities: `[all ids, vocabulary]`, float32.
        gains: products with a gain in the runtime's graph, if it has one.
        note: what else is to be said.
        error: one line, if there is nothing else.
    """

    version: str = ""
    tokens: tuple[int, ...] = ()
    log_probabilities: np.ndarray | None = None
    gains: int | None = None
    note: str = ""
    error: str = ""


def run(
    way: Way, interpreter: Path, folders: dict[str, Path], texts: list[list[int]], tokens: int = TOKENS
) -> dict[str, Run]:
    """Form -> what the runtime made of that folder; all by one process of its own."""
    with tempfile.TemporaryDirectory(prefix="runtime-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        pairs = [[form, str(folder.resolve())] for form, folder in folders.items()]
        (scratch / "request.json").write_text(json.dumps({"texts": texts, "tokens": tokens, "folders": pairs}))
        child([interpreter, WORKER, way.module, way.variant, scratch / "request.json"], scratch)
        return {form: _run(scratch / form, scratch / "log") for form in folders}


def child(command: list[str | Path], scratch: Path) -> None:
    """Run a command in a folder, to its end or for so many `MINUTES`; what it prints goes to `log` there."""
    # PYTHONPATH is for the caller's environment, not for another.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with (scratch / "log").open("w+") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdout=log, stderr=log, env=variables, cwd=scratch, timeout=MINUTES * 60, check=False)


def _run(folder: Path, log: Path) -> Run:
    """What the process left in a folder."""
    answer = folder / "answer.json"
    if not answer.exists():
        return Run(error=f"{NO_ANSWER}: {environments.last_line(log)}")
    found = json.loads(answer.read_text())
    if "error" in found:
        return Run(error=found["error"])
    log_probabilities = np.load(folder / "log_probabilities.npy")
    return Run(found["version"], tuple(found["tokens"]), log_probabilities, found["gains"], found["note"])


@dataclass(frozen=True)
class Comparison:
    """Source and converted model in one runtime.

    Attributes:
        same: how many greedy tokens agree before the first that does not.
        kl: mean KL(source || converted) in nats a token.
        largest: the largest difference of any log-probability, after any token of the text.
        gains: products with a gain in the source's graph and in the converted model's; None without a graph.
        notes: what else is to be said of the source and of the converted model.
    """

    same: int
    kl: float
    largest: float
    gains: tuple[int, int] | None
    notes: tuple[str, str] = ("", "")

    @property
    def ok(self) -> bool:
        """Whether this is the same model."""
        return self.same == TOKENS and self.largest < TOLERANCE


def compare(source: Run, converted: Run) -> Comparison:
    """Two runs that came to an end."""
    expected, found = source.log_probabilities, converted.log_probabilities
    assert expected is not None
    assert found is not None
    if expected.shape != found.shape or not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise ValueError(f"log-probabilities of shape {found.shape}, not {expected.shape}, or not all finite")
    agree = [a == b for a, b in zip(source.tokens, converted.tokens, strict=True)]
    return Comparison(
        same=[*agree, False].index(False),
        kl=float(divergences(expected, found).mean()),
        largest=float(max(np.abs(p - q).max() for p, q in zip(expected, found, strict=True))),
        gains=None if source.gains is None or converted.gains is None else (source.gains, converted.gains),
        notes=(source.note, converted.note),
    )


def divergences(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(expected || found) in nats of each token, of log-probabilities `[tokens, vocabulary]`; `[tokens]`, float64."""
    wide = (p.astype(np.float64) for p in expected)  # row by row, as a vocabulary can be large
    return np.array([(np.exp(p) * (p - q)).sum() for p, q in zip(wide, found, strict=True)])
