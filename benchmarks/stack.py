"""Moves Python's frames, so that a benchmark does not measure where a chunk of them happens to end.

CPython keeps frames in chunks of 16 KB. A call that does not fit into the current chunk maps a new one, and unmaps it
when it returns: microseconds and page faults, each time. A loop that makes such a call pays each time around. Which
call it is depends on the size of all frames below, so that it differs between two programs that do the same.
"""

import resource
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

CHUNK = 2048  # slots of 8 bytes
ROOM = 8192  # a frame of this size gets a chunk of its own, with nearly as much room again


def above(slots: int, function: Callable[[], T]) -> T:
    """What `function` returns, when it is called from a Python frame with that many slots."""

    def frame() -> T:
        return function()

    frame.__code__ = frame.__code__.replace(co_stacksize=frame.__code__.co_stacksize + slots)
    return frame()


def faults() -> int:
    """How many page faults this process has had that needed no file."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
