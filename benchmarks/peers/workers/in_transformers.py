"""Transformers in this environment: as it is, and with more and more of flashnorm."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

import flashnorm
from flashnorm.cpu.fused import FusedDecoder
from flashnorm.decoding.formula import read_decoder


class FusedNorm(nn.Module):
    """torch's own fused norm, weight and all."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def with_fused_norms(model: Any) -> Any:
    """The model with `F.rms_norm` for every RMSNorm."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FusedNorm(module))
    return model


# Variant -> what is done to the model, and which options `generate` gets.
VARIANTS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "eager": (lambda model: model, {}),
    "rms_norm": (with_fused_norms, {}),
    "weightless": (flashnorm.fold_, {}),
    # A dictionary as a result is what our own loop does not give.
    "layers": (flashnorm.optimize, {"return_dict_in_generate": True}),
    "optimize": (flashnorm.optimize, {}),
}


class Generates:
    """A Transformers model, and its `generate`."""

    def __init__(self, model: Any, options: dict[str, Any]):
        self.model, self.options, self.version = model, options, f"transformers {version('transformers')}"

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy."""
        inputs = torch.tensor([ids])
        found = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **self.options,
        )
        return (found if isinstance(found, Tensor) else found.sequences)[0, len(ids) :].tolist()


class Loop:
    """The fused decoder, without what `generate` does around it."""

    def __init__(self, model: Any):
        self.model = flashnorm.optimize(model)  # which is held, and moved to large pages
        self.decoder, self.version = FusedDecoder(read_decoder(self.model)), f"flashnorm {flashnorm.__version__}"

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy."""
        self.decoder.start()
        logits, generated = self.decoder.extend(torch.tensor(ids)), []
        while True:
            generated.append(int(logits.argmax()))
            if len(generated) == tokens:
                return generated
            logits = self.decoder.step(torch.tensor(generated[-1:]))


def load(folder: Path, dtype: str, threads: int, scratch: Path, variant: str) -> Generates | Loop:
    """In evaluation mode, without gradients."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if variant == "loop":
        return Loop(model)
    change, options = VARIANTS[variant]
    return Generates(change(model), options)
