"""A copy of a model on the meta device: its state is its own."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.trace.meta_copy import meta_copy


class Parts(nn.Module):
    """Has all kinds of state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.also_first = self.first
        self.register_buffer("steps", torch.arange(3))
        self.table = torch.arange(4)
        self.settings: dict[str, Any] = {"eager": False}
        self.lock = threading.Lock()
        self.calls: list[str] = []
        self.hook = self.first.register_forward_hook(self.note)

    def note(self, *_: object) -> None:
        self.calls.append("hook")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_parameters_and_buffers_have_no_values() -> None:
    model = Parts()
    copy, stand_ins = meta_copy(model)
    assert all(tensor.is_meta for tensor in (*copy.parameters(), *copy.buffers()))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {id(tensor) for tensor in stand_ins} == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert all(stand_ins[tensor] is copy.get_parameter(name) for name, tensor in model.named_parameters())
    assert copy.get_buffer("steps").dtype == torch.long


def test_single_whole_numbers_that_no_checkpoint_stores_have_theirs() -> None:
    model = Parts()
    model.register_buffer("stride", torch.tensor(2), persistent=False)
    model.register_buffer("count", torch.tensor(2))
    model.register_buffer("scale", torch.tensor(2.0), persistent=False)
    copy, stand_ins = meta_copy(model)
    copy.stride += 1
    assert (int(model.stride), int(copy.stride)) == (2, 3)
    assert copy.count.is_meta
    assert copy.scale.is_meta
    assert stand_ins[model.stride] is copy.stride


def test_other_tensors_have_theirs() -> None:
    model = Parts()
    copy, _ = meta_copy(model)
    copy.table += 1
    assert model.table.tolist() == [0, 1, 2, 3]
    assert copy.table.tolist() == [1, 2, 3, 4]


def test_what_is_shared_stays_shared() -> None:
    copy, _ = meta_copy(Parts())
    assert copy.second.weight is copy.first.weight
    assert copy.also_first is copy.first


def test_what_is_done_to_the_copy_is_not_done_to_the_model() -> None:
    model = Parts()
    copy, _ = meta_copy(model)
    copy.eval()
    copy.settings["eager"] = True
    copy.first.register_forward_pre_hook(lambda *_: None)
    del copy.second
    assert all(module.training for module in model.modules())
    assert model.settings == {"eager": False}
    assert not model.first._forward_pre_hooks
    assert isinstance(model.second, nn.Linear)


def test_the_copy_s_hooks_write_into_the_copy() -> None:
    model = Parts()
    copy, _ = meta_copy(model)
    copy(torch.empty(1, 2, device="meta"))
    assert copy.calls == ["hook"]
    assert not model.calls


def test_what_refuses_a_copy_is_shared() -> None:
    model = Parts()
    copy, _ = meta_copy(model)
    assert copy.lock is model.lock
    assert type(copy) is Parts
