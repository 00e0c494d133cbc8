"""Compares two causal language models on a text: their predictions in float64 and in their dtype, and greedy text.

`verify_outputs` says which criteria must hold, and why. One model is in memory at a time. The source in float64 is the
reference run.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashnorm.models.load import Loading
from flashnorm.verify.as_loaded import AsLoaded, fits, loaded_continuation, loaded_outputs
from flashnorm.verify.divergence import farthest, perplexity, sensitivity
from flashnorm.verify.dropped import dropped_eps
from flashnorm.verify.measures import (
    MAX_RATIO,
    NEAR_TIE,
    Criterion,
    Greedy,
    Run,
    compare_greedy,
    rounding_noise,
    same_text,
    within,
)
from flashnorm.verify.outputs_report import LogitDifference, OutputsReport
from flashnorm.verify.runs import Loader, Outputs, Runner, converted_loader

LARGEST_DIFFERENCES = 10


def compare_on_text(
    run: Runner,
    load_source: Loader,
    loading: Loading,
    dtype: torch.dtype,
    tokens: Tensor,
    prompt: Tensor,
    steps: int,
    tokenizer: Any,
    stage: Callable[[str], object],
) -> OutputsReport:
    """Run both models on a text, and let both continue a prompt.

    Args:
        run: runs a model.
        load_source: loads the source.
        loading: loads the converted model.
        dtype: the checkpoint's dtype.
        tokens: the text, `[tokens]`.
        prompt: the text to continue, `[tokens]`.
        steps: the length of the continuations.
        tokenizer: the model's tokenizer, to show texts; None if there is none.
        stage: called with a few words before each run.
    """
    load_converted, short = converted_loader(loading), str(dtype).removeprefix("torch.")
    blank = loading.planned.model

    def comparable(found: Outputs) -> Outputs:
        # The residual stream of a centred model lacks the mean, which its norms do not see.
        return found.without_means() if loading.centred.norms else found

    def outputs(load: Loader, dtype: torch.dtype, *, exact: bool = False) -> Outputs:
        return comparable(run.outputs(load, dtype, tokens, exact=exact))

    stage("the source in float64, as the reference")
    reference = outputs(load_source, torch.float64, exact=True)
    stage(f"the source in {short}")
    source_outputs = outputs(load_source, dtype)
    source = Run.of(reference, source_outputs, tokens)
    stage(f"the converted model in {short}")
    converted_outputs = outputs(load_converted, dtype)
    converted = Run.of(reference, converted_outputs, tokens)
    logits = _farthest_logits(reference.logits, source_outputs.logits, converted_outputs.logits, tokens, tokenizer)
    as_loaded = AsLoaded("not run")
    if fits(blank, dtype, 8 * reference.logits.numel()):
        stage(f"the converted model as flashnorm.load gives it, in {short}")
        loaded, path = loaded_outputs(loading, dtype, tokens)
        as_loaded = AsLoaded(path, Run.of(reference, comparable(loaded), tokens))
        del loaded
    del source_outputs, converted_outputs
    dropped = dropped_eps(run, loading, tokens)
    stage("the converted model in float64")
    rounding = Run.of(reference, outputs(load_converted, torch.float64, exact=True), tokens)
    oracle_perplexity = perplexity(reference.logits, tokens)
    floor = rounding_noise(dtype) ** 2 / 2 * sensitivity(reference.logits)
    del reference
    stage("the source's greedy text, in float32")
    expected, expected_logits = run.continuation(load_source, prompt, steps)

    def compared(found: Tensor) -> Greedy:
        return compare_greedy(expected, found, expected_logits, NEAR_TIE * source.rms_difference, tokenizer)

    stage("the converted model's")
    greedy = compared(run.continuation(load_converted, prompt, steps)[0])
    if fits(blank, torch.float32, 0):
        stage("the converted model's, as flashnorm.load gives it")
        as_loaded = replace(as_loaded, greedy=compared(loaded_continuation(loading, prompt, steps)))
    return OutputsReport(
        dtype=short,
        streamed=run.streamed,
        tokens=len(tokens),
        oracle_perplexity=oracle_perplexity,
        source=source,
        converted=converted,
        rounding=rounding,
        logits=logits,
        greedy=greedy,
        as_loaded=as_loaded,
        dropped=dropped,
        criteria=(
            *_criteria(short, source, converted, rounding, greedy, floor),
            *as_loaded.criteria(short, source, floor),
        ),
    )


def _criteria(
    dtype: str, source: Run, converted: Run, rounding: Run, greedy: Greedy, floor: float
) -> tuple[Criterion, ...]:
    """Criteria 1 to 3 of `verify_outputs`, for the model's own code."""
    no_farther = f"in float64, the converted one is no farther from the reference than {dtype} takes the source"
    return (
        within(no_farther, rounding, source, 1.0, floor),
        within(
            f"in {dtype}, it is at most {MAX_RATIO:g} times as far as the source", converted, source, MAX_RATIO, floor
        ),
        same_text("greedy tokens in float32 agree, or part at a near tie of the source", greedy),
    )


def _farthest_logits(
    reference: Tensor, source: Tensor, converted: Tensor, tokens: Tensor, tokenizer: Any
) -> tuple[LogitDifference, ...]:
    def decoded(ids: Sequence[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(ids)

    return tuple(
        LogitDifference(
            position=position,
            token=entry,
            oracle=float(reference[position, entry]),
            source=float(source[position, entry]),
            converted=float(converted[position, entry]),
            context=decoded(tokens[max(0, position - 7) : position + 1].tolist()),
            token_text=decoded([entry]),
        )
        for position, entry in farthest(reference, converted, LARGEST_DIFFERENCES)
    )
