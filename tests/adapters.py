"""Adapters that were trained for some steps on tiny models in float64, and runs of models with them."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashnorm
import tiny
from flashnorm.compat.transformers import use_experts_for_float64
from flashnorm.verify.float64 import float64_everywhere


def source(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    use_experts_for_float64(model)
    return model


def folded(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = flashnorm.load(folder, dtype=dtype)
    use_experts_for_float64(model)
    return model


def train(model: PreTrainedModel, config: Any, folder: Path, steps: int = 4, **saving: Any) -> Any:
    """Train an adapter for some steps and save it. Returns the model with it."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "lokr_w1" in name or "hada_w2_a" in name):
                parameter.add_(0.05 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=0.03)
    adapted.train()
    with _exactly(model):
        for _ in range(steps):
            loss = adapted(input_ids=tiny.ids(), labels=tiny.ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    adapted.eval().save_pretrained(folder, **saving)
    return adapted


def _exactly(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Within the block, a float64 model computes all of it in float64."""
    return float64_everywhere() if model.dtype == torch.float64 else contextlib.nullcontext()


def with_adapter(model: PreTrainedModel, folder: Path, **loading: Any) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, **loading).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), _exactly(model):
        return model(input_ids=tiny.ids()).logits


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference of logits, over the tokens that both have (prompts come before the others)."""
    one, other = (logits[:, -min(one.shape[1], other.shape[1]) :] for logits in (one, other))
    return float((one.double() - other.double()).norm() / other.double().norm())
