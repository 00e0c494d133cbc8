"""Which operators read a norm's output: what is proven before a norm is deferred. Needs no vLLM."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import flashnorm
from flashnorm.integrations.vllm import fused

NORM, OTHER = nn.Identity(), nn.Identity()
FIRST, SECOND = nn.Linear(8, 4), nn.Linear(8, 4)

# A forward is handed `norm(x)`, `other(x)` and `linear(layer, x)`, as a traced model calls them.
Call = Callable[..., Tensor]


def plain(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    return linear(FIRST, norm(x).view(-1, 8)) + linear(SECOND, other(x))


def two_layers(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    read = norm(x)
    return linear(FIRST, read) + linear(SECOND, read)


def gated(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    read = norm(x)
    return linear(FIRST, read) * read.sigmoid()[:, :4]


def a_part(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    return linear(FIRST, norm(torch.cat([x, x], 1))[:, :8])


def half_of_the_tokens(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    return linear(FIRST, norm(x)[:2])


def changed(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    return linear(FIRST, norm(x).mul_(2))


def returned(x: Tensor, norm: Call, other: Call, linear: Call) -> tuple[Tensor, Tensor]:
    read = norm(x)
    return linear(FIRST, read), read


def shared_layer(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    return linear(FIRST, norm(x)) + linear(FIRST, x)


def shared_by_norms(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    return linear(FIRST, norm(x)) + linear(FIRST, other(x))


def unread(x: Tensor, norm: Call, other: Call, linear: Call) -> Tensor:
    norm(x)
    return linear(FIRST, x)


@pytest.mark.parametrize(
    ("forward", "word"),
    [
        (plain, None),
        (two_layers, None),
        (gated, "aten.sigmoid.default reads it"),
        (a_part, "a linear layer reads a part of it"),
        (half_of_the_tokens, "a linear layer reads a part of it"),
        (changed, "aten.mul_.Tensor reads it"),
        (returned, "what uses the model's output reads it"),
        (shared_layer, "one of its linear layers reads something else, too"),
        (shared_by_norms, "one of its linear layers reads something else, too"),
        (unread, "no linear layer reads it"),
    ],
)
@torch.no_grad()
def test_readers(forward: Callable[..., object], word: str | None) -> None:
    readers = fused._Readers()
    apply = fused._traced_linear(readers)
    x = torch.randn(4, 8)
    with readers:
        given = forward(
            x,
            lambda y: readers.put(NORM, y * 2),
            lambda y: readers.put(OTHER, y * 3),
            lambda layer, y: apply(layer, y, layer.bias),
        )
        readers.read_elsewhere(given, "what uses the model's output")
    assert readers.problem(NORM) == word
    if word is None:
        assert readers.linears(NORM) == [FIRST, SECOND][: 2 if forward is two_layers else 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_that_differs(dtype: torch.dtype) -> None:
    """The kernels compute what a norm and its linear layer compute, and it shows if the norm does something else."""
    linear = nn.Linear(64, 48, dtype=dtype)

    class Norm(nn.Module):
        def __init__(self, power: float):
            super().__init__()
            self.power, self.variance_epsilon = power, 1e-5

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            return (wide * (wide.square().mean(-1, keepdim=True) + 1e-5) ** self.power).to(x.dtype)

    with torch.no_grad():
        assert fused._differs(Norm(-0.5), linear) is None
        assert "expected the kernels to compute the same" in str(fused._differs(Norm(-0.6), linear))


@pytest.mark.parametrize(("given", "expected"), [({}, False), ({fused.OPTION: True}, True), (None, False)])
def test_asked(given: object, expected: bool) -> None:
    assert fused.asked(SimpleNamespace(additional_config=given)) == expected


def test_an_unclear_answer() -> None:
    with pytest.raises(flashnorm.InputError, match="expected true or false for flashnorm_kernels"):
        fused.asked(SimpleNamespace(additional_config={fused.OPTION: 1}))
