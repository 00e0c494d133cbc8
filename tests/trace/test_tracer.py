"""The tracer: what it sees, which memory it follows, and what it leaves behind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flashnorm.trace.records import unknown
from flashnorm.trace.tracer import Tracer

META = torch.device("meta")


class Block(nn.Module):
    """A norm, then whatever the test does with it."""

    def __init__(self, use: Callable[["Block", Tensor], object]):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(4), nn.Linear(4, 4, bias=False)
        self.use = use

    def forward(self, x: Tensor) -> object:
        return self.use(self, self.norm(x))


def traced(use: Callable[[Block, Tensor], object]) -> Tracer:
    model = Block(use).to(META)
    tracer = Tracer(model, dict(model.named_parameters()))
    tracer.run(lambda: model(torch.empty(3, 4, device=META)))
    return tracer


def reasons(tracer: Tracer) -> list[str]:
    """Why the norm does not fold."""
    return [escape.reason for escape in tracer.records.gains["norm.weight"].escapes]


def test_a_linear_takes_the_gain() -> None:
    tracer = traced(lambda model, h: model.linear(h))
    (use,) = tracer.records.uses["linear.weight"]
    assert use.axis == 1
    assert use.channels["norm.weight"].tolist() == [0, 1, 2, 3]
    assert tracer.records.gains["norm.weight"].is_norm
    assert not reasons(tracer)


def test_every_use_is_recorded_with_its_place() -> None:
    tracer = traced(lambda model, h: (model.linear(h), model.linear(h.exp())))
    first, second = tracer.records.uses["linear.weight"]
    assert first.axis == 1
    assert second.axis is None
    assert str(second.at.where).startswith("linear (")


def test_an_operator_without_a_rule_stops_the_gain() -> None:
    tracer = traced(lambda model, h: model.linear(torch.special.bessel_j0(h)))
    assert reasons(tracer) == [unknown().reason]


class Output:
    """A result like those of Transformers."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@pytest.mark.parametrize("wrapped", [lambda h: h, lambda h: [{"hidden": h}], Output])
def test_an_output_stops_the_gain(wrapped: Callable[[Tensor], object]) -> None:
    assert reasons(traced(lambda model, h: wrapped(h))) == ["it is an output of the model"]


def test_a_write_into_memory_that_others_share_stops_the_gain() -> None:
    def use(model: Block, h: Tensor) -> Tensor:
        h[:1].mul_(2)
        return model.linear(h)

    assert set(reasons(traced(use))) == {unknown("a write into memory that other tensors share").reason}


@pytest.mark.parametrize("written", [False, True])
def test_memory_that_is_written_to_is_no_longer_zero(written: bool) -> None:
    def use(model: Block, h: Tensor) -> Tensor:
        padding = torch.zeros(3, 4, device=META)
        if written:
            padding[0].fill_(1)
        return model.linear(torch.cat([h, padding]))

    assert bool(traced(use).records.uses["linear.weight"][0].channels) is not written


def test_the_data_of_a_parameter_are_the_parameter() -> None:
    tracer = traced(lambda model, h: F.linear(h, model.linear.weight.data))
    assert "norm.weight" in tracer.records.uses["linear.weight"][0].channels


def test_a_view_that_was_made_unseen_is_a_use_of_the_parameter() -> None:
    model = Block(lambda model, h: F.linear(h, half)).to(META)
    half = model.linear.weight.detach()[:2]
    tracer = Tracer(model, dict(model.named_parameters()))
    tracer.run(lambda: model(torch.empty(3, 4, device=META)))
    assert {use.at.reason for use in tracer.records.uses["linear.weight"]} == {unknown("an untraced view of it").reason}
    assert reasons(tracer)


def test_a_parameter_that_other_code_reads_is_noted() -> None:
    assert traced(lambda model, h: model.linear(h)).records.read_outside == set()
    read = traced(lambda model, h: model.linear(h).to(model.norm.weight.dtype))
    assert read.records.read_outside == {"norm.weight"}


def test_modules_that_receive_the_gain() -> None:
    tracer = traced(lambda model, h: model.linear(h))
    assert tracer.records.gains["norm.weight"].received_by == {"linear"}


def test_a_question_matters_once_a_gain_is_under_way() -> None:
    tracer = traced(lambda model, h: model.linear(h) if bool(torch.ones((), device=META)) else h)
    assert tracer.guessed
    assert tracer.guess_matters


def test_operators_are_counted_with_their_numbers() -> None:
    tracer = traced(lambda model, h: model.linear(h) * 2)
    assert tracer.operators["aten.mul.Tensor [2]"] == 1


def test_the_tracer_leaves_no_hooks_even_if_the_forward_fails() -> None:
    def fails(model: Block, h: Tensor) -> None:
        raise ValueError("no such luck")

    model = Block(fails).to(META)
    tracer = Tracer(model, dict(model.named_parameters()))
    with pytest.raises(ValueError, match="no such luck"):
        tracer.run(lambda: model(torch.empty(3, 4, device=META)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not tracer.records.running
