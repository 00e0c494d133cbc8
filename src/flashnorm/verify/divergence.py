"""How far the predictions of two runs are apart: small pure functions on logits, in float64.

`reference` is the reference run, the source in float64.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# A mean over fewer vectors says little.
_FEWEST_VECTORS = 16


def kl_divergences(reference: Tensor, run: Tensor) -> Tensor:
    """Kullback-Leibler divergence `KL(reference || run)` of each token, in nats; NaN if a logit is NaN.

    It is summed as `q - p - p log(q/p)`, whose terms are never negative. The terms of the plain `p log(p/q)` cancel,
    which leaves an error of about 1e-16, while two float32 runs are only about 1e-12 apart.

    Args:
        reference, run: logits, `[tokens, vocabulary]`, any floating dtype.

    Returns:
        `[tokens]`, float64.
    """
    sums = []
    for p_logits, q_logits in zip(reference, run, strict=True):  # a token at a time: the vocabulary is large
        log_p, log_q = (logits.double().log_softmax(-1) for logits in (p_logits, q_logits))
        p, q, step = log_p.exp(), log_q.exp(), log_q - log_p
        terms = torch.where(step < 1, p * (torch.expm1(step) - step), q - p - p * step)
        sums.append(torch.where(log_p == -torch.inf, q, terms).sum())
    return torch.stack(sums)


def differences(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest and the root mean square difference of two runs' logits, `[tokens, vocabulary]` each."""
    rows = [(x.double() - y.double()).abs() for x, y in zip(a, b, strict=True)]
    return float(torch.stack([row.max() for row in rows]).max()), math.sqrt(
        float(torch.stack([row.square().mean() for row in rows]).mean())
    )


def relative_error(reference: Tensor, run: Tensor) -> float:
    """The norm of the error of a token's vector relative to the norm of the vector, averaged over tokens.

    Args:
        reference, run: `[tokens, hidden size]`.
    """
    reference, run = reference.double(), run.double()
    error, length = (run - reference).norm(dim=-1), reference.norm(dim=-1)
    return float(torch.where(error == 0, 0.0, error / length).mean())


def vector_errors(reference: Tensor, run: Tensor) -> Tensor:
    """The length of the error of each vector, relative to the root mean square length of the reference run's vectors.

    A reference run of fewer than 16 vectors is taken number by number, for a mean over something. Infinity and NaN must
    be the same in both runs; where they are not, the error is infinite.

    Args:
        reference, run: `[vectors, channels]`.

    Returns:
        `[vectors]` or `[vectors * channels]`, float64.
    """
    if reference.shape != run.shape:
        return torch.tensor([math.inf])
    reference, run = reference.double(), run.double()
    if len(reference) < _FEWEST_VECTORS:
        reference, run = reference.reshape(-1, 1), run.reshape(-1, 1)
    finite = reference.isfinite()
    same = finite == run.isfinite()
    same &= finite | (reference.isnan() & run.isnan()) | (reference == run)
    error = torch.where(finite, run - reference, 0.0).norm(dim=-1)
    length = torch.where(finite, reference, 0.0).square().sum(-1).mean().sqrt()
    relative = torch.where(error == 0, 0.0, error / length)
    return torch.where(same.all(-1), relative, math.inf)


def farthest(reference: Tensor, run: Tensor, count: int) -> list[tuple[int, int]]:
    """Where a run's logits are farthest from the reference: `(token, entry of the vocabulary)`, the farthest first.

    Args:
        reference, run: logits, `[tokens, vocabulary]`.
        count: how many to return at most; each token gives at most one.
    """
    largest = [
        (x.double() - y.double()).abs().nan_to_num(torch.inf).max(-1) for x, y in zip(reference, run, strict=True)
    ]
    order = sorted(range(len(largest)), key=lambda token: -float(largest[token].values))
    return [(token, int(largest[token].indices)) for token in order[:count]]


def sensitivity(logits: Tensor) -> float:
    """How strongly errors of the logits change the KL: `sum p (1 - p) z^2` over the vocabulary, averaged over tokens.

    If every logit `z` has an independent random relative error of root mean square `u`, the KL divergence is, to second
    order, `u ** 2 / 2` times this number.

    Args:
        logits: `[tokens, vocabulary]`.
    """
    sums = []
    for row in logits:
        p, z = row.double().softmax(-1), torch.where(row == -torch.inf, 0.0, row.double())
        sums.append((p * (1 - p) * z.square()).sum())
    return float(torch.stack(sums).mean())


def standard_error(a: Sequence[float], b: Sequence[float], ratio: float) -> float:
    """The standard error of the mean of `a - ratio * b` over tokens.

    Args:
        a, b: one number for each of the same tokens.
        ratio: the factor of `b`.
    """
    difference = torch.tensor(a, dtype=torch.float64) - ratio * torch.tensor(b, dtype=torch.float64)
    return float(difference.std(correction=0)) / math.sqrt(len(difference))


def typical_kl(by_token: Sequence[float], floor: float) -> float:
    """The geometric mean over tokens, where numbers below `floor` count as `floor`. NaN if a number is NaN."""
    return float(torch.tensor(by_token, dtype=torch.float64).clamp_min(floor).log().mean().exp())


def agreement(a: Tensor, b: Tensor) -> float:
    """The share of tokens after which both runs predict the same next token."""
    return float((a.argmax(-1) == b.argmax(-1)).double().mean())


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    """`exp` of the mean cross entropy of each token given those before it.

    Args:
        logits: `[tokens, vocabulary]`.
        tokens: `[tokens]`, the text that the logits were computed from.
    """
    losses = [cross_entropy(row.double(), token) for row, token in zip(logits[:-1], tokens[1:], strict=True)]
    return float(torch.stack(losses).mean().exp())
