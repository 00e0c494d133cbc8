"""The models that all runtimes are given: two real ones and tiny ones, in float32, source and converted folders.

In float32 the fold of these models adds no rounding that shows, so that whatever differs would be a mistake.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemma3
import smollm2
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import flashnorm
import tiny
from flashnorm.verify.text import DEFAULT_TEXT

from .table import KEEP, WEIGHTLESS

IDS = 128  # of a text


@dataclass(frozen=True)
class Model:
    """A model by its name in the table, and how its folder is made."""

    name: str
    build: Callable[[Path], Path]


def real(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A model whose folder is in bfloat16, in float32."""

    def in_float32(folder: Path) -> Path:
        stored = build(folder.with_name(f"{folder.name}-bfloat16"))
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(stored, partial)
        weights = {name: tensor.float() for name, tensor in load_file(partial / "model.safetensors").items()}
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        configured(partial, dtype="float32")
        return partial.rename(folder)

    return in_float32


def keys_of_4(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of Transformers 4 for rotary embeddings and experts, as published configs have them.

    Some runtimes read no others, and take a default without them.
    """
    found, rotary = {}, config.get("rope_parameters", {})
    if "rope_theta" in rotary:
        found["rope_theta"] = rotary["rope_theta"]
    if "full_attention" in rotary:
        found["rope_theta"] = rotary["full_attention"]["rope_theta"]
        found["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
    if "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    return found


def configured(folder: Path, **changes: Any) -> Path:
    """A folder whose config has these keys, and those of Transformers 4."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | keys_of_4(config) | changes, indent=2))
    return folder


def random(model_type: str, **settings: Any) -> Callable[[Path], Path]:
    """A tiny model of a type, with random weights and no tokenizer."""
    return lambda folder: configured(tiny.save(folder, tiny.model(tiny.config(model_type, **settings))))


MODELS = [
    Model("SmolLM2-135M", real(smollm2.build)),
    Model("Gemma 3 270M", real(gemma3.build)),
    Model("tiny qwen3", random("qwen3")),
    Model("tiny qwen3_moe", random("qwen3_moe", norm_topk_prob=True, **tiny.EXPERTS)),
    Model("tiny gpt2", random("gpt2", n_ctx=1024)),  # MLX and llama.cpp read this key
]


def without_grid(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A model whose matrices have left the grid of four bits from which the packages' weights come.

    On that grid, quantising the source again would lose less than it does for weights that were never quantised, and
    the fold leaves it. Each row gets normal noise of 0.08 of its standard deviation, a third of a step of four bits.
    """

    def build_it(folder: Path) -> Path:
        made = build(folder.with_name(f"{folder.name}-on-the-grid"))
        weights, generator = load_file(made / "model.safetensors"), torch.Generator().manual_seed(0)
        for name, weight in weights.items():
            if weight.dim() == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weights[name] = weight + 0.08 * weight.std(1, keepdim=True) * noise
        save_file(weights, made / "model.safetensors", {"format": "pt"})
        return made.rename(folder)

    return build_it


def folders(model: Model, root: Path) -> dict[str, Path]:
    """ "source" and the forms of the converted model -> folder; each is made if it is not there."""
    home = root / model.name.replace(" ", "-").lower()
    home.mkdir(parents=True, exist_ok=True)
    found = {"source": home / "source", KEEP: home / "keep-norms", WEIGHTLESS: home / "weightless"}
    if not found["source"].exists():
        model.build(found["source"])
    for form in (KEEP, WEIGHTLESS):
        if not found[form].exists():
            flashnorm.convert(found["source"], found[form], keep_norms=form == KEEP)
    return found


def text_ids(folder: Path) -> list[int]:
    """The text that the model reads: a tokenizer's ids of the text of `flashnorm verify`, or random ids."""
    if (folder / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(folder)(DEFAULT_TEXT)["input_ids"][:IDS]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, tiny.SIZES["vocab_size"], (IDS,), generator=generator).tolist()
