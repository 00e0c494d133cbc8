"""Shards that workers write: the bytes are those of one process, whatever becomes of the workers."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import flashnorm
import tiny
from any_order import AnyOrder
from conversion import run
from flashnorm import workers
from flashnorm.convert import part
from flashnorm.convert import shards as shard
from flashnorm.convert.part import part_of, write_part_elsewhere
from flashnorm.errors import InputError
from flashnorm.files.staging import Staging, staging_folder
from flashnorm.workers import processes
from handmade import Handmade, content, make


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Processes that have imported what they need."""
    with processes(2, "flashnorm.convert.part") as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"keep_norms": True}], ids=["weightless", "norms kept"])
def test_the_bytes_are_those_of_one_process(tmp_path: Path, pool: Executor, options: dict[str, bool]) -> None:
    source = make(tmp_path / "source", shards=3, untie=True)
    run(source, tmp_path / "one", **options)
    calls: list[tuple[int, int]] = []
    result = run(
        source, tmp_path / "out", executor=pool, progress=lambda done, total: calls.append((done, total)), **options
    )
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "source"]
    assert (result.shards, result.resumed_shards) == (3, 0)
    assert calls == sorted(calls)
    shards = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert calls[-1] == (shards, shards)


def test_norms_with_biases(tmp_path: Path) -> None:
    """The new bias of a linear layer needs tensors of other shards."""
    model = tiny.model(tiny.config("starcoder2"), torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    flashnorm.convert(tmp_path / "source", tmp_path / "one")
    with ThreadPoolExecutor(2) as threads:
        result = flashnorm.convert(tmp_path / "source", tmp_path / "out", executor=threads)
    assert result.shards > 5
    assert content(tmp_path / "out") == content(tmp_path / "one")


@pytest.mark.parametrize("seed", range(4))
def test_products_that_do_not_fit(tmp_path: Path, seed: int) -> None:
    """Norms of several shards must be kept. Which ones, and what the manifest says of them, depends on no order."""
    model = tiny.model(tiny.config("llama"), torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = 3000
            for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                linear.weight[0, 5] = 60
        model.model.norm.weight[7] = 2000
        model.lm_head.weight[3, 7] = 100
    model.save_pretrained(tmp_path / "source", max_shard_size="12KB")
    one = flashnorm.convert(tmp_path / "source", tmp_path / "one")
    assert sum("too large" in kept.reason for kept in one.plan.kept.values()) == 3
    with AnyOrder(seed) as executor:
        result = flashnorm.convert(tmp_path / "source", tmp_path / "out", executor=executor)
    assert result.shards > 10
    assert content(tmp_path / "out") == content(tmp_path / "one")


class TestFailures:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Handmade:
        return make(tmp_path / "source", shards=3)

    def assert_repeated(self, source: Handmade, target: Path, **options: Any) -> int:
        """The same run again ends with the bytes of one process. Returns how many shards it took over."""
        result = run(source, target, **options)
        run(source, target.parent / "one")
        assert content(target) == content(target.parent / "one")
        assert not staging_folder(target).exists()
        return result.resumed_shards

    @pytest.mark.slow
    def test_a_worker_that_is_killed(self, tmp_path: Path, source: Handmade) -> None:
        class OneDies(Executor):
            """The worker that takes the third shard dies of it, after another one is finished."""

            asked = 0

            def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
                self.asked += 1
                if self.asked == 3:
                    return pool.submit(killed, staging_folder(tmp_path / "out") / "journal.json")
                return pool.submit(fn, *args)

        with (
            processes(2, "flashnorm.convert.part") as pool,
            pytest.raises(InputError, match=r"a worker died.*run the same command again"),
        ):
            run(source, tmp_path / "out", executor=OneDies())
        assert not (tmp_path / "out").exists()
        assert not list(staging_folder(tmp_path / "out").glob("attempts-*"))
        assert self.assert_repeated(source, tmp_path / "out") in (1, 2)

    def test_an_interrupt(self, tmp_path: Path, source: Handmade, pool: Executor) -> None:
        """Ctrl-C on a terminal goes to the workers as well, which leave it to the first process."""
        workers = {pool.submit(os.getpid).result() for _ in range(4)}

        def interrupt(done: int, total: int) -> None:
            if (staging_folder(tmp_path / "out") / "journal.json").exists():
                for worker in workers:
                    os.kill(worker, signal.SIGINT)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", executor=pool, progress=interrupt)
        assert not (tmp_path / "out").exists()
        assert not list(staging_folder(tmp_path / "out").glob("attempts-*"))
        assert self.assert_repeated(source, tmp_path / "out", executor=pool) == 1

    def test_workers_end_when_the_conversion_is_killed(self, tmp_path: Path) -> None:
        script = """
import os, signal
from flashnorm.workers import processes
with processes(2) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        worker = Path(f"/proc/{int(ended.stdout)}/stat")
        until = time.monotonic() + 30
        while worker.exists() and worker.read_text().split()[2] != "Z" and time.monotonic() < until:
            time.sleep(0.05)
        assert not worker.exists() or worker.read_text().split()[2] == "Z"

    @pytest.mark.slow
    def test_another_version(
        self, tmp_path: Path, source: Handmade, pool: Executor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(workers, "__version__", "9.9")
        with pytest.raises(
            InputError, match=rf"expected flashnorm 9\.9 in every worker.*found {flashnorm.__version__}"
        ):
            run(source, tmp_path / "out", executor=pool)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """A limit on the size of a file stands in for a disk that is full: the error comes from the same call."""
        model = tiny.model(tiny.config("llama", num_hidden_layers=1, vocab_size=2000))
        model.save_pretrained(tmp_path / "source", max_shard_size="200KB")
        with processes(2, "flashnorm.convert.part") as pool:
            for number in [pool.submit(limited, 1 << 18) for _ in range(2)]:
                number.result()
            with pytest.raises(InputError, match="make room and run the same command again"):
                flashnorm.convert(tmp_path / "source", tmp_path / "out", executor=pool)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("megabytes", [0, 20], ids=["no thread", "no buffers"])
    def test_too_little_memory(self, tmp_path: Path, source: Handmade, megabytes: int) -> None:
        with processes(1, "flashnorm.convert.part") as pool:
            pool.submit(confined, megabytes << 20).result()
            with pytest.raises(
                InputError, match=r"process \d+: expected memory.*start fewer of them, and run the same"
            ):
                run(source, tmp_path / "out", executor=pool)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_an_executor_that_takes_nothing(self, tmp_path: Path, source: Handmade) -> None:
        executor = ThreadPoolExecutor(1)
        executor.shutdown()
        with pytest.raises(InputError, match=r"the executor failed.*after shutdown"):
            run(source, tmp_path / "out", executor=executor)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_what_is_no_executor(self, tmp_path: Path, source: Handmade) -> None:
        """As a dask Client, whose futures are its own."""

        class Client:
            def submit(self, *args: Any) -> object:
                return object()

        client: Any = Client()
        with pytest.raises(InputError, match=r"expected an executor of concurrent.futures.*found a .*Client, whose"):
            run(source, tmp_path / "out", executor=client)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_an_executor_and_workers(self, tmp_path: Path) -> None:
        tiny.model(tiny.config("llama")).save_pretrained(tmp_path / "source")
        with ThreadPoolExecutor(1) as executor, pytest.raises(InputError, match="found both; leave one of them out"):
            flashnorm.convert(tmp_path / "source", tmp_path / "out", executor=executor, workers=2)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_an_error_of_the_source_names_the_worker(self, tmp_path: Path, source: Handmade, pool: Executor) -> None:
        with Staging(tmp_path / "out", {}) as staging:
            checkpoint = source.open()
            task = part_of(checkpoint, source.names, next(iter(checkpoint.headers)), False, staging)
            path = checkpoint.folder / task.shard
            path.write_bytes(path.read_bytes())
            with workers.Elsewhere(pool, write_part_elsewhere, again="again") as crew:
                crew.ask(task.shard, task)
                with pytest.raises(InputError, match=r"found another one; source and target.*found on .*, process \d+"):
                    crew.next()

    @pytest.mark.parametrize("what", ["source", "target"])
    def test_a_host_that_does_not_have_the_files(self, tmp_path: Path, source: Handmade, what: str) -> None:
        with Staging(tmp_path / "out", {}) as staging:
            checkpoint = source.open()
            task = part_of(checkpoint, source.names, next(iter(checkpoint.headers)), False, staging)
            (checkpoint.folder if what == "source" else staging.attempts).rename(tmp_path / "elsewhere")
            with pytest.raises(InputError, match=r"found (nothing|none); source and target must be on file systems"):
                write_part_elsewhere(task)

    def test_nothing_is_left_of_a_run_whose_worker_does_not_see_the_source(
        self, tmp_path: Path, source: Handmade
    ) -> None:
        class OnAnotherHost(ThreadPoolExecutor):
            def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
                source.folder.rename(tmp_path / "elsewhere")
                try:
                    wait([future := super().submit(fn, *args, **kwargs)])
                finally:
                    (tmp_path / "elsewhere").rename(source.folder)
                return future

        with OnAnotherHost(1) as executor, pytest.raises(InputError, match="found nothing; source and target must be"):
            run(source, tmp_path / "out", executor=executor)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_hosts_whose_clocks_differ(self, tmp_path: Path, source: Handmade) -> None:
        """The source is of tomorrow, and what a worker has written is of the year 2001 or of tomorrow."""
        tomorrow, times = time.time() + 86400, iter([1e9, time.time() + 86400, 1e9])
        for path in source.folder.iterdir():
            os.utime(path, (tomorrow, tomorrow))

        class OtherClocks(ThreadPoolExecutor):
            def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
                wait([future := super().submit(fn, *args, **kwargs)])
                at = next(times)
                for path in staging_folder(tmp_path / "out").glob("attempts-*/*"):
                    os.utime(path, (at, at))
                return future

        with OtherClocks(1) as executor:
            assert self.assert_repeated(source, tmp_path / "out", executor=executor) == 0
        assert next(times, None) is None

    def test_a_worker_that_finds_the_folder_of_another_run(self, tmp_path: Path, source: Handmade) -> None:
        """Another host has taken the lock, and removed the folder that the worker is to write into."""

        class TakenOver(ThreadPoolExecutor):
            def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
                folder = staging_folder(tmp_path / "out")
                (folder / "lock").write_text("another run")
                for attempts in folder.glob("attempts-*"):
                    attempts.rmdir()
                return super().submit(fn, *args, **kwargs)

        with TakenOver(1) as executor, pytest.raises(InputError, match="another run is writing this target"):
            run(source, tmp_path / "out", executor=executor)
        assert not (tmp_path / "out").exists()

    def test_a_worker_stops_when_nobody_waits_for_it(
        self, tmp_path: Path, source: Handmade, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may have been given up, and another one have written the shard: then its own file is gone."""
        monkeypatch.setattr(shard, "PIECE_BYTES", 256)
        monkeypatch.setattr(part, "_LOOK_SECONDS", 0.0)
        with Staging(tmp_path / "out", {}) as staging:
            checkpoint = source.open()
            name = next(iter(checkpoint.headers))
            task = part_of(checkpoint, source.names, name, False, staging)
            (staging.attempts / f"{name}.other").touch()
            begun = write_part_elsewhere(task)
            assert begun.attempt is not None
            staging.take(begun.attempt, name)
            assert not list(staging.attempts.iterdir())
            written = (staging.model / name).read_bytes()
            exists = Path.exists
            monkeypatch.setattr(Path, "exists", lambda path: (path.unlink(missing_ok=True), exists(path))[1])
            with pytest.raises(InputError, match="nobody waits for this file any more"):
                write_part_elsewhere(task)
            monkeypatch.undo()
            assert (staging.model / name).read_bytes() == written
            assert not list(staging.attempts.iterdir())

    @pytest.mark.parametrize("elsewhere", [False, True], ids=["one process", "workers"])
    def test_a_run_whose_lock_another_host_took(self, tmp_path: Path, source: Handmade, elsewhere: bool) -> None:
        """As on a file system that keeps locks for one host only: the second run does not see the first one's."""
        run(source, tmp_path / "one")
        began = False
        executors = [ThreadPoolExecutor(1) if elsewhere else None for _ in range(2)]

        def second(done: int, total: int) -> None:
            nonlocal began
            if not began:
                began = True
                (staging_folder(tmp_path / "out") / "lock").unlink()
                run(source, tmp_path / "out", executor=executors[1])

        with pytest.raises(InputError, match="another run is writing this target, perhaps on another host"):
            run(source, tmp_path / "out", progress=second, executor=executors[0])
        assert began
        assert content(tmp_path / "out") == content(tmp_path / "one")
        assert not staging_folder(tmp_path / "out").exists()


def limited(nbytes: int) -> None:
    """Let the process write no larger file. Takes a while, so that another process does what is asked for meanwhile."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
    time.sleep(0.3)


def confined(nbytes: int) -> None:
    """Let the process have so much more memory than it has now."""
    size = psutil.Process().memory_info().vms + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def killed(journal: Path) -> None:
    """Die as by the system, once a shard is finished."""
    while not journal.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    model = tiny.model(tiny.config("llama"), torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    flashnorm.convert(tmp_path / "source", tmp_path / "one")
    command = [sys.executable, "-m", "flashnorm", "convert", str(tmp_path / "source"), str(tmp_path / "out")]
    command += ["--workers", "2", "--json-progress"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    last = json.loads(ended.stderr.splitlines()[-1])
    assert (last["stage"], last["bytes"], last["total"], last["seconds_left"]) == ("converting", size, size, 0)
    assert content(tmp_path / "out") == content(tmp_path / "one")
