"""Which of several ways is the fastest: measured once for each device, and remembered in the user's cache folder.

The file is `flashnorm/gpu-*.json` in `$XDG_CACHE_HOME` (or `~/.cache`), one for each device and versions of torch and
Triton. Deleting it makes everything be measured again.
"""

import functools
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton

from flashnorm.gpu.tiling import Tiling

# Calls in the CUDA graph that is timed, and how often it is replayed.
_CALLS, _REPLAYS = 8, 9
# By how much a kernel must be faster than the plain way: less than that may be noise.
_MARGIN = 0.97


def fastest(
    key: str,
    ways: Sequence[Tiling],
    prepare: Callable[[], Callable[[Tiling | None], object]],
    device: torch.device,
    plain: bool = False,
) -> Tiling | None:
    """The fastest way to compute something.

    Args:
        key: what is computed: names, sizes and dtype. All that is computed under the same key has the same answer.
        ways: the kernels to choose from, a good guess first.
        prepare: makes what is measured: a function that computes it in a way; None: in the plain way, without a
            kernel of ours.
        device: where it runs. Only on a GPU is anything measured; elsewhere the answer is the guess.
        plain: whether the plain way is one of the choices.

    Returns:
        A way, or None for the plain one. While a CUDA graph is captured nothing can be measured; then, what was not
        measured before is computed in the plain way, or with the guess if there is no plain way.
    """
    if device.type != "cuda":
        return ways[0]
    known = _known(device.index or 0)
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return None if plain else ways[0]
        run = prepare()
        times: dict[Tiling | None, float] = {way: _microseconds(run, way) for way in ways}
        best: Tiling | None = min(ways, key=times.__getitem__)
        if plain:
            times[None] = _microseconds(run, None)
            best = best if times[best] < _MARGIN * times[None] else None
        known[key] = {
            "best": best and astuple(best),
            "microseconds": [[way and astuple(way), round(time, 2)] for way, time in times.items()],
        }
        _remember(device.index or 0, known)
    best_known = known[key]["best"]
    return None if best_known is None else Tiling(*best_known)


def _microseconds(run: Callable[[Tiling | None], object], way: Tiling | None) -> float:
    """The time of a call: the median of several replays of a CUDA graph, in which no time of a launch counts."""
    run(way)  # compiles
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            run(way)
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / _CALLS)
    return statistics.median(times)


def file(index: int) -> Path:
    """Where the choices for a device are remembered."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(index))
    return base / "flashnorm" / f"gpu-{name}-torch-{torch.__version__}-triton-{triton.__version__}.json"


@functools.cache
def _known(index: int) -> dict[str, Any]:
    """What is known of a device: the same dictionary in each call. A file that cannot be read counts as none."""
    try:
        found = json.loads(file(index).read_text())
        return {key: one for key, one in found.items() if one["best"] is None or Tiling(*one["best"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _remember(index: int, known: dict[str, Any]) -> None:
    """Write what is known, by one rename. Where nothing can be written, the next process measures again."""
    path = file(index)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as made:
            json.dump(known, made, indent=1)
        os.replace(made.name, path)
    except OSError:
        return
