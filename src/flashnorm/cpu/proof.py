"""Proves that a model on the CPU's kernels computes what its own code computes, as models are used."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from flashnorm.cpu.kernels import native
from flashnorm.decoding.proof import (
    FARTHER,
    SAME,
    STEPS,
    TOKENS,
    DifferentError,
    difference_of_generation,
    error,
    ids,
    in_steps,
    run,
    small_copy,
)
from flashnorm.decoding.structure import choose_all_experts


@torch.no_grad()
def prove(model: Any, indices: Sequence[int], install: Callable[[Any], None]) -> str | None:
    """Run a small copy of a model with its own code and on the kernels.

    Args:
        model: the model, in memory, on the CPU; it is not changed.
        indices: the index of one layer of each kind.
        install: puts the kernels into a model.

    Returns:
        Why `generate` must keep Transformers' own loop; None if the fused loop gives the same.

    Raises:
        DifferentError: a forward fails, differs by more than rounding, or does not reach the kernels.
    """
    own = small_copy(model, indices)
    ours = copy.deepcopy(own, {id(weight): weight for weight in own.parameters()})  # a mixture's layers are large
    install(ours)
    before = native.runs[native.AFTER_ATTENTION]
    expected = {name: run(f"with its own code, {name}", how, own) for name, how in _RUNS.items()}
    found = {name: run(name, how, ours) for name, how in _RUNS.items()}
    if native.runs[native.AFTER_ATTENTION] == before:
        raise DifferentError("expected its layers to reach the kernels, found that their own code runs")
    for name, logits in found.items():
        if not (apart := error(logits, expected[name])) <= SAME:
            raise DifferentError(f"{name}: expected what its own code computes, found logits {apart:.2g} apart")
    refusal = difference_of_generation(own, ours, lambda: native.runs[native.ALL])
    if model.dtype != torch.float32:
        # With few bits, rounding may choose other experts at a near tie: of these two runs, or of the float32 run.
        if choose_all_experts(own) and choose_all_experts(ours):
            install(ours)
            expected = {name: run(f"with its own code, {name}", how, own) for name, how in _RUNS.items()}
        _check_own_dtype(model.dtype, own, ours, expected)
    return refusal


def _at_once(model: Any) -> Tensor:
    return model(input_ids=ids(1), use_cache=False).logits


_RUNS: dict[str, Callable[[Any], Tensor]] = {
    "without a cache": _at_once,
    "a prompt and three steps": lambda model: in_steps(model, 1, DynamicCache(config=model.config)),
    "two sequences, one padded": lambda model: in_steps(model, 2, DynamicCache(config=model.config)),
    "a static cache": lambda model: in_steps(model, 2, StaticCache(config=model.config, max_cache_len=TOKENS + STEPS)),
}


def _check_own_dtype(dtype: torch.dtype, own: Any, ours: Any, expected: dict[str, Tensor]) -> None:
    """Compare runs in the model's own dtype, which has other kernels. Both round, so each is compared with float32.

    Both models are cast to that dtype in place.
    """
    own, ours = own.to(dtype), ours.to(dtype)
    for name, how in _RUNS.items():
        reference = expected[name]
        before = native.runs[native.AFTER_ATTENTION]
        theirs, found = ((run(name, how, one) - reference).norm() / reference.norm() for one in (own, ours))
        if native.runs[native.AFTER_ATTENTION] == before:
            raise DifferentError(f"{name}, in {dtype}: expected its layers to reach the kernels, found its own code")
        if not found <= FARTHER * theirs + torch.finfo(dtype).eps:
            raise DifferentError(
                f"{name}, in {dtype}: expected an error of about {theirs:.2g} as with its own code, found {found:.2g}"
            )
