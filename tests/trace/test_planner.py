"""From a trace to a plan: which norms fold, what is said of the others, and that the model does not notice."""

import functools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

import flashnorm
import tiny
from flashnorm.plan import Linear
from flashnorm.trace.planner import trace
from flashnorm.trace.records import unknown
from flashnorm.trace.solve import NOTHING_READS_IT, names_by_parameter, segments_of


class Block(nn.Module):
    """A norm with two linears behind it, and whatever forward the test gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.RMSNorm(4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)


def planned(block: type[Block]) -> flashnorm.FoldPlan:
    return flashnorm.plan(block(), (torch.zeros(3, 4),))


def test_every_weight_that_reads_the_norm_takes_its_gain() -> None:
    class Both(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.norm(x)
            return self.first(h), self.second(h)

    plan = planned(Both)
    (fold,) = plan.folds
    assert fold.norm == "norm.weight"
    assert fold.offset == 0
    assert fold.linears == (Linear("first.weight", 1), Linear("second.weight", 1))
    assert plan.model_type == "Both"
    assert not plan.kept


def test_a_norm_that_nothing_reads() -> None:
    class Unread(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            return self.first(x)

    assert planned(Unread).kept["norm.weight"] == NOTHING_READS_IT


def test_a_weight_that_is_also_read_without_the_gain() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(self.norm(x)), self.first(x)

    assert planned(Twice).kept["norm.weight"].reason.startswith("first.weight would take it, but ")


def test_a_weight_that_takes_it_in_another_order_elsewhere() -> None:
    class Flipped(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.norm(x)
            return self.first(h), self.first(h.flip(-1))

    assert "not in another use of the same weight" in planned(Flipped).kept["norm.weight"].reason


def test_a_norm_weight_with_another_use() -> None:
    class Penalised(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(self.norm(x)), self.norm.weight.sum()

    assert "another use than as a gain" in planned(Penalised).kept["norm.weight"].reason


def test_a_module_that_received_the_gain_must_have_read_its_parameters() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shown, self.hidden = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, h: Tensor) -> Tensor:
            return self.shown(h)

    class Whole(Block):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.norm(x))

    kept = planned(Whole).kept["norm.weight"]
    assert kept.reason == unknown("part.hidden.weight may read it, but the trace did not reach it").reason
    assert kept.where == "part"


def test_both_names_of_a_tied_weight() -> None:
    class Tied(Block):
        def __init__(self) -> None:
            super().__init__()
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.first(x)))

    assert names_by_parameter(Tied()) == {
        "norm.weight": ["norm.weight"],
        "first.weight": ["first.weight", "second.weight"],
    }
    assert planned(Tied).kept["norm.weight"].reason.startswith("tied: second.weight is first.weight")


@pytest.mark.parametrize(
    ("channels", "segments"),
    [
        ([0, 1, 2, 3], ()),
        ([-1, 0, 1, -1], ((1, 0, 2),)),
        ([2, 3, 0, 1], ((0, 2, 2), (2, 0, 2))),
        ([0, 0, 1, 1], ((0, 0, 1), (1, 0, 2), (3, 1, 1))),
        ([-1, -1, -1, -1], ()),
    ],
)
def test_segments(channels: list[int], segments: tuple[tuple[int, int, int], ...]) -> None:
    assert segments_of(torch.tensor(channels), 4) == segments


def test_the_caller_s_inference_mode_changes_nothing() -> None:
    model = tiny.model(tiny.config("llama"))
    with torch.inference_mode():
        inside = flashnorm.plan(model)
    assert inside == flashnorm.plan(model)


# --- a model that serves at the same time


def state_of_process() -> dict[str, Any]:
    """What is set for all threads."""
    hooks = {name: dict(value) for name, value in vars(torch_module).items() if name.startswith("_global_") and value}
    return {"threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()), "hooks": str(hooks)}


def state_of_model(model: PreTrainedModel) -> dict[str, Any]:
    """All that planning might touch: modes, hooks, attributes and their objects, settings, tensors, forwards."""
    return {
        "modules": [
            (module.training, {name: id(value) for name, value in vars(module).items()}) for module in model.modules()
        ],
        "hooks": [
            {name: list(value) for name, value in vars(module).items() if name.endswith("_hooks")}
            for module in model.modules()
        ],
        "settings": [getattr(model.config, f"_{part}_implementation", None) for part in ("attn", "experts")],
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "tensors": [(id(tensor), tensor.device, tensor._version) for tensor in (*model.parameters(), *model.buffers())],
    }


@pytest.fixture
def others_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_serves_meanwhile_does_not_notice(
    monkeypatch: pytest.MonkeyPatch, others_thread: ThreadPoolExecutor, training: bool
) -> None:
    """Another thread uses the model and looks at it each time that the planner runs any linear of its copy."""
    model = tiny.model(tiny.config("qwen3")).train(training)
    calls: list[str] = []
    model.get_submodule("lm_head").register_forward_hook(lambda *_: calls.append("the model's own hook"))
    linears = {id(module) for module in model.modules() if isinstance(module, nn.Linear)}
    original = nn.Linear.forward

    def look() -> dict[str, Any]:
        with torch.no_grad():
            logits = model(tiny.ids()).logits
        return {**state_of_process(), **state_of_model(model), "logits": logits.tolist()}

    before = others_thread.submit(look).result()
    looks: list[bool] = []

    @functools.wraps(original)
    def forward(self: nn.Linear, *args: Any, **kwargs: Any) -> Tensor:
        if id(self) not in linears:
            looks.append(others_thread.submit(look).result(timeout=120) == before)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    assert flashnorm.plan(model).folds
    assert len(looks) >= 15  # two layers of seven linears, and the head
    assert all(looks)
    assert before["settings"][0] == "sdpa"  # the planner traces plain operators instead
    assert look() == before
    assert set(calls) == {"the model's own hook"}


def test_a_model_that_holds_a_lock_can_be_planned() -> None:
    model = tiny.model(tiny.config("llama"))
    expected = flashnorm.plan(model)
    vars(model)["busy"] = threading.Lock()
    assert flashnorm.plan(model) == expected


def test_a_trace_notes_what_it_found_in_the_copy_by_the_model_s_names() -> None:
    model = tiny.model(tiny.config("llama"))
    records = trace(model).records
    assert {*records.uses, *records.gains} <= dict(model.named_parameters()).keys()
    assert not any(tensor.is_meta for tensor in model.parameters())
