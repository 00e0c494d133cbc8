"""`flashnorm.optimize`: a Transformers model that runs on the fused kernels; `status.py` tells what of it does.

* Its decoder layers use the kernels inside Transformers' own forward (`layers.py`), whatever is asked of them.
* `generate`, where it is one token after the other, is a loop over all layers at once (`generate.py`).
* What is put into a model is proven first, on that model and with the versions that are installed (`structure.py`,
  `proof.py`), and asks before each use whether the model still is what was proven (`guard.py`).
"""

import mmap
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from flashnorm.errors import brief
from flashnorm.runtime.fused import check_supported
from flashnorm.runtime.generate import Generate
from flashnorm.runtime.guard import Substitute, remark
from flashnorm.runtime.layers import FusedForward, Rotation
from flashnorm.runtime.proof import DifferentError, prove
from flashnorm.runtime.structure import Decoder, UnsupportedError, find_decoder, kinds_of_layers, read_decoder


def optimize(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model run on the fused kernels, where they apply; otherwise it stays as it is, with a warning.

    A layer of each kind is first run next to the formula that the kernels implement, and a small copy of the model in
    all the ways in which people run it; each must agree. Weights stay the model's parameters, and are moved once into
    memory of large pages. Folded and unfolded models are equally fast: the kernels apply a gain that is left while they
    read the activations.

    Args:
        model: in memory, on the CPU, with float32, bfloat16 or float16 weights. It is put into evaluation mode.

    Returns:
        The same model.
    """
    if reason := optimize_if_supported(model):
        warnings.warn(f"flashnorm.optimize leaves {type(model).__name__} as it is: {reason}", stacklevel=2)
    return model


def optimize_if_supported(model: PreTrainedModel) -> str | None:
    """`optimize` without a warning: why the model is left as it is, or None if it is not."""
    model.eval()
    restore(model)
    try:
        decoder, refusal = proven(model)
    except UnsupportedError as reason:
        if isinstance(reason, DifferentError):
            remark("the fused kernels are not used", str(reason))
        return str(reason)
    _move_to_large_pages(model)
    install(model, decoder, refusal)
    return None


def proven(model: PreTrainedModel) -> tuple[Decoder, str | None]:
    """A model's decoder, and why its `generate` keeps Transformers' loop, if it does.

    Raises:
        UnsupportedError: the kernels do not compute what the model's own code computes.
    """
    try:
        decoder = read_decoder(model)
        check_supported(decoder)
        return decoder, prove(model, list(kinds_of_layers(model, decoder).values()), install)
    except UnsupportedError:
        raise
    except Exception as error:  # what others' code raises where a part is missing or a config refuses
        found = f"{type(error).__name__}: {brief(error)}"
        raise UnsupportedError(f"expected a decoder that can be read and run as a small copy, found {found}") from error


def install(model: PreTrainedModel, decoder: Decoder | None = None, refusal: str | None = None) -> None:
    """Put the kernels into a model, without any proof.

    Args:
        model: in memory, on the CPU, in evaluation mode.
        decoder: as it was found in the model, if it was.
        refusal: why its `generate` keeps Transformers' own loop; None if it does not.
    """
    decoder = find_decoder(model) if decoder is None else decoder
    layers: Any = model.base_model.layers
    rotation, settings, sizes = Rotation(), decoder.settings, decoder.sizes
    generate = Generate(model, refusal)
    forwards = [FusedForward(layer, model.config, i, settings, sizes, rotation) for i, layer in enumerate(layers)]
    for layer, forward in zip(layers, forwards, strict=True):
        vars(layer)["forward"] = forward
    vars(model)["generate"] = generate


def restore(model: PreTrainedModel) -> None:
    """Take out what `install` has put in."""
    for module in model.modules():
        for name in ("forward", "generate"):
            if isinstance(vars(module).get(name), Substitute):
                del vars(module)[name]


def _move_to_large_pages(model: PreTrainedModel) -> None:
    """Reading all weights once a token is faster by an eighth where one page of memory holds 2 MB of them.

    All of them move, as each may be a view of a mapped file, which would stay in memory for it.
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
