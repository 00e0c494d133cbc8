"""Transformers' model with quantised linear layers (the output head apart), and the reference in float64."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

GROUP = 64  # inputs that share a scale, where the way is not to have one for each row


class Model:
    """A model that gives logits, and generates nothing."""

    gains, note = None, ""

    def __init__(self, model: PreTrainedModel, library: str):
        self.model = model
        self.version = f"{library} {version(library)}"

    def logits(self, ids: list[int]) -> np.ndarray:
        """By one call."""
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Not asked for."""
        raise NotImplementedError


def plain(folder: Path, **options: Any) -> PreTrainedModel:
    """The model in a folder, in float32 unless `options` say otherwise."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def linears(model: PreTrainedModel) -> list[nn.Linear]:
    """Those of the layers."""
    return [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and "layers." in name]


def in_torchao(folder: Path, bits: str) -> PreTrainedModel:
    """Weights only: 8 bits with a scale for each row, or 4 bits with a scale for each group."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    model, scales = plain(folder), {"int8": PerAxis(0), "int4": PerGroup(GROUP)}
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, bits), granularity=scales[bits])
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "layers." in name)
    return model


def in_hqq(folder: Path, bits: str) -> PreTrainedModel:
    """Weights only: a scale and a zero for each group, as HQQ finds them. They run dequantised."""
    from hqq.core.quantize import Quantizer

    model = plain(folder)
    how: dict[str, Any] = {"nbits": int(bits[-1]), "group_size": GROUP, "optimize": True, "axis": 1, "device": "cpu"}
    for module in linears(model):
        quantised, meta = Quantizer.quantize(module.weight.data, compute_dtype=torch.float32, **how)
        module.weight.data = Quantizer.dequantize(quantised, meta).to(torch.float32).view_as(module.weight)
    return model


def in_bitsandbytes(folder: Path, kind: str) -> PreTrainedModel:
    """LLM.int8(), which quantises inputs as well, or NF4 weights."""
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return plain(folder, quantization_config=BitsAndBytesConfig(**options), device_map="cpu")


def in_llmcompressor(folder: Path, method: str) -> PreTrainedModel:
    """4 bits by rounding, GPTQ or AWQ; what it calibrates with are other texts than those that are compared."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from texts import texts

    modifiers: dict[str, Any] = {"round": QuantizationModifier, "gptq": GPTQModifier, "awq": AWQModifier}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts(folder, part=1)]
    options: dict[str, Any] = {}
    if method != "round":
        options = {
            "dataset": Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "max_seq_length": len(rows[0]["input_ids"]),
        }
    model = plain(folder)
    with torch.enable_grad():
        oneshot(model=model, recipe=modifiers[method](config_groups=groups, ignore=["lm_head"]), **options)
    return model


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """`variant` is "float64", or a library and what it is to do: "torchao int8"."""
    torch.set_grad_enabled(False)
    library, _, how = variant.partition(" ")
    if library == "float64":
        return Model(plain(folder, dtype=torch.float64), "transformers")
    by = {
        "torchao": in_torchao,
        "hqq": in_hqq,
        "bitsandbytes": in_bitsandbytes,
        "llmcompressor": in_llmcompressor,
    }
    return Model(by[library](folder, how), library)
