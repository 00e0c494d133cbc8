"""Starts peers, each in a process of its own that stays loaded, and asks them to generate."""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from . import environments

MINUTES = 20  # to load a model, or to answer; compilers take long
WORKER = Path(__file__).with_name("worker.py")


class PeerError(RuntimeError):
    """A peer that had started gave no answer, or an error for one."""


@dataclass(frozen=True)
class Unavailable:
    """In the place of a peer that cannot be installed or started."""

    reason: str


class Peer:
    """A loaded model in another process; a context manager, at whose end the process is gone."""

    def __init__(self, name: str, interpreter: Path, folder: Path, dtype: str, threads: int):
        self.name = name
        self._scratch = tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True)
        scratch = Path(self._scratch.name)
        self._log = (scratch / "log").open("w+")
        module, variant, _ = environments.PEERS[name]
        # PYTHONPATH is for the caller's environment, not for another.
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [interpreter, WORKER, module, folder.resolve(), dtype, str(threads), scratch, variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # so that whatever the worker starts can be ended with it
            cwd=scratch,
            env={**variables, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )
        try:
            self.version: str = self._reply()["version"]
        except BaseException:
            self.close()
            raise

    def decode(self, ids: list[int], tokens: int) -> tuple[float, list[int]]:
        """Seconds, reading the prompt included, and so many greedy tokens; an end-of-text token does not end them.

        Raises:
            PeerError: the peer could not.
        """
        reply = self._ask({"decode": {"ids": ids, "tokens": tokens}})
        return reply["seconds"], reply["tokens"]

    def prefill(self, ids: list[int]) -> float:
        """Seconds for reading a prompt and finding the likeliest next token; computed anew each time.

        Raises:
            PeerError: the peer could not.
        """
        return self._ask({"prefill": {"ids": ids}})["seconds"]

    def peak_memory(self) -> int:
        """Bytes that were resident at most since the model was loaded and warmed up, mapped files included.

        Raises:
            PeerError: the peer could not.
        """
        return self._ask({"memory": None})["bytes"]

    def close(self) -> None:
        """End the process and all it started, and remove its files."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()
        self._scratch.cleanup()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], MINUTES * 60)[0]:
            raise PeerError(f"no answer in {MINUTES} minutes")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def _last_words(self) -> str:
        status = self._process.wait()
        return f"ended with status {status}: {environments.last_line(Path(self._log.name))}"


def start(name: str, folder: Path, dtype: str, threads: int) -> Peer | Unavailable:
    """Load a Hugging Face folder into a peer, made and installed on first use.

    `name` is one of `environments.PEERS`; `dtype` is float32, float16 or bfloat16.
    """
    try:
        return Peer(name, environments.python(name), folder, dtype, threads)
    except environments.CannotBeInstalled as error:
        return Unavailable(f"cannot be installed: {error}")
    except PeerError as error:
        return Unavailable(f"cannot be run: {error}")
