"""The command line with an environment of its own: what libraries read when they are imported, imported once.

A process imports everything, and each command is a fork of it: as separate as a process of its own, in a fraction of
the time.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_SERVE = """
import json, os, signal, sys
import flashnorm.cli, flashnorm.convert, flashnorm.cpu.optimize, flashnorm.models.status, flashnorm.verify
import transformers.models.llama.modeling_llama

for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        answers, says = os.pipe()
        os.write(says, b"y\\n" * 100)
        os.close(says)
        os.dup2(answers, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_WRONLY), number)
        os.environ.update(job["environment"])
        sys.argv = ["flashnorm", *job["arguments"]]
        if job["dies_after"] is not None:
            signal.setitimer(signal.ITIMER_REAL, job["dies_after"])  # the signal's default is to end the process
        if sys.argv[1] != "-c":
            flashnorm.cli.main()
        exec(sys.argv[2], {"arguments": sys.argv[3:]})
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Runs `flashnorm` in the environment that `forked_commands` was given."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def __call__(
        self, *arguments: str | Path, dies_after: float | None = None, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run it with these arguments, and with these variables besides. It is told yes, whatever it asks.

        Args:
            arguments: those of `flashnorm`; or `-c`, Python code, and what its `arguments` are.
            dies_after: the seconds after which the system ends it, as with SIGKILL.
            environment: variables.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        words = [*map(str, arguments)]
        with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
            job = {"arguments": words, "environment": environment, "dies_after": dies_after}
            job |= {"stdout": stdout.name, "stderr": stderr.name}
            print(json.dumps(job), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(words, code, stdout.read(), stderr.read())


@contextmanager
def forked_commands(environment: Mapping[str, str | None]) -> Iterator[Commands]:
    """Commands with this environment besides ours; None for a variable that is to be absent."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    present = {name: value for name, value in everything.items() if value is not None}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=present
    ) as process:
        yield Commands(process)


def assert_refused(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """Status 2, and a message of ours as the last line, with these words in it."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("flashnorm: ")
    for word in words:
        assert word in last
