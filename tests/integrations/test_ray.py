"""Conversion by Ray's workers. Ray has no executor of its own, but its results are futures of `concurrent.futures`."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed (make test-vllm installs it)")

from conversion import run  # noqa: E402
from flashnorm import workers  # noqa: E402
from flashnorm.errors import InputError  # noqa: E402
from handmade import content, make  # noqa: E402


class RayExecutor(Executor):
    """As docs/cluster.md has it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return ray.remote(fn).remote(*args, **kwargs).future()


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield RayExecutor()
    finally:
        ray.shutdown()


def test_the_bytes_are_those_of_one_process(tmp_path: Path, executor: Executor) -> None:
    source = make(tmp_path / "source", shards=3, untie=True)
    run(source, tmp_path / "one")
    run(source, tmp_path / "out", executor=executor)
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_an_error_of_a_worker(tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "__version__", "9.9")
    with pytest.raises(InputError, match=r"expected flashnorm 9\.9 in every worker"):
        run(make(tmp_path / "source", shards=3), tmp_path / "out", executor=executor)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
