"""Puts the CPU's kernels into a Transformers model; `flashnorm.optimize` calls it for a model on the CPU.

* The decoder layers use the kernels inside Transformers' own forward (`layers.py`).
* `generate`, where it takes one token after another, runs a fused loop: all layers in one call
  (`decoding/generate.py`).
* Before the kernels are put into a model, they are proven on that model, with the installed versions
  (`decoding/formula.py`, `proof.py`). Before each use, `decoding/guard.py` checks that the model still is the one that
  was proven.
"""

import mmap
from typing import Any

import torch
from transformers import PreTrainedModel

from flashnorm.cpu.fused import KERNELS, check_supported
from flashnorm.cpu.layers import FusedForward, Rotation
from flashnorm.cpu.proof import prove
from flashnorm.decoding.decoder import Decoder, UnsupportedError
from flashnorm.decoding.formula import kinds_of_layers, read_decoder
from flashnorm.decoding.generate import Generate
from flashnorm.decoding.guard import remark, restore
from flashnorm.decoding.proof import DifferentError
from flashnorm.decoding.structure import find_decoder
from flashnorm.errors import brief


def optimize_if_supported(model: PreTrainedModel) -> UnsupportedError | None:
    """Make a model run on the kernels; returns why it is left as it is, or None if it was optimized."""
    model.eval()
    restore(model)
    try:
        decoder, refusal = proven(model)
    except UnsupportedError as reason:
        if isinstance(reason, DifferentError):
            remark("the fused kernels are not used", str(reason))
        return reason
    _move_to_large_pages(model)
    install(model, decoder, refusal)
    return None


def proven(model: PreTrainedModel) -> tuple[Decoder, str | None]:
    """Prove the kernels on a model. Returns its decoder, and why `generate` must keep Transformers' loop (or None).

    Raises:
        UnsupportedError: the kernels do not compute what the model's own code computes.
    """
    try:
        decoder = read_decoder(model)
        check_supported(decoder)
        return decoder, prove(model, list(kinds_of_layers(model, decoder).values()), install)
    except UnsupportedError:
        raise
    except Exception as error:  # the model's own code, if a part is missing or its config refuses a value
        found = f"{type(error).__name__}: {brief(error)}"
        raise UnsupportedError(f"expected a decoder that can be read and run as a small copy, found {found}") from error


def install(model: PreTrainedModel, decoder: Decoder | None = None, refusal: str | None = None) -> None:
    """Put the kernels into a model, without any proof.

    Args:
        model: the model, in memory, on the CPU, in evaluation mode.
        decoder: the model's decoder; None to find it.
        refusal: why `generate` must keep Transformers' own loop; None if the fused loop may run.
    """
    decoder = find_decoder(model) if decoder is None else decoder
    layers: Any = model.base_model.layers
    rotation, settings = Rotation(), decoder.settings
    generate = Generate(model, KERNELS, refusal)
    forwards = [
        FusedForward(layer, model.config, i, settings, sizes, rotation)
        for i, (layer, sizes) in enumerate(zip(layers, decoder.sizes, strict=True))
    ]
    for layer, forward in zip(layers, forwards, strict=True):
        vars(layer)["forward"] = forward
    vars(model)["generate"] = generate


def _move_to_large_pages(model: PreTrainedModel) -> None:
    """Move the weights to memory pages of 2 MB, which makes reading all weights for each token faster by an eighth.

    All parameters are moved, because any of them may be a view of a mapped file, which would otherwise stay in memory.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return
    weights = [weight for weight in model.parameters() if not weight.is_inference()]
    sizes = [-(-weight.numel() * weight.element_size() // 64) * 64 for weight in weights]
    memory = mmap.mmap(-1, max(sum(sizes), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    at = 0
    for weight, size in zip(weights, sizes, strict=True):
        place = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=at).view(weight.shape)
        weight.data = place.copy_(weight.data)
        at += size
