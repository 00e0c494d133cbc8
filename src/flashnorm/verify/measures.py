"""What is measured in a run of a model, and the criteria by which two models count as the same.

All is measured against the reference run, the source in float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashnorm.verify.divergence import (
    agreement,
    differences,
    kl_divergences,
    perplexity,
    relative_error,
    standard_error,
    typical_kl,
)
from flashnorm.verify.runs import Outputs

# Bounds of the criteria, as `verify_outputs` explains them.
MAX_RATIO = 2.0
CHANCE = 3.0  # standard errors
NEAR_TIE = 8.0  # times the root mean square error of a logit in the source's own dtype
FLOAT64_NOISE = 1e-13  # relative difference of float64 logits of one model that are computed in two ways


@dataclass(frozen=True)
class Run:
    """One run over the text, compared with the reference run.

    Attributes:
        kl: mean KL(reference || run) per token, in nats.
        largest_difference, rms_difference: largest and root mean square difference of the logits.
        agreement: share of tokens after which both runs predict the same next token.
        perplexity: perplexity of the run itself.
        kl_by_token: KL(reference || run) at each token, in nats.
        depth: relative errors, averaged over tokens, of the residual stream after the embedding and after each layer
            but the last, and then of the logits. Only that of the logits if the model gives no hidden states.
    """

    kl: float
    largest_difference: float
    rms_difference: float
    agreement: float
    perplexity: float
    kl_by_token: tuple[float, ...] = ()
    depth: tuple[float, ...] = ()

    @staticmethod
    def of(reference: Outputs, run: Outputs, tokens: Tensor) -> "Run":
        """Compare a run with the reference run, both over `tokens`, `[tokens]`."""
        largest, rms = differences(reference.logits, run.logits)
        by_token = kl_divergences(reference.logits, run.logits)
        states = zip((*reference.hidden, reference.logits), (*run.hidden, run.logits), strict=True)
        return Run(
            kl=float(by_token.mean()),
            largest_difference=largest,
            rms_difference=rms,
            agreement=agreement(reference.logits, run.logits),
            perplexity=perplexity(run.logits, tokens),
            kl_by_token=tuple(by_token.tolist()),
            depth=tuple(relative_error(expected, found) for expected, found in states),
        )


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations of one prompt by source and converted model, both in float32.

    Attributes:
        source, converted: token ids of the two continuations.
        identical: how many tokens agree before the first difference.
        gap: at the first difference, the source's logit of its own token minus that of the converted model's token;
            0 if the continuations agree, infinite if they differ in length only.
        tolerance: the largest gap that is within the noise of the checkpoint's dtype.
        source_text, converted_text: the decoded continuations, if there is a tokenizer.
    """

    source: tuple[int, ...]
    converted: tuple[int, ...]
    identical: int
    gap: float
    tolerance: float
    source_text: str | None = None
    converted_text: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the continuations agree, or first differ at a near tie."""
        return self.source == self.converted or self.gap <= self.tolerance


@dataclass(frozen=True)
class Criterion:
    """A condition for the outputs to count as the same: what is required, the measured numbers, whether it holds."""

    asked: str
    found: str
    ok: bool


def within(asked: str, run: Run, source: Run, ratio: float, floor: float) -> Criterion:
    """Whether a run's KL is at most `ratio` times the source's: the mean, allowing for chance, and the typical KL.

    Args:
        asked: what is required, in words.
        run: the run to judge, compared with the reference run.
        source: the source in the checkpoint's dtype, compared with the reference run.
        ratio: how many times the source's KL the run may have.
        floor: the KL that counts as zero.
    """
    limit, chance = max(ratio * source.kl, floor), CHANCE * standard_error(run.kl_by_token, source.kl_by_token, ratio)
    typical, typical_limit = typical_kl(run.kl_by_token, floor), ratio * typical_kl(source.kl_by_token, floor)
    return Criterion(
        asked=asked,
        found=f"KL {run.kl:.3g}, at most {limit:.3g} (+ {chance:.1g} by chance); "
        f"of a typical token {typical:.3g}, at most {typical_limit:.3g}",
        ok=run.kl <= limit + chance and typical <= typical_limit,
    )


def same_text(asked: str, greedy: Greedy) -> Criterion:
    """The criterion that two greedy continuations agree, or first differ at a near tie."""
    if greedy.source == greedy.converted:
        found = f"{len(greedy.source)} of {len(greedy.source)} agree"
    else:
        found = f"{greedy.identical} agree, then a gap of {greedy.gap:.3g} (near tie: at most {greedy.tolerance:.3g})"
    return Criterion(asked, found, greedy.ok)


def compare_greedy(expected: Tensor, found: Tensor, logits: Tensor, tolerance: float, tokenizer: Any) -> Greedy:
    """Compare two greedy continuations, `[steps]` each; `logits` are the source's, `[steps, vocabulary]`."""
    length = min(len(expected), len(found))
    parted = (expected[:length] != found[:length]).nonzero()
    identical, gap = length, 0.0
    if len(parted):
        identical = int(parted[0])
        gap = float(logits[identical, expected[identical]] - logits[identical, found[identical]])
    elif len(expected) != len(found):
        gap = math.inf
    texts = [tokenizer.decode(tokens) if tokenizer is not None else None for tokens in (expected, found)]
    return Greedy(
        source=tuple(expected.tolist()),
        converted=tuple(found.tolist()),
        identical=identical,
        gap=gap,
        tolerance=tolerance,
        source_text=texts[0],
        converted_text=texts[1],
    )


def rounding_noise(dtype: torch.dtype) -> float:
    """The root mean square relative error of rounding to a dtype: `eps / sqrt(12)` over a significand in [1, 2).

    The error relative to the number is divided by the significand `m` as well. The mean of `1 / m ** 2` is 0.54 if the
    logarithm of `m` is evenly distributed, as it is for most data.
    """
    return max(torch.finfo(dtype).eps * math.sqrt(0.54 / 12), FLOAT64_NOISE)
