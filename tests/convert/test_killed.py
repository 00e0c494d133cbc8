"""Killed at any moment, `convert` leaves no half model, and when it is run again it ends with the undisturbed bytes.

Each run is a process of its own, forked from a server that has imported everything, and ended by SIGKILL after a random
time. Some 60 MB in a dozen files make a run last long enough to be hit everywhere.
"""

import multiprocessing
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashnorm.convert.whole import convert_checkpoint
from flashnorm.files.staging import staging_folder
from flashnorm.planning.tensors import GainUse, TensorFold
from handmade import CHANNELS, OLD, Handmade, content, make, write

pytestmark = pytest.mark.slow

KILLS = 20
SHARDS = 12
ROWS = (5 << 20) // (2 * CHANNELS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Handmade:
    """The handmade checkpoint, and a large linear that reads its norm in every shard."""
    source = make(tmp_path_factory.mktemp("killed") / "source")
    (source.folder / "model.safetensors").unlink()
    linears = {f"large.{i}.weight": torch.randn(ROWS, CHANNELS).bfloat16() for i in range(SHARDS)}
    write(source.folder, linears | source.tensors, SHARDS)
    (source.folder / "tokenizer.json").write_text("{}")
    fold = TensorFold(1, (GainUse("layer.norm.weight", 0.0),))
    source.names = replace(source.names, folds=source.names.folds | dict.fromkeys(linears, fold))
    return source


def run(source: Handmade, target: Path, force: bool) -> None:
    convert_checkpoint(source.planned(), target, force=force)


@pytest.mark.parametrize("force", [False, True], ids=["new target", "old target replaced"])
def test_killed_at_any_moment(tmp_path: Path, source: Handmade, force: bool):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["flashnorm.convert.whole", "handmade"])

    def start(target: Path) -> multiprocessing.process.BaseProcess:
        process = processes.Process(
            target=run, args=(Handmade(source.folder, {}, source.plan, source.names), target, force)
        )
        process.start()
        return process

    # The first start includes the server's; the second tells how long a run takes.
    for name in ("warm-up", "undisturbed"):
        started = time.monotonic()
        process = start(tmp_path / name)
        process.join()
        duration = time.monotonic() - started
        assert process.exitcode == 0
    shutil.rmtree(tmp_path / "warm-up")
    undisturbed = content(tmp_path / "undisturbed")

    target = tmp_path / "place" / "out"
    whole = [undisturbed, OLD] if force else [undisturbed]
    moments = random.Random(0)
    killed = resumed = 0
    while killed < KILLS:
        if force and not target.exists():
            target.mkdir(parents=True)
            for name, data in OLD.items():
                (target / name).write_bytes(data)
        process = start(target)
        process.join(moments.uniform(0, 1.1 * duration))
        if process.exitcode is None:
            process.kill()
            killed += 1
        process.join()
        assert process.exitcode in (0, -9)
        models = [path.parent for path in tmp_path.rglob("place/**/config.json")]
        assert all(content(model) in whole for model in models), models
        assert target in models or not force
        resumed += (staging_folder(target) / "journal.json").exists()
        if process.exitcode == 0 or (target.exists() and content(target) == undisturbed):
            assert content(target) == undisturbed
            # A run that was killed after publishing may leave its journal, and the model that it replaced.
            shutil.rmtree(target.parent)
    start(target).join()
    assert content(target) == undisturbed
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert resumed > KILLS // 5
