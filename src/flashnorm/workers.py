"""Tasks that other processes do: any `concurrent.futures.Executor` runs them, on this machine or in a cluster.

* A task is a function of a module, with one argument that can be pickled. Errors that it raises come back as they are;
  whatever else goes wrong is the executor's, and ends the work with an error that says so.
* Each call says which version of flashnorm asks for it. A worker of another version refuses it.
"""

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import connection
from typing import Any, Generic, Protocol, TypeVar

import psutil

from flashnorm.errors import InputError, brief
from flashnorm.version import __version__

Task = TypeVar("Task")
Result = TypeVar("Result")
Asked = TypeVar("Asked", contravariant=True)
Given = TypeVar("Given", covariant=True)

# How often the caller is told that it waits, in seconds.
_LOOK_SECONDS = 0.5

# What a process of `processes` may need besides the memory of the imports, which they share, in bytes.
_PROCESS_BYTES = 600_000_000

# A process keeps about two cores busy: when it converts, one hashes the source and folds, one hashes the output; when
# it verifies, one hashes both, one compares.
_CORES_OF_A_PROCESS = 2

# Another process pays off if it has so much to read: it takes seconds to start.
_BYTES_WORTH_A_PROCESS = 4_000_000_000


class Crew(Protocol[Asked, Given]):
    """Does named tasks, in any order."""

    def ask(self, name: str, task: Asked) -> None:
        """Let a task be done, instead of another one of this name; nothing happens if it is the same one."""
        ...

    def next(self) -> tuple[str, Given]:
        """The name and the result of a task that is done. It can be asked for again."""
        ...


class Here(Generic[Task, Result]):
    """Does tasks in this process, one at a time, in the order in which they were first asked for."""

    def __init__(self, function: Callable[[str, Task], Result]) -> None:
        self._function = function
        self._asked: dict[str, Task] = {}

    def ask(self, name: str, task: Task) -> None:
        self._asked[name] = task

    def next(self) -> tuple[str, Result]:
        name = next(iter(self._asked))
        return name, self._function(name, self._asked.pop(name))


class Elsewhere(Generic[Task, Result]):
    """Does tasks by an executor. A context manager: at the end, nothing more is begun."""

    def __init__(
        self,
        executor: Executor,
        function: Callable[[Task], Result],
        *,
        again: str,
        waiting: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            executor: what runs the tasks.
            function: does a task; a function of a module.
            again: what to do when the executor fails, for the message.
            waiting: called about twice a second while `next` waits.
        """
        self._again = again
        self._executor = executor
        self._function = function
        self._waiting = waiting
        self._asked: dict[str, tuple[Task, Future[bytes]]] = {}

    def ask(self, name: str, task: Task) -> None:
        """Let a task be done. Raises `InputError` if the executor does not take it, or is none."""
        known = self._asked.get(name)
        if known is not None:
            if known[0] == task:
                return
            known[1].cancel()
        try:
            future = self._executor.submit(perform, __version__, pickle.dumps((self._function, task)))
        except Exception as error:
            raise self._of_executor(name, error) from error
        if not isinstance(future, Future):  # of a dask Client, say, and not of its `get_executor()`
            raise InputError(
                "expected an executor of concurrent.futures, whose `submit` gives its futures, found a "
                f"{type(self._executor).__qualname__}, whose `submit` gives a {type(future).__qualname__}"
            )
        self._asked[name] = task, future

    def next(self) -> tuple[str, Result]:
        """The name and the result of a task that is done.

        Raises:
            InputError: the executor failed: a worker died, say.
            Exception: whatever the task raised.
        """
        names = {future: name for name, (_, future) in self._asked.items()}
        while not (done := wait(names, _LOOK_SECONDS, FIRST_COMPLETED).done):
            self._waiting()
        future = next(future for future in names if future in done)  # the one that was asked for first
        name = names[future]
        del self._asked[name]
        try:
            value, error, trace = pickle.loads(future.result())
        except Exception as failure:
            raise self._of_executor(name, failure) from failure
        if error is not None:
            raise error from (RuntimeError(trace) if trace else None)
        return name, value

    def __enter__(self) -> "Elsewhere[Task, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        for _task, future in self._asked.values():
            future.cancel()

    def _of_executor(self, name: str, error: Exception) -> InputError:
        found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, BrokenExecutor):
            why = "a worker died, as when it is killed or the memory is full"
        else:
            why = f"the executor failed; does each worker have flashnorm {__version__}?"
        return InputError(
            f"{name}: expected a worker to finish it, found that {why} ({brief(RuntimeError(found))}); {self._again}"
        )


def perform(version: str, call: bytes) -> bytes:
    """Call a pickled function with its argument, in a worker. Returns its result, its error and a traceback, pickled.

    Args:
        version: the version of flashnorm that asks for it.
        call: the function and its argument.
    """
    place = f"{socket.gethostname()}, process {os.getpid()}"
    if version != __version__:
        error = InputError(
            f"expected flashnorm {version} in every worker, as in the process that began the work, found {__version__} "
            f"on {place}; install the same version everywhere"
        )
        return pickle.dumps((None, error, ""))
    try:
        function, argument = pickle.loads(call)
        return pickle.dumps((function(argument), None, ""))
    except InputError as error:
        return pickle.dumps((None, InputError(f"{error} (found on {place})"), ""))
    except Exception as error:
        if _is_lack_of_memory(error):
            error = InputError(
                f"{place}: expected memory for a worker, found too little ({brief(error)}); give each worker more, or "
                "start fewer of them, and run the same command again"
            )
            return pickle.dumps((None, error, ""))
        return pickle.dumps((None, error, f"on {place}:\n{traceback.format_exc()}"))


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # For which Python has no error of its own: there is no room for the thread's stack.
    return isinstance(error, MemoryError) or str(error) == "can't start new thread"


@contextlib.contextmanager
def team(
    executor: Executor | None, workers: int | None, parts: int, nbytes: int, module: str
) -> Iterator[Executor | None]:
    """The executor to use for work in parts; None if this process is to do it alone.

    Args:
        executor: the one that was given.
        workers: how many processes were asked for instead; None for what the machine allows and the work is worth.
        parts: how many tasks there are.
        nbytes: how many bytes they read.
        module: what their tasks import.

    Raises:
        InputError: both an executor and other processes are asked for.
    """
    if executor is not None and workers not in (1, None):
        raise InputError("expected an executor or a number of workers, found both; leave one of them out")
    if executor is not None or workers == 1:
        yield executor
        return
    if workers is None:
        workers = min(affordable(_CORES_OF_A_PROCESS), nbytes // _BYTES_WORTH_A_PROCESS)
    count = min(workers, parts)
    if count < 2:
        yield None
        return
    with processes(count, module) as own:
        yield own


@contextlib.contextmanager
def processes(count: int, *modules: str) -> Iterator[Executor]:
    """Processes of this machine, as an executor. They are started at once, and end with this process.

    Args:
        count: how many.
        modules: what their tasks import; it is imported once, for all of them.
    """
    # Not `fork`: OpenMP's threads, which this process may have, do not survive it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    with ProcessPoolExecutor(count, context, _begin) as pool:
        for _ in range(count):  # each starts a process
            pool.submit(os.getpid)
        yield pool


def _begin() -> None:
    """Let a process leave Ctrl-C to its parent, and end when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: Any = parent.sentinel) -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def affordable(cores_each: int) -> int:
    """How many processes the cores that this process may use, and the memory that is free, allow; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // cores_each, int(psutil.virtual_memory().available // _PROCESS_BYTES)))
