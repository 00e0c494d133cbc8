"""What does a norm before a linear cost: torch's two operators, and one with the norm deferred?

* `F.rms_norm` and `F.linear` after it; `torch.ops.flashnorm.norm_linear`; and both linears bare, whose norm is free.
* At the shapes of the paper's models, for different numbers of tokens. The contenders take turns in random order, each
  right after an untimed run of its own, so that none profits from what another left in the caches.

    python benchmarks/operators.py [--dtype bfloat16|float32|float16] [--threads N]
"""

import argparse
import os
import random
import statistics
import time

import torch
from torch.nn import functional as F  # noqa: N812

from flashnorm.cpu import ops

SHAPES = ((576, 960), (2048, 2560), (4096, 6144))  # inputs, outputs
TOKENS = (1, 16, 64, 256, 1024, 4096)
EPS, BUDGET = 1e-5, 6.0  # seconds a row, roughly


def row(inputs: int, outputs: int, tokens: int, dtype: torch.dtype) -> str:
    """Of the table."""
    x, weight, gain = (torch.randn(*shape).to(dtype) for shape in ((tokens, inputs), (outputs, inputs), (inputs,)))
    runs = {
        "two": lambda: F.linear(F.rms_norm(x, (inputs,), gain, EPS), weight),
        "bare": lambda: F.linear(x, weight),
        "deferred": lambda: ops.norm_linear(x, weight, None, None, EPS),
        "ours bare": lambda: ops.norm_linear(x, weight),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + BUDGET
    while (len(seconds["two"]) < 400 and time.perf_counter() < end) or len(seconds["two"]) < 5:
        for name in random.sample(list(runs), len(runs)):
            runs[name]()
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    low, _, high = statistics.quantiles([a / b for a, b in zip(seconds["two"], seconds["deferred"], strict=True)], n=4)
    times = " | ".join(f"{1e3 * middle[name]:.3f}" for name in runs)
    faster = f"{middle['two'] / middle['deferred']:.2f} ({low:.2f} to {high:.2f})"
    ours, theirs = middle["deferred"] / middle["ours bare"] - 1, middle["two"] / middle["bare"] - 1
    return f"| {inputs} x {outputs} | {tokens} | {times} | {faster} | {100 * ours:+.1f} % | {100 * theirs:+.1f} % |"


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.dtype}, {options.threads} threads; milliseconds, medians; faster: median (middle half)\n")
    print(
        "| shape | tokens | rms_norm + linear | linear | deferred | its linear bare | faster than the two | "
        "price of the norm | for the two |\n|---|---|---|---|---|---|---|---|---|"
    )
    for inputs, outputs in SHAPES:
        for tokens in TOKENS:
            print(row(inputs, outputs, tokens, getattr(torch, options.dtype)), flush=True)


if __name__ == "__main__":
    main()
