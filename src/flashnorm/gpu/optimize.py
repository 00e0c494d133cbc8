"""Puts the GPU's kernels behind a model's `generate`; `flashnorm.optimize` calls it for a model on a GPU.

The layers themselves stay Transformers' own, for prompts and for everything that is no `generate` of one sequence.
Proofs and guards are those of the CPU's kernels (`decoding/`), on the device itself.
"""

from typing import Any

from transformers import PreTrainedModel

from flashnorm.decoding.decoder import Decoder, UnsupportedError
from flashnorm.decoding.formula import kinds_of_layers, read_decoder
from flashnorm.decoding.generate import Generate
from flashnorm.decoding.guard import remark, restore
from flashnorm.decoding.proof import DifferentError
from flashnorm.errors import brief
from flashnorm.gpu.decoder import KERNELS, check_supported
from flashnorm.gpu.proof import exact_products, prove


def optimize_if_supported(model: PreTrainedModel) -> UnsupportedError | None:
    """Make `generate` of one sequence run on the kernels; returns why the model is left as it is, or None."""
    model.eval()
    restore(model)
    try:
        proven(model)
    except UnsupportedError as reason:
        if isinstance(reason, DifferentError):
            remark("the fused kernels are not used", str(reason))
        return reason
    install(model)
    return None


def proven(model: PreTrainedModel) -> Decoder:
    """Prove the kernels on a model, and return its decoder.

    Raises:
        UnsupportedError: the kernels do not compute what the model's own code computes.
    """
    try:
        with exact_products():
            decoder = read_decoder(model)
        check_supported(decoder)
        prove(model, decoder, list(kinds_of_layers(model, decoder).values()), install)
        return decoder
    except UnsupportedError:
        raise
    except Exception as error:  # the model's own code, the compiler, or memory that runs out
        found = f"{type(error).__name__}: {brief(error)}"
        raise UnsupportedError(f"expected a decoder that can be read and run as a small copy, found {found}") from error


def install(model: Any) -> None:
    """Put the kernels behind a model's `generate`, without any proof."""
    vars(model)["generate"] = Generate(model, KERNELS)
