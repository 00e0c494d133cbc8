"""Sums, means, pooling: over tokens, the gain comes out again; over its channels, it cannot."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from traced import CHANNELS, TOKENS, traced

from flashnorm.trace.rules.reasons import MIXES

CHANNEL = [0, 1, 2, 3]

# What runs along dimension 0 of two -> the operator.
ALONG: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.sum": lambda x: x.sum(0),
    "aten.mean": lambda x: x.mean(-2, keepdim=True),
    "aten.cumsum": lambda x: x.cumsum(0),
    "aten.avg_pool2d": lambda x: F.avg_pool2d(x.T[None, :, :, None], (2, 1))[0, :, :, 0].T,
    "aten.upsample_linear1d": lambda x: F.interpolate(x.T[None], size=5, mode="linear")[0].T,
    "aten.upsample_nearest2d": lambda x: F.interpolate(x.T[None, :, :, None], size=(5, 1))[0, :, :, 0].T,
}


@pytest.mark.parametrize("operator", ALONG)
def test_over_tokens_the_gain_comes_out(operator: str) -> None:
    found = traced(lambda inputs: ALONG[operator](inputs.h))
    assert not found.escapes()
    assert found.value.gains["g"].reshape(-1, CHANNELS).unique(dim=0).tolist() == [CHANNEL]


@pytest.mark.parametrize("operator", ALONG)
def test_over_channels_it_is_mixed(operator: str) -> None:
    found = traced(lambda inputs: ALONG[operator](inputs.h.T))
    assert found.escapes() == [(MIXES, operator)]


def test_pooling_without_a_batch_is_over_the_last_dimensions() -> None:
    found = traced(lambda inputs: F.avg_pool2d(inputs.h.T[:, :, None], (TOKENS, 1)))
    assert found.channels() == [[[0]], [[1]], [[2]], [[3]]]


def test_over_everything() -> None:
    assert traced(lambda inputs: inputs.h.sum()).escapes() == [(MIXES, "aten.sum")]
    found = traced(lambda inputs: inputs.h[:, 2].sum())
    assert found.channels() == 2


def test_a_mean_of_squares_is_no_statistic_yet() -> None:
    assert not traced(lambda inputs: inputs.x.square().mean(-1)).value.statistic
    assert traced(lambda inputs: torch.rsqrt(inputs.x).mean(-1)).value.statistic


def test_a_sum_of_a_parameter_is_another_use() -> None:
    found = traced(lambda inputs: inputs.w.sum(), w=(CHANNELS,))
    assert [use.at.operator for use in found.records.uses["w"]] == ["aten.sum"]
