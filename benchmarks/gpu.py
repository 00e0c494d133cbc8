"""What do the kernels gain on a GPU: a norm with its linear layer, and whole decoders, token by token?

* Operators: `F.rms_norm` and `F.linear` (with the norm's gain); `torch.compile` of the two; and
  `torch.ops.flashnorm.norm_linear`, with its gain folded, which runs whatever was faster when it was measured. Every
  contender is captured in a CUDA graph of many calls; "cold" calls take turns with copies of the weights that are more
  than the L2 cache holds, "warm" calls read the same weights.
* Decoding: Transformers as it is, under `torch.compile` with a static cache (`mode="reduce-overhead"`), and ours: the
  loop behind `generate`, and `generate` itself. Greedy, one sequence, random weights in the true shapes. The compiled
  model reads the whole static cache under a mask.
* Limits of the same run: a copy's bytes read and written, and a large product.

    python benchmarks/gpu.py [--json FILE] [--only operators|decode] [--models NAME ...]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import StaticCache

import flashnorm
from flashnorm.decoding.structure import find_decoder
from flashnorm.gpu import ops  # noqa: F401  (registers the operator for CUDA)
from flashnorm.gpu.choice import file
from flashnorm.gpu.decoder import GraphDecoder

# Inputs and outputs of queries, keys and values together.
SHAPES = {"SmolLM2-135M": (576, 960), "Qwen3-0.6B": (1024, 4096), "Qwen3-8B": (4096, 6144), "Qwen3-32B": (5120, 10240)}
TOKENS = (1, 16, 256, 4096)
STARTED = time.perf_counter()
EPS, DTYPE = 1e-6, torch.bfloat16
PROMPT, DECODED, ROUNDS = 64, 128, 5
CONFIGS: dict[str, Any] = {
    "SmolLM2-135M": transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


def microseconds(*runs: Callable[[], object], replays: int = 20) -> list[float]:
    """Of one call of each function, which is captured in a CUDA graph: the median of several replays.

    The functions take turns, as the clock of a card that has just worked hard is lower.
    """
    graphs = []
    for run in runs:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(replays + 1):
        for graph, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(1e3 * start.elapsed_time(end))
    return [statistics.median(found[1:]) for found in times]


def limits() -> dict[str, float]:
    """Bytes and operations a second."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    return {
        "copy_bytes_per_second": 2 * source.nbytes / microseconds(lambda: target.copy_(source))[0] * 1e6,
        "product_operations_per_second": 2 * 8192**3 / microseconds(lambda: a @ b)[0] * 1e6,
    }


def operator(name: str, tokens: int) -> dict[str, Any]:
    """One row: microseconds of each contender, cold and warm."""
    inputs, outputs = SHAPES[name]
    x, gain = torch.randn(tokens, inputs, device="cuda", dtype=DTYPE), torch.randn(inputs, device="cuda", dtype=DTYPE)
    copies = max(4, min(96, 2**28 // (2 * inputs * outputs)))
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=DTYPE) for _ in range(copies)]

    def two(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, (inputs,), gain, EPS), weight)

    torch._dynamo.reset()
    contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "two": two,
        "compiled": torch.compile(two, dynamic=False),
        "ours": lambda x, weight: torch.ops.flashnorm.norm_linear(x, weight, None, None, EPS),
        "linear": F.linear,
    }
    found: dict[str, Any] = {"model": name, "inputs": inputs, "outputs": outputs, "tokens": tokens}
    colds = [lambda run=run: [run(x, weight) for weight in weights] for run in contenders.values()]
    warms = [lambda run=run: [run(x, weights[0]) for _ in range(copies)] for run in contenders.values()]
    for contender, cold, warm in zip(contenders, microseconds(*colds), microseconds(*warms), strict=True):
        found[contender] = {"cold": round(cold / copies, 2), "warm": round(warm / copies, 2)}
    known = json.loads(file(0).read_text())
    power = 1 << (tokens - 1).bit_length()
    found["choice"] = known[f"norm_linear {inputs} x {outputs}, {power} tokens, {DTYPE} norm"]
    return found


