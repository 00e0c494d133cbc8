"""Numbers beside meta tensors: what is certain, what is guessed, and when either is forgotten."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import flashnorm
from flashnorm.trace.inputs import ListsOfItems, MixedDevices
from flashnorm.trace.tracer import Tracer

META = torch.device("meta")


@pytest.fixture
def asked() -> list[str]:
    """Grows by one for every question whose answer depends on a guess."""
    return []


@pytest.fixture
def guessing(asked: list[str]) -> Iterator[None]:
    """Comparisons are taken to be true."""
    with MixedDevices(True, lambda: asked.append("asked"), {}):
        yield


def is_known(tensor: Tensor) -> bool:
    try:
        tensor.tolist()
    except RuntimeError:
        return False
    return True


def unknown(*shape: int) -> Tensor:
    return torch.ones(shape, device=META)


@pytest.mark.usefixtures("guessing")
def test_certain_numbers_stay_known_on_the_meta_device(asked: list[str]) -> None:
    sizes = torch.tensor([[1, 2, 3], [1, 4, 5]]).to(META)
    assert sizes.prod(-1).tolist() == [6, 20]
    sizes += 1
    assert (sizes[0] == 2).nonzero().shape == (1, 1)
    assert int(sizes.max()) == 6
    assert not asked


@pytest.mark.usefixtures("guessing")
def test_with_what_is_not_known_nothing_is_known() -> None:
    result = torch.ones(2) + unknown(2)
    assert result.is_meta
    assert not is_known(result)


@pytest.mark.usefixtures("guessing")
def test_what_has_no_numbers_stays_where_it_is_if_the_code_moves_it_to_the_cpu(asked: list[str]) -> None:
    mask = torch.ones(2, dtype=torch.bool)
    moved = unknown(2).bool().to(mask.device)
    assert moved.is_meta
    assert torch.logical_and(mask, moved).is_meta
    assert not is_known(moved)
    assert not asked


def test_a_gain_that_is_moved_to_the_cpu_is_not_lost() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x).to("cpu")
            return self.linear(y), y

    kept = flashnorm.plan(Moves(), example_inputs=(torch.ones(2, 8),)).kept
    assert kept["norm.weight"].reason == "it is an output of the model"


@pytest.mark.usefixtures("guessing")
def test_what_is_overwritten_is_forgotten_under_every_name() -> None:
    sizes = torch.tensor([1, 2]).to(META)
    alias, copy = sizes.view(2, 1), sizes.clone()
    sizes += unknown(2).long()
    assert not is_known(sizes)
    assert not is_known(alias)
    assert is_known(copy)


@pytest.mark.usefixtures("guessing")
def test_a_guess_that_is_written_into_certain_numbers_leaves_nothing_certain() -> None:
    mask = torch.tensor([True, False]).to(META)
    alias = mask.view(2, 1)
    mask &= unknown(2) > 0
    assert not is_known(mask)
    assert not is_known(alias)


@pytest.mark.usefixtures("guessing")
def test_on_the_cpu_nothing_can_be_forgotten() -> None:
    with pytest.raises(NotImplementedError, match="without values"):
        torch.ones(2).add_(unknown(2))


@pytest.mark.parametrize("guess", [True, False])
def test_comparisons_are_guessed_and_that_is_noted(guess: bool) -> None:
    asked: list[bool] = []
    with MixedDevices(guess, lambda: asked.append(guess), {}):
        real = unknown(2, 3) == 0
        assert not asked
        assert real.sum().tolist() == 6 * guess
        assert (real.view(1, 6) & True).tolist() == [[guess] * 6]
    assert len(asked) == 2


@pytest.mark.usefixtures("guessing")
def test_a_guess_that_is_out_of_bounds_leaves_the_result_unknown(asked: list[str]) -> None:
    first = (unknown(2) > 0).long()
    result = torch.tensor([5]).to(META)[first]
    assert result.shape == (2,)
    assert not is_known(result)
    assert not asked


def test_a_guessed_mask_has_as_many_hits_as_the_tracer_says() -> None:
    tracer = Tracer(nn.Module(), {})
    with tracer, MixedDevices(True, tracer.note_guess, {}):
        x = unknown(2, 3)
        assert x[x > 0].shape == (6,)
    assert tracer.guessed


@pytest.mark.usefixtures("guessing")
def test_a_certain_mask_has_its_own_hits(asked: list[str]) -> None:
    assert unknown(2, 3)[torch.tensor([True, False]).to(META)].shape == (1, 3)
    assert not asked


def test_the_tracer_does_not_see_what_is_computed_from_certain_numbers() -> None:
    tracer = Tracer(nn.Module(), {})
    with tracer, MixedDevices(True, tracer.note_guess, {}):
        (torch.tensor([1, 2]).to(META) + 1).tolist()
        assert not any("add" in operator for operator in tracer.operators)
        unknown(2) + 1
        assert any("add" in operator for operator in tracer.operators)


def test_a_tensor_with_a_stand_in_is_never_read() -> None:
    original, blank = torch.ones(2), torch.empty(2, device=META)
    with MixedDevices(True, lambda: None, {original: blank}):
        assert not is_known(original + 1)


class Chooses(nn.Module):
    """Takes another path through its code where some number of an activation is large."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.linear(h) if (x > 0).flatten().tolist()[0] else h


