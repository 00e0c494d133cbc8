"""Transformers' model with quantised linear layers (the output head apart), and the reference in float64."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


class Model:
    """A model that gives logits, and generates nothing."""

    gains = None

    def __init__(self, model: PreTrainedModel, library: str):
        self.model = model
        self.version = f"{library} {version(library)}"

    def logits(self, ids: list[int]) -> np.ndarray:
        """By one call."""
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def in_torchao(model: PreTrainedModel, bits: str) -> None:
    """Weights only: 8 bits with a scale for each row, or 4 bits with a scale for each 32 inputs."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    scales = {"int8": PerAxis(0), "int4": PerGroup(32)}
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, bits), granularity=scales[bits])
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "layers." in name)


def in_hqq(model: PreTrainedModel, bits: str) -> None:
    """Weights only: 4 or 8 bits with a scale and a zero for each 64 inputs, as HQQ finds them."""
    from hqq.core.quantize import Quantizer

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            quantised, meta = Quantizer.quantize(
                module.weight.data,
                nbits=int(bits[-1]),
                group_size=64,
                optimize=True,
                axis=1,
                device="cpu",
                compute_dtype=torch.float32,
            )
            module.weight.data = Quantizer.dequantize(quantised, meta).to(torch.float32).view_as(module.weight)


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """`variant` is "float64", or library and bits: "torchao int8"."""
    torch.set_grad_enabled(False)
    library, _, bits = variant.partition(" ")
    dtype = torch.float64 if library == "float64" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if library == "float64":
        return Model(model, "transformers")
    {"torchao": in_torchao, "hqq": in_hqq}[library](model, bits)
    return Model(model, library)
