"""Conversion by the workers of dask.distributed: processes of this machine, and two hosts in network namespaces.

`make test-executors` installs dask; it prints how often workers were killed, and what came of it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

distributed = pytest.importorskip("distributed", reason="dask is not installed (make test-executors installs it)")

from clusters import SHARDS, disturbed, large, same  # noqa: E402

from conversion import run  # noqa: E402
from flashnorm import workers  # noqa: E402
from flashnorm.errors import InputError  # noqa: E402
from flashnorm.files.reader import Checkpoint  # noqa: E402
from flashnorm.verify.weights import verify_weights  # noqa: E402
from handmade import Handmade, content, make  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "4"))


@pytest.fixture(scope="module")
def cluster() -> Iterator["distributed.LocalCluster"]:
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: "distributed.LocalCluster") -> Iterator["distributed.Client"]:
    with distributed.Client(cluster) as client:
        client.wait_for_workers(2, timeout=120)
        yield client


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Handmade:
    return large(tmp_path_factory.mktemp("dask") / "source")


@pytest.fixture(scope="module")
def one(source: Handmade) -> Path:
    """The conversion of one process."""
    target = source.folder.parent / "one"
    run(source, target)
    return target


def test_the_bytes_are_those_of_one_process(
    tmp_path: Path, client: "distributed.Client", source: Handmade, one: Path
) -> None:
    result = run(source, tmp_path / "out", executor=client.get_executor())
    assert result.shards == SHARDS
    assert same(tmp_path / "out", one)


def test_the_report_is_that_of_one_process(client: "distributed.Client", source: Handmade, one: Path) -> None:
    checkpoint = Checkpoint.open(one)
    mine = verify_weights(source.planned(), checkpoint)
    assert mine.ok
    theirs = verify_weights(source.planned(), checkpoint, executor=client.get_executor())
    assert theirs == replace(mine, seconds=theirs.seconds)


def test_another_version(
    tmp_path: Path, client: "distributed.Client", source: Handmade, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "__version__", "9.9")
    with pytest.raises(InputError, match=r"expected flashnorm 9\.9 in every worker"):
        run(source, tmp_path / "out", executor=client.get_executor())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_workers_killed_at_random_moments(
    tmp_path: Path, cluster: "distributed.LocalCluster", client: "distributed.Client", source: Handmade, one: Path,
    seed: int, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def running() -> list[int]:
        return [nanny.pid for nanny in cluster.workers.values() if nanny.pid is not None]

    kills, errors, resumed = disturbed(source, tmp_path / "place" / "out", client.get_executor(), running, seed)
    assert same(tmp_path / "place" / "out", one)
    with capsys.disabled():
        print(f"\nseed {seed}: {kills} workers killed, {errors} runs ended with an error, {resumed} shards taken over")


class Hosts:
    """A scheduler on this host, and workers on two hosts that share its files and nothing else."""

    BRIDGE, NAMES = "fnbr0", ("fnhost1", "fnhost2")

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self.address = "tcp://10.77.5.1:8799"

    def __enter__(self) -> "Hosts":
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        ip("link", "add", self.BRIDGE, "type", "bridge")
        ip("addr", "add", "10.77.5.1/24", "dev", self.BRIDGE)
        ip("link", "set", self.BRIDGE, "up")
        self._start("scheduler", "--host", "10.77.5.1", "--port", "8799", "--no-dashboard")
        for number, name in enumerate(self.NAMES, 2):
            ip("netns", "add", name)
            ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
            ip("link", "set", f"{name}a", "master", self.BRIDGE, "up")
            ip("link", "set", f"{name}b", "netns", name)
            ip("-n", name, "addr", "add", f"10.77.5.{number}/24", "dev", f"{name}b")
            ip("-n", name, "link", "set", f"{name}b", "up")
            ip("-n", name, "link", "set", "lo", "up")
            self._start("worker", self.address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard", inside=name)

    def _start(self, *command: str, inside: str | None = None) -> None:
        dask = [sys.executable, "-m", "distributed.cli.dask_" + command[0], *command[1:]]
        prefix = [] if inside is None else ["ip", "netns", "exec", inside]
        self._started.append(subprocess.Popen([*prefix, *dask], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            process.wait(60)
        for name in self.NAMES:
            ip("link", "del", f"{name}a", check=False)
            ip("netns", "del", name, check=False)
        ip("link", "del", self.BRIDGE, check=False)


def ip(*arguments: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True).returncode == 0


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        may = ip("netns", "add", "fnprobe", check=False)
    except FileNotFoundError:
        may = False
    if not may:
        pytest.skip("network namespaces need the right to make them")
    ip("netns", "del", "fnprobe")
    with Hosts() as hosts:
        yield hosts


def test_two_hosts(tmp_path: Path, hosts: Hosts, source: Handmade, one: Path) -> None:
    with distributed.Client(hosts.address, timeout="60s") as client:
        client.wait_for_workers(2, timeout=120)
        addresses = {worker["host"] for worker in client.scheduler_info()["workers"].values()}
        assert addresses == {"10.77.5.2", "10.77.5.3"}
        run(source, tmp_path / "out", executor=client.get_executor())
    assert same(tmp_path / "out", one)


def test_two_runs_at_one_target(tmp_path: Path, client: "distributed.Client", source: Handmade, one: Path) -> None:
    """The second one is refused, and harms nothing."""
    small = make(tmp_path / "small", shards=3)
    refused = []

    def second(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(InputError, match="another run") as error:
                run(small, tmp_path / "out", executor=client.get_executor())
            refused.append(error)

    run(source, tmp_path / "out", executor=client.get_executor(), progress=second)
    assert refused
    assert content(tmp_path / "out") == content(one)
