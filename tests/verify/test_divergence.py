"""The measures of how far two runs are apart, against their definitions."""

import math

import pytest
import torch

from flashnorm.verify.divergence import (
    agreement,
    differences,
    farthest,
    kl_divergences,
    perplexity,
    relative_error,
    sensitivity,
    standard_error,
    typical_kl,
)


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(20, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(reference: torch.Tensor, run: torch.Tensor) -> float:
    return float(kl_divergences(reference, run).mean())


def test_kl_is_the_definition() -> None:
    p, q = (torch.distributions.Categorical(logits=logits(seed)) for seed in (1, 2))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(kl_divergences(logits(1), logits(2)), expected, rtol=1e-12, atol=0)


def test_kl_of_equal_runs_is_zero_and_shifts_do_not_count() -> None:
    assert kl(logits(1), logits(1)) == 0
    assert kl(logits(1), logits(1) + 5) < 1e-30


def test_tiny_kl_is_its_second_order_term() -> None:
    """Where the usual formula is all cancellation: half the variance of the difference, under the reference."""
    reference, step = logits(1), 1e-9 * logits(2)
    p = reference.softmax(-1)
    variance = (p * (step - (p * step).sum(-1, keepdim=True)).square()).sum(-1).mean()
    assert kl(reference, reference + step) == pytest.approx(float(variance) / 2, rel=1e-6)


def test_kl_with_masked_vocabulary() -> None:
    reference, run = logits(1), logits(2)
    short = kl(reference[:, :40], run[:, :40])
    reference[:, 40:] = run[:, 40:] = -math.inf
    assert kl(reference, run) == pytest.approx(short, rel=1e-12)


def test_kl_far_apart_is_finite() -> None:
    reference, run = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, -2000.0]], dtype=torch.float64)
    assert kl(reference, run) == pytest.approx(1000 - math.log(2))
    assert kl(run, reference) == pytest.approx(math.log(2))


def test_nan_is_not_hidden() -> None:
    broken = logits(1)
    broken[3, 4] = math.nan
    assert math.isnan(kl(logits(1), broken))
    assert math.isnan(differences(logits(1), broken)[0])


def test_differences_agreement_perplexity() -> None:
    a = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    assert differences(a, b) == (4.0, 2.0)
    assert agreement(a, b) == 0.5
    uniform = torch.zeros(10, 7)
    assert perplexity(uniform, torch.arange(10) % 7) == pytest.approx(7)
    sure = torch.full((3, 4), -100.0)
    sure[0, 2] = sure[1, 1] = 0.0
    assert perplexity(sure, torch.tensor([0, 2, 1])) == pytest.approx(1)


def test_sensitivity_is_what_relative_noise_does_to_kl() -> None:
    reference = logits(1)
    noise = torch.randn(100, *reference.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kls = [kl(reference, reference * (1 + 1e-4 * sample)) for sample in noise]
    assert sum(kls) / len(kls) == pytest.approx(1e-8 / 2 * sensitivity(reference), rel=0.05)


def test_standard_error_is_the_spread_of_means() -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.rand(2000, 50, generator=generator, dtype=torch.float64).square() for _ in range(2))
    means = (a - 3 * b).mean(-1)
    errors = [standard_error(ours, theirs, 3.0) for ours, theirs in zip(a.tolist(), b.tolist(), strict=True)]
    assert sum(errors) / len(errors) == pytest.approx(float(means.std()), rel=0.05)
    assert standard_error([1.0, 2.0], [1.0, 2.0], 1.0) == 0
    assert math.isnan(standard_error([1.0, math.nan], [1.0, 2.0], 1.0))


def test_a_typical_token_is_not_the_one_that_makes_the_mean() -> None:
    assert typical_kl([1e-4, 1e-2], 0) == pytest.approx(1e-3)
    assert typical_kl([1e-4] * 99 + [1.0], 0) == pytest.approx(1e-4 * 100**0.02)
    assert typical_kl([0.0, 1e-20, 1e-4], 1e-8) == pytest.approx(1e-20 ** (1 / 3))
    assert typical_kl([0.0], 0) == 0
    assert math.isnan(typical_kl([1.0, math.nan], 1.0))


def test_relative_error() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 10.0]])
    run = torch.tensor([[3.0, 5.0], [0.0, 0.0], [0.0, 10.0]])
    assert relative_error(reference, run) == pytest.approx(0.2 / 3, rel=1e-12)
    assert math.isnan(relative_error(reference, run * math.nan))


def test_farthest_logits_come_first_one_for_each_token() -> None:
    reference = torch.zeros(3, 4)
    run = reference.clone()
    run[0, 1], run[0, 2], run[2, 3] = 1.0, -2.0, 5.0
    assert farthest(reference, run, 2) == [(2, 3), (0, 2)]
    run[1, 1] = math.nan
    assert farthest(reference, run, 5) == [(1, 1), (2, 3), (0, 2)]
