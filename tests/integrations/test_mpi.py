"""Conversion and verification by the processes of MPI (`mpi4py.futures`); `make test-executors` installs one, MPICH.

Each run is a program of its own, that `mpiexec` starts, as docs/cluster.md has it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import flashnorm
import tiny
from flashnorm.files.staging import staging_folder
from handmade import content

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("mpi4py") is None or MPIEXEC is None,
        reason="mpi4py or an MPI is not installed (make test-executors installs both)",
    ),
]

# What `python -m mpi4py.futures` makes of a process that is not the first one.
WORKER = [sys.executable, "-m", "mpi4py.futures"]

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import flashnorm, flashnorm.workers
from mpi4py.futures import MPIPoolExecutor

def killed(journal):
    while not journal.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

def wait_for_the_end(done, total):
    if journal.exists():
        time.sleep(600)

if __name__ == "__main__":
    source, target, what = sys.argv[1:]
    journal = Path(target).with_name(f".{Path(target).name}.flashnorm-partial") / "journal.json"
    if what == "another version":
        flashnorm.workers.__version__ = "9.9"
    with MPIPoolExecutor() as executor:
        if what == "a worker dies":
            executor.submit(killed, journal)
        progress = wait_for_the_end if what == "a worker dies" else None
        result = flashnorm.convert(source, target, executor=executor, progress=progress)
        report = flashnorm.verify(source, target, weights_only=True, executor=executor)
        found = {"workers": executor.num_workers, "ok": report.ok}
    print(json.dumps(found | {"shards": result.shards, "resumed": result.resumed_shards}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint in several shards, what one process makes of it, and the program."""
    folder = tmp_path_factory.mktemp("mpi")
    tiny.model(tiny.config("llama")).save_pretrained(folder / "source", max_shard_size="50KB")
    flashnorm.convert(folder / "source", folder / "one")
    (folder / "script.py").write_text(SCRIPT)
    return folder


def start(place: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    assert MPIEXEC is not None
    path = os.pathsep.join([str(Path(MPIEXEC).parent), os.environ["PATH"]])
    return subprocess.run(
        [MPIEXEC, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=place,
        env=os.environ | {"PATH": path} | environment,
    )


def found(ended: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert ended.returncode == 0, ended
    return json.loads(ended.stdout.splitlines()[-1])


def test_processes_that_were_started_together(place: Path) -> None:
    """One of them has another working folder, and the paths are relative to that of the first one."""
    script = str(place / "script.py")
    first, second = ["-n", "2", *WORKER, script, "source", "together", ""], ["-n", "1", "-wdir", "/", *WORKER]
    ended = found(start(place, *first, ":", *second))
    assert ended == {
        "workers": 2,
        "ok": True,
        "shards": len(list((place / "source").glob("*.safetensors"))),
        "resumed": 0,
    }
    assert content(place / "together") == content(place / "one")


def test_processes_that_the_first_one_starts(place: Path) -> None:
    """By the program of docs/cluster.md."""
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    [program] = [code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "MPIPoolExecutor" in code]
    (place / "convert.py").write_text(program)
    ended = start(place, "-n", "1", sys.executable, "convert.py", "source", "started", MPI4PY_FUTURES_MAX_WORKERS="2")
    assert ended.returncode == 0, ended
    assert "started is the same model as source\n" in ended.stdout
    assert content(place / "started") == content(place / "one")


def test_a_worker_that_is_killed(place: Path) -> None:
    """MPI ends the whole job. The same command again continues."""
    target = place / "resumed"
    ended = start(place, "-n", "3", *WORKER, "script.py", "source", target, "a worker dies")
    assert ended.returncode != 0
    assert not target.exists()
    finished = len(json.loads((staging_folder(target) / "journal.json").read_text())["shards"])
    assert finished
    assert found(start(place, "-n", "3", *WORKER, "script.py", "source", target, ""))["resumed"] == finished
    assert content(target) == content(place / "one")
    assert not staging_folder(target).exists()


def test_another_version(place: Path) -> None:
    ended = start(place, "-n", "2", *WORKER, "script.py", "source", "version", "another version")
    assert ended.returncode != 0
    assert (
        f"expected flashnorm 9.9 in every worker, as in the process that began the work, found {flashnorm.__version__}"
        in ended.stderr
    )
    assert not (place / "version").exists()
    assert not staging_folder(place / "version").exists()


def test_a_worker_that_does_not_see_the_source(place: Path) -> None:
    hidden = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none '{place / 'source'}' && exec \"$@\"", "sh"]
    try:
        may = subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        may = False
    if not may:
        pytest.skip("mount namespaces need the right to make them")
    ended = start(place, "-n", "1", *WORKER, "script.py", "source", "unseen", "", ":", "-n", "1", *hidden, *WORKER)
    assert ended.returncode != 0
    assert (
        "found nothing; source and target must be on file systems that all workers have, by the same paths"
        in ended.stderr
    )
    assert not (place / "unseen").exists()
    assert not staging_folder(place / "unseen").exists()
