"""Runs one stage of a pipeline ahead of the next, each in a thread of its own.

* A pipeline is a chain of generators: `write(ahead(fold(ahead(read()))))`. Without `ahead` it does the same, slower.
* An error in a stage is raised in its consumer. When the consumer stops, the thread stops as well.
"""

import queue
import threading
from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


def ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Run a generator in a thread, ahead of its consumer.

    At most `depth` items exist at any moment: items that wait, the item that is being made, and the item that the
    consumer holds until it asks for the next. So a stage may put its items into a ring of `depth` reused buffers.
    """
    room = threading.Semaphore(depth)
    ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stopped = threading.Event()

    def produce() -> None:
        last: Any = _END
        try:
            room.acquire()
            while not stopped.is_set():
                item = next(items, _END)
                if item is _END:
                    break
                ready.put(item)
                room.acquire()
        except BaseException as error:
            last = _Raised(error)
        finally:
            items.close()
            ready.put(last)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item
            room.release()
    finally:
        stopped.set()
        room.release()
        thread.join()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