def milliseconds_a_token(run: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Of several rounds of `DECODED` tokens, without the first, in order."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started) / DECODED)
    return sorted(round(one, 4) for one in times[1:])


def decode(name: str) -> dict[str, Any]:
    """Milliseconds a token of each contender, for one model."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    with torch.device("cuda"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    say(f"{name}: generate of Transformers")
    ids = torch.randint(10, config.vocab_size, (1, PROMPT), device="cuda")
    options: Any = {"do_sample": False, "min_new_tokens": DECODED, "max_new_tokens": DECODED, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    weight_bytes = 2 * (sum(p.numel() for p in model.base_model.layers.parameters()) + model.lm_head.weight.numel())
    found: dict[str, Any] = {"model": name, "weight_bytes": weight_bytes}
    found["eager generate"] = milliseconds_a_token(lambda: model.generate(ids, **options), rounds=3)
    plain = model.generate(ids, **options)

    say("torch.compile")
    cache = StaticCache(config=model.config, max_cache_len=512)
    model(ids[:, :1], past_key_values=cache)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def compiled() -> None:
        token, position = ids[:, :1], torch.full((1, 1), PROMPT, device="cuda")
        for _ in range(DECODED):
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(input_ids=token, position_ids=position, past_key_values=cache).logits
            token, position = logits[:, -1].argmax(-1, keepdim=True), position + 1

    try:
        cache.reset()
        started = time.perf_counter()
        compiled()
        found["compile seconds"] = round(time.perf_counter() - started, 1)

        def again() -> None:
            cache.reset()
            compiled()

        found["torch.compile, static cache"] = milliseconds_a_token(again)
    except Exception as error:
        found["torch.compile, static cache"] = f"{type(error).__name__}: {str(error)[:300]}"
    say("flashnorm.optimize")
    started = time.perf_counter()
    flashnorm.optimize(model)
    found["optimize seconds"] = round(time.perf_counter() - started, 1)
    found["status"] = str(flashnorm.status(model))
    found["our generate"] = milliseconds_a_token(lambda: model.generate(ids, **options))
    ours = model.generate(ids, **options)
    found["same tokens"] = int((plain == ours)[0, PROMPT:].cumprod(0).sum())
    found["tilings"] = {
        key: one["best"] for key, one in json.loads(file(0).read_text()).items() if "norm_lin" not in key
    }
    say("bare loops")
    decoder = GraphDecoder(model, find_decoder(model))

    def loop() -> None:
        decoder.start()
        token = decoder.extend(ids[0])[0].argmax(-1, keepdim=True)
        for _ in range(DECODED):
            token = decoder.step(token)[0].argmax(-1, keepdim=True)

    found["our loop, with the prompt"] = milliseconds_a_token(loop)
    graph: Any = decoder._graph
    found["our graph alone"] = milliseconds_a_token(lambda: [graph.replay() for _ in range(DECODED)])
    return found


def say(stage: str) -> None:
    """What begins now, and when: seconds since the process started to measure."""
    print(f"{time.perf_counter() - STARTED:6.1f} s  {stage}", file=sys.stderr, flush=True)


def save(result: dict[str, Any], path: Path | None) -> None:
    """What is known so far."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--only", choices=["operators", "decode"])
    arguments.add_argument("--models", choices=list(CONFIGS), nargs="+", default=list(CONFIGS), help="for decoding")
    options = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers")},
        "python": platform.python_version(),
        "limits": limits(),
        "operators": [],
        "decode": [],
    }
    print(json.dumps(result), flush=True)
    if options.only != "decode":
        print("| shape | tokens | two: cold, warm | compiled | ours | linear alone | chosen |")
        print("|---|---|---|---|---|---|---|")
        for name in SHAPES:
            for tokens in TOKENS:
                row = operator(name, tokens)
                result["operators"].append(row)
                times = " | ".join(
                    f"{row[one]['cold']:.2f}, {row[one]['warm']:.2f}" for one in ("two", "compiled", "ours", "linear")
                )
                chosen = "a kernel" if row["choice"]["best"] else "the two"
                print(f"| {row['inputs']} x {row['outputs']} | {tokens} | {times} | {chosen} |", flush=True)
                save(result, options.json)
    if options.only != "operators":
        for name in options.models:
            result["decode"].append(decode(name))
            print(json.dumps(result["decode"][-1], indent=1), flush=True)
            save(result, options.json)


if __name__ == "__main__":
    main()
