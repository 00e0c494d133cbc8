"""Proves that a model on the GPU's kernels computes what its own code computes: on that GPU, with its own kernels."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flashnorm.decoding.decoder import Decoder
from flashnorm.decoding.deferred import inverse_rms
from flashnorm.decoding.proof import (
    FARTHER,
    SAME,
    STEPS,
    DifferentError,
    difference_of_generation,
    error,
    ids,
    run,
    small_copy,
)
from flashnorm.decoding.structure import find_decoder
from flashnorm.gpu import launch
from flashnorm.gpu.decoder import GraphDecoder

# Long enough for attention to be divided into several parts.
_PROMPT = 3 * launch.Attention.BLOCK + 5
_ROWS = 8192  # of the head that are compared at a time


@torch.no_grad()
def prove(model: Any, decoder: Decoder, indices: Sequence[int], install: Callable[[Any], None]) -> None:
    """Run a small copy of a model with its own code and on the kernels, and the whole head.

    Args:
        model: the model, in memory, on the GPU; it is not changed.
        decoder: its decoder.
        indices: the index of one layer of each kind.
        install: puts the kernels into a model.

    Raises:
        DifferentError: a run fails, differs by more than rounding, or does not reach the kernels.
    """
    with exact_products():
        own = small_copy(model, indices)
        ours = copy.deepcopy(own, {id(weight): weight for weight in own.parameters()})
        install(ours)
        if refusal := difference_of_generation(own, ours, lambda: launch.runs["step"], most=1):
            raise DifferentError(refusal)
        expected = run("with its own code", _at_once, own)
        found = run("in steps", _in_steps, ours)
        if not (apart := error(found, expected)) <= SAME:
            raise DifferentError(f"in steps: expected what its own code computes, found logits {apart:.2g} apart")
        _check_own_dtype(model.dtype, own, ours, expected)
        _check_head(model, decoder)


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 that are no TF32, as the comparisons need them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _at_once(model: Any) -> Tensor:
    """The logits of the last tokens of a text, in one forward of the model's own code: `[STEPS, vocabulary]`."""
    return model(input_ids=_text(model), use_cache=False).logits[0, -STEPS:]


def _in_steps(model: Any) -> Tensor:
    """The same logits from the kernels, a token at a time, after a prompt."""
    text = _text(model)[0]
    decoder = GraphDecoder(model, find_decoder(model))
    decoder.start()
    decoder.extend(text[:-STEPS])
    return torch.cat([decoder.step(token[None]) for token in text[-STEPS:]])


def _text(model: Any) -> Tensor:
    return ids(1, min(_PROMPT, model.config.max_position_embeddings - STEPS) + STEPS).to(model.device)


def _check_own_dtype(dtype: torch.dtype, own: Any, ours: Any, expected: Tensor) -> None:
    """Compare runs in the model's own dtype, which has other tiles. Both round, so each is compared with float32.

    Both models are cast to that dtype in place.
    """
    if dtype == torch.float32:
        return
    theirs = (run("with its own code", _at_once, own.to(dtype)) - expected).norm() / expected.norm()
    found = (run("in steps", _in_steps, ours.to(dtype)) - expected).norm() / expected.norm()
    if not found <= FARTHER * theirs + torch.finfo(dtype).eps:
        raise DifferentError(
            f"in {dtype}: expected an error of about {theirs:.2g} as with its own code, found {found:.2g}"
        )


def _check_head(model: Any, decoder: Decoder) -> None:
    """Compare the whole head, which is too large for the small copy, with the formula in float32."""
    ours = GraphDecoder(model, decoder)
    x = torch.randn(decoder.hidden, generator=torch.Generator().manual_seed(0)).to(decoder.head.device)
    found = ours.logits_of(x)
    read = x * inverse_rms(x, decoder.settings.eps)
    if decoder.final_gain is not None:
        read = read * (decoder.final_gain.float() + decoder.settings.gain_offset)
    expected = torch.cat([rows.float() @ read for rows in decoder.head.split(_ROWS)]) * decoder.logit_scale
    if not (apart := error(found, expected)) <= SAME:
        raise DifferentError(f"the head: expected what its own code computes, found logits {apart:.2g} apart")