def test_both_paths_of_a_choice_by_numbers_count() -> None:
    plan = flashnorm.plan(Chooses(), (torch.zeros(2, 6),))
    assert plan.kept["norm.weight"].reason == "it is an output of the model"


class LooksAtTheGain(Chooses):
    """Takes its path by the norm's output."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.linear(h) if bool((h > 0).all()) else self.linear(2 * h)


def test_a_choice_by_what_carries_the_gain_stops_it() -> None:
    plan = flashnorm.plan(LooksAtTheGain(), (torch.zeros(2, 6),))
    assert plan.kept["norm.weight"].reason == "it is not linear in the gain"


class HoldsOn(nn.Module):
    """Has a function that reads the original's norm weight, whichever copy of it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(6), nn.Linear(6, 6)
        self.penalty = lambda: self.norm.weight.square().sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(self.norm(x)), self.penalty()


def test_parameters_of_the_original_are_those_of_the_copy() -> None:
    plan = flashnorm.plan(HoldsOn(), (torch.zeros(2, 6),))
    assert "another use than as a gain" in plan.kept["norm.weight"].reason


# --- lists, and sizes that are made from answers


class Routed(nn.Module):
    """A gain whose activation goes to experts, as many tokens to each as a list of the router's counts says."""

    def __init__(self, unequal: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.router = nn.Linear(4, 3, bias=False)
        self.experts = nn.Parameter(torch.ones(3, 4, 4))
        self.unequal = unequal

    def forward(self, x: Tensor) -> Tensor:
        normalised = torch.nn.functional.rms_norm(x, (4,)) * self.gain
        expert = self.router(normalised).argmax(-1, keepdim=True)
        counts = torch.zeros(len(x), 3, dtype=torch.long).scatter(1, expert, 1).sum(0).tolist()
        pieces = normalised.split(counts)
        outputs = [piece @ self.experts[i].T for i, piece in enumerate(pieces)]
        return torch.cat([*outputs, pieces[0]] if self.unequal else outputs)


def test_pieces_whose_sizes_a_list_says_carry_the_gain() -> None:
    (fold,) = flashnorm.plan(Routed(), example_inputs=(torch.ones(7, 4),)).folds
    assert [linear.name for linear in fold.linears] == ["router.weight", "experts"]


def test_a_piece_that_is_an_output_stops_the_gain() -> None:
    plan = flashnorm.plan(Routed(unequal=True), example_inputs=(torch.ones(7, 4),))
    assert not plan.folds
    assert plan.kept["gain"].reason == "it is an output of the model"


def test_a_list_of_certain_numbers_is_no_question(asked: list[str], guessing: None) -> None:
    with ListsOfItems():
        assert torch.tensor([[1, 2], [3, 4]]).to(META).tolist() == [[1, 2], [3, 4]]
        with pytest.raises(RuntimeError):
            unknown(2).tolist()  # without a tracer nobody answers
    assert not asked
