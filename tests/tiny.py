"""Tiny transformers models with random weights: real code, real files, no download."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A small config of a type."""
    return AutoConfig.for_model(model_type, **(SIZES | overrides))


def model(config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A causal language model with random weights."""
    return randomised(AutoModelForCausalLM.from_config(config), seed).to(dtype)


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give a model random weights; its norm weights are far from one then, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.7 + 0.5 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.eval()


def save(folder: Path, model: PreTrainedModel) -> Path:
    """Write a model as a checkpoint with a single safetensors file."""
    model.save_pretrained(folder)
    return folder


def ids(batch: int = 2, tokens: int = 9) -> torch.Tensor:
    """Token ids, always the same."""
    return torch.randint(0, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(1))
