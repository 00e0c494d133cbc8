"""The tracer's rules on random networks: what folds leaves the output as it was; what does not fold cannot."""

import copy

import pytest
import torch
from generated import BATCH, OPERATIONS, TOKENS, VOCABULARY, Network, Step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashnorm
from flashnorm.errors import InputError
from flashnorm.models.in_memory import fold_
from flashnorm.plan import Kind
from flashnorm.trace.planner import trace
from flashnorm.trace.solve import NOTHING_READS_IT

NORMS = [name for name in OPERATIONS if "norm" in name]
WEIGHTS = [name for name in OPERATIONS if "linear" in name or name in ("gated", "convolution", "output")]

# Mostly norms and linears, so that most programs have something to fold.
operations = st.one_of(st.sampled_from(NORMS), st.sampled_from(WEIGHTS), st.sampled_from(list(OPERATIONS)))
# Inputs are counted from the end, so that small numbers make chains.
steps = st.builds(Step, operations, st.integers(-3, -1), st.integers(-4, -1), st.integers(0, 2))
networks = st.builds(Network, st.lists(steps, min_size=2, max_size=8), st.booleans(), st.integers(0, 2**16))

IDS = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % VOCABULARY


def run(network: Network) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return network(IDS)


def difference(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(networks)
def test_what_folds_leaves_the_output_unchanged(network: Network) -> None:
    before = run(network)
    try:
        folded = fold_(copy.deepcopy(network), (IDS,))
    except InputError:
        assert not flashnorm.plan(network, (IDS,)).folds
        return
    assert difference(run(folded), before) <= 1e-12 * network.scale


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(networks, st.integers(0, 2**16))
def test_what_is_kept_cannot_be_folded(network: Network, seed: int) -> None:
    """Rescaling the gain, and all that reads it inversely, is what folding does. Here it must change the output."""
    before = run(network)
    plan, records = flashnorm.plan(network, (IDS,)), trace(network, (IDS,)).records
    for name, kept in plan.kept.items():
        if kept.kind is Kind.UNKNOWN:
            continue
        changed = copy.deepcopy(network)
        gain = changed.get_parameter(name)
        generator = torch.Generator().manual_seed(seed)
        factor = 1.5 + torch.rand(gain.shape, generator=generator, dtype=torch.float64)
        offset = min(records.gains[name].offsets)
        with torch.no_grad():
            gain.copy_((gain + offset) * factor - offset)
            for linear, uses in records.uses.items():
                for use in uses[:1]:
                    if name in use.channels:
                        channels = use.channels[name]
                        inverse = torch.where(channels < 0, 1.0, 1.0 / factor.flatten()[channels])
                        weight = changed.get_parameter(linear)
                        weight.mul_(inverse.view([-1 if dim == use.axis else 1 for dim in range(weight.dim())]))
        if kept == NOTHING_READS_IT:
            assert difference(run(changed), before) == 0
        else:
            assert difference(run(changed), before) > 1e-9 * network.scale, (name, kept)
