"""The plugin's large frame below the model: no call that each layer makes maps a chunk for Python's frames."""

import sys

import pytest

import stack
from flashnorm.integrations.vllm import plugin

LAYERS = 200


def layer() -> None:
    """A call with a frame of some size."""


layer.__code__ = layer.__code__.replace(co_stacksize=32)


def execute_model(layers: int) -> int:
    """How many page faults a loop over some layers has."""
    before = stack.faults()
    for _ in range(layers):
        layer()
    return stack.faults() - before


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames are in no chunks before Python 3.11")
def test_room() -> None:
    """Without the plugin, some depths have a page fault for each layer. With it, none has."""
    with_room = plugin._with_room(execute_model)
    depths = range(0, stack.CHUNK, 16)  # fewer slots than the frame of a layer has
    without = [stack.above(depth, lambda: execute_model(LAYERS)) for depth in depths]
    assert max(without) >= LAYERS
    assert max(stack.above(depth, lambda: with_room(LAYERS)) for depth in depths) < LAYERS / 2


def test_arguments_pass() -> None:
    def original(*args: object, **kwargs: object) -> object:
        return args, kwargs

    assert plugin._with_room(original)(1, new=2) == ((1,), {"new": 2})
