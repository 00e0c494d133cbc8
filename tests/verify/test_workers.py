"""Weights that workers compare: the report is that of one process, whatever is wrong and whatever becomes of them.

`Converted.verify`, which all tests of weights call, compares the two on every kind of damage as well.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_checkpoints import TWO_SHARDS_FOLDS, Converted, two_shards

import flashnorm
import tiny
from any_order import AnyOrder
from architectures.configs import tiny_config
from flashnorm import workers
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.verify.part import compare_part_elsewhere, parts_by_file
from flashnorm.verify.weights import verify_weights
from flashnorm.verify.whole import verify
from flashnorm.workers import processes

Convert = Callable[..., Converted]


def without_times(report: Any) -> dict[str, Any]:
    data = json.loads(report.to_json())
    del data["weights"]["seconds"]
    return data


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with norm biases in many shards, and its conversion: a changed bias needs tensors of other shards."""
    folder = tmp_path_factory.mktemp("workers")
    tiny.model(tiny.config("starcoder2"), torch.bfloat16).save_pretrained(folder / "source", max_shard_size="20KB")
    flashnorm.convert(folder / "source", folder / "out")
    return folder


def flip(folder: Path, *chosen: str) -> set[str]:
    """Change a bit of the middle element of tensors whose name contains a text. Returns the files with such tensors."""
    files = set()
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if any(text in name for text in chosen):
                tensor.view(torch.int16).view(-1)[tensor.numel() // 2] ^= 1
                files.add(path.name)
        save_file(tensors, path, {"format": "pt"})
    return files


@pytest.mark.parametrize(
    "chosen",
    [
        (),
        ("mlp.c_fc.weight",),
        pytest.param(("q_proj", "bias"), marks=pytest.mark.slow),
        pytest.param(("weight", "bias"), marks=pytest.mark.slow),
    ],
    ids=["right", "some", "biases", "all"],
)
def test_the_report_is_that_of_one_process(tmp_path: Path, sharded: Path, chosen: tuple[str, ...]) -> None:
    out = shutil.copytree(sharded / "out", tmp_path / "out")
    assert not chosen or len(flip(out, *chosen)) > 1
    one = verify(sharded / "source", out, weights_only=True)
    assert one.ok == (not chosen)
    assert one.weights.biases or chosen
    for seed in range(3):
        with AnyOrder(seed) as executor:
            other = verify(sharded / "source", out, weights_only=True, executor=executor)
        assert without_times(other) == without_times(one)


@pytest.mark.parametrize(
    ("model_type", "damaged", "options"),
    [("gpt2", "c_proj.weight", {"center": True, "untie": True}), ("gemma4_text", "q_proj.weight", {"cancel": "exact"})],
)
@pytest.mark.slow
def test_centred_and_cancelled_models(tmp_path: Path, model_type: str, damaged: str, options: dict[str, Any]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    built = tiny.model(tiny_config(model_type), torch.bfloat16)
    built.save_pretrained(source, max_shard_size="20KB")
    with AnyOrder(0) as executor:
        flashnorm.convert(source, out, executor=executor, **options)
        for wrong in ((), (damaged,)):
            assert not wrong or flip(out, *wrong)
            one, other = (verify(source, out, weights_only=True, executor=used) for used in (None, executor))
            assert one.ok == (not wrong)
            assert without_times(other) == without_times(one)
            assert one.weights.centred > 0 or model_type == "gemma4_text"


def test_shards_of_other_names(tmp_path: Path, sharded: Path) -> None:
    """Another program may have split the tensors in another way: a shard is compared with tensors of several files."""
    out = shutil.copytree(sharded / "out", tmp_path / "out")
    tensors = {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    for path in out.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    one = verify(sharded / "source", out, weights_only=True)
    as_written = verify(sharded / "source", sharded / "out", weights_only=True).weights
    for count in ("folded", "biases", "unchanged", "norms"):
        assert getattr(one.weights, count) == getattr(as_written, count) > 0
    with ThreadPoolExecutor(2) as executor:
        other = verify(sharded / "source", out, weights_only=True, executor=executor)
    assert without_times(other) == without_times(one)
    kinds = {finding.kind for finding in one.weights.findings}
    assert kinds <= {"file", "manifest", "index"}


def test_progress_counts_every_byte(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    with AnyOrder(0) as executor:
        verify(
            sharded / "source",
            sharded / "out",
            weights_only=True,
            executor=executor,
            progress=lambda done, total: calls.append((done, total)),
        )
    assert calls == sorted(calls)
    assert len(calls) > 5


@pytest.mark.slow
def test_convert_verifies_by_the_same_workers(tmp_path: Path, sharded: Path) -> None:
    class Counting(ThreadPoolExecutor):
        tasks = 0

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            self.tasks += 1
            return super().submit(*args, **kwargs)

    with Counting(2) as executor:
        result = flashnorm.convert(sharded / "source", tmp_path / "out", verify=True, executor=executor)
    assert result.report is not None
    assert result.report.ok
    assert executor.tasks == 2 * result.shards


class TestFailures:
    def test_another_version(self, convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
        converted = convert(two_shards(), TWO_SHARDS_FOLDS)
        perform = workers.perform
        monkeypatch.setattr(workers, "perform", lambda version, call: perform("9.9", call))
        with (
            ThreadPoolExecutor(1) as executor,
            pytest.raises(InputError, match=r"expected flashnorm 9\.9 in every worker"),
        ):
            verify_weights(converted.planned(), Checkpoint.open(converted.folder), executor=executor)

    @pytest.mark.parametrize("what", ["source", "folder"])
    def test_a_host_that_does_not_have_the_files(self, tmp_path: Path, convert: Convert, what: str) -> None:
        converted = convert(two_shards(), TWO_SHARDS_FOLDS)
        planned = converted.planned()
        parts = parts_by_file(planned.checkpoint, Checkpoint.open(converted.folder), [], planned.tensors)
        getattr(converted, what).rename(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=r"found nothing; source and target must be on file systems"):
            compare_part_elsewhere(next(iter(parts.values())))

    def test_a_host_with_other_files(self, convert: Convert) -> None:
        converted = convert(two_shards(), TWO_SHARDS_FOLDS)
        planned, result = converted.planned(), Checkpoint.open(converted.folder)
        parts = parts_by_file(planned.checkpoint, result, [], planned.tensors)
        path = converted.folder / next(iter(result.headers))
        path.write_bytes(path.read_bytes())
        with pytest.raises(InputError, match="found another one"):
            compare_part_elsewhere(parts[path.name])

    def test_an_executor_that_takes_nothing(self, convert: Convert) -> None:
        converted = convert(two_shards(), TWO_SHARDS_FOLDS)
        executor = ThreadPoolExecutor(1)
        executor.shutdown()
        with pytest.raises(InputError, match=r"the executor failed.*; run the same command again$"):
            verify_weights(converted.planned(), Checkpoint.open(converted.folder), executor=executor)

    def test_one_folder_is_for_one_process(self, sharded: Path) -> None:
        with pytest.raises(InputError, match="expected one process for a folder without its source"):
            verify(sharded / "out", weights_only=True, workers=2)


@pytest.mark.slow
class TestProcesses:
    @pytest.fixture
    def pool(self) -> Iterator[Executor]:
        with processes(2, "flashnorm.verify.part") as pool:
            yield pool

    def test_the_report_is_that_of_one_process(self, sharded: Path, pool: Executor) -> None:
        one = verify(sharded / "source", sharded / "out", weights_only=True)
        other = verify(sharded / "source", sharded / "out", weights_only=True, executor=pool)
        assert without_times(other) == without_times(one)

    def test_a_worker_that_dies(self, convert: Convert, pool: Executor) -> None:
        converted = convert(two_shards(), TWO_SHARDS_FOLDS)
        result = Checkpoint.open(converted.folder)
        for _ in range(2):
            pool.submit(_die)
        with pytest.raises(InputError, match=r"a worker died.*; run the same command again$"):
            verify_weights(converted.planned(), result, executor=pool)
        with processes(2, "flashnorm.verify.part") as another:
            report = verify_weights(converted.planned(), result, executor=another)
        assert report.ok
        assert report == replace(converted.verify(), seconds=report.seconds)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
