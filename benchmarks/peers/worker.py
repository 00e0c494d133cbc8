"""What runs inside a peer's process: loads one model, then answers requests, a JSON line each.

    python worker.py MODULE FOLDER DTYPE THREADS SCRATCH VARIANT

First line out: `{"version": ...}` once the model is loaded. Then, for each line in:

* `{"decode": {"ids": [...], "tokens": N}}` -> `{"seconds": s, "tokens": [...]}`: N greedy tokens, EOS ignored.
* `{"prefill": {"ids": [...]}}` -> `{"seconds": s, "tokens": [t]}`: the prompt alone; t is the likeliest next token.
* `{"memory": null}` -> `{"bytes": n}`: the most memory resident since loading and warming up.

The first request of a length is run twice before, untimed, as it may compile, allocate or pack.
"""

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Protocol

sys.path.append(str(Path(__file__).parents[1]))
import stack

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Model(Protocol):
    """What `load(folder, dtype, threads, scratch[, variant])` of each module in `workers` gives."""

    version: str

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """So many greedy tokens after a prompt, computed anew: nothing is kept from an earlier call."""
        ...


def peak_memory() -> int:
    """Bytes; of this process, pages of mapped files included."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_one_line(error: Exception) -> dict[str, str]:
    """As a reply."""
    return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def answer(model: Model, request: dict[str, Any], warm: set[tuple[int, int]]) -> dict[str, Any]:
    """To one request."""
    if "memory" in request:
        return {"bytes": peak_memory()}
    (parameters,) = request.values()
    ids, tokens = parameters["ids"], parameters.get("tokens", 1)
    if (len(ids), tokens) not in warm:
        for _ in range(2):
            model.generate(ids, tokens)
        warm.add((len(ids), tokens))
        CLEAR_REFS.write_text("5")  # the peak starts again at what is resident now
    started = time.perf_counter()
    # In a large frame, which has room for all that the model calls.
    generated = stack.above(stack.ROOM, lambda: model.generate(ids, tokens))
    seconds = time.perf_counter() - started
    if len(generated) != tokens:
        raise RuntimeError(f"{len(generated)} tokens instead of {tokens}")
    return {"seconds": seconds, "tokens": generated}


def requests() -> queue.SimpleQueue[str]:
    """Lines of standard input as they come; at its end, this process and all it started end, whatever they do."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    return lines


def serve(output: IO[str]) -> None:
    """Load, then answer for as long as the parent lives."""
    lines = requests()
    peer, folder, dtype, threads, scratch, variant = sys.argv[1:]
    try:
        module = importlib.import_module(f"workers.{peer}")
        model: Model = module.load(Path(folder), dtype, int(threads), Path(scratch), *filter(None, [variant]))
    except Exception as error:
        print(json.dumps(in_one_line(error)), file=output, flush=True)
        raise
    print(json.dumps({"version": model.version}), file=output, flush=True)
    warm: set[tuple[int, int]] = set()
    while True:
        try:
            reply = answer(model, json.loads(lines.get()), warm)
        except Exception as error:
            reply = in_one_line(error)
        print(json.dumps(reply), file=output, flush=True)


if __name__ == "__main__":
    # Whatever the peer's libraries print goes to the log; standard output is the parent's alone.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(replies)
