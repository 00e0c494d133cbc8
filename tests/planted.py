"""Checkpoints that carry code. Each module of it leaves its name in a file, the witness, when it is imported."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny

_CONFIGURATION = """
from transformers import LlamaConfig


class PlantedConfig(LlamaConfig):
    model_type = "planted"
"""

_MODELING = """
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .configuration_planted import PlantedConfig


class PlantedNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.gain * scaled.to(x.dtype)


class PlantedForCausalLM(LlamaForCausalLM):
    config_class = PlantedConfig

    def __init__(self, config):
        super().__init__(config)
        for name, module in [*self.named_modules()]:
            if isinstance(module, LlamaRMSNorm):
                self.set_submodule(name, PlantedNorm(config.hidden_size, config.rms_norm_eps))
"""

_TOKENIZATION = """
from transformers import PreTrainedTokenizerFast


class PlantedTokenizer(PreTrainedTokenizerFast):
    pass
"""

_MODEL, _PROCESSOR = "modeling_planted.PlantedForCausalLM", "processing_planted.Planted"
_AUTO_MAP = {
    "AutoConfig": "configuration_planted.PlantedConfig",
    "AutoModel": _MODEL,
    "AutoModelForCausalLM": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForSeq2SeqLM": _MODEL,
    "AutoFeatureExtractor": _PROCESSOR,
    "AutoImageProcessor": _PROCESSOR,
    "AutoProcessor": _PROCESSOR,
    "AutoVideoProcessor": _PROCESSOR,
}
_TOKENIZER_MAP = {"AutoTokenizer": [None, "tokenization_planted.PlantedTokenizer"]}

# What Transformers calls instead of its own `generate`, once a checkpoint is trusted.
_GENERATE = """
def generate(*arguments, model, **options):
    return type(model).generate(model, *arguments, **options)
"""

# Modules with names that something may import.
_OTHERS = (
    "__init__.py",
    "conftest.py",
    "image_processing_planted.py",
    "model.py",
    "modeling_llama.py",
    "processing_planted.py",
    "setup.py",
    "sitecustomize.py",
)


def custom_model(folder: Path, witness: Path) -> Path:
    """Write the checkpoint of a model that only its own code can build: Llama, whose norms have a `gain`."""
    _save(folder, tiny.model(_config()))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("norm.weight", "norm.gain"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", model_type="planted", architectures=["PlantedForCausalLM"], auto_map=_AUTO_MAP)
    _plant(folder, witness)
    return folder


def known_model(folder: Path, witness: Path) -> Path:
    """Write the checkpoint of a model that Transformers knows, whose files name code of its own all the same."""
    _save(folder, tiny.model(_config()))
    change(folder / "config.json", architectures=["PlantedForCausalLM"], auto_map=_AUTO_MAP)
    _plant(folder, witness)
    return folder


def change(path: Path, **keys: Any) -> None:
    """Set keys in a JSON file, which need not exist."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | keys))


def _config() -> Any:
    # Short texts, so that `verify` is quick.
    return tiny.config("llama", num_hidden_layers=1, max_position_embeddings=24)


def _save(folder: Path, model: Any) -> None:
    tiny.save(folder, model.to(torch.bfloat16))
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tiny.SIZES["vocab_size"])}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2").save_pretrained(folder)


def _plant(folder: Path, witness: Path) -> None:
    """Code for whatever reads a checkpoint, and every file that can name it."""
    sources = {
        "configuration_planted.py": _CONFIGURATION,
        "custom_generate/generate.py": _GENERATE,
        "modeling_planted.py": _MODELING,
        "tokenization_planted.py": _TOKENIZATION,
    } | dict.fromkeys(_OTHERS, "")
    for name, source in sources.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            f"with open({str(witness)!r}, 'a') as witness:\n    print(__name__, file=witness)\n{source}"
        )
    change(folder / "tokenizer_config.json", auto_map=_TOKENIZER_MAP, tokenizer_class="PlantedTokenizer")
    for name in ("processor_config", "preprocessor_config", "video_preprocessor_config"):
        change(folder / f"{name}.json", auto_map=_AUTO_MAP, processor_class="Planted", image_processor_type="Planted")
    change(folder / "generation_config.json", auto_map=_AUTO_MAP, custom_generate=str(folder))
    weights = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    change(folder / "model.safetensors.index.json", metadata={}, weight_map=weights, auto_map=_AUTO_MAP)
