"""A checkpoint that takes a cluster seconds to convert, and workers that are killed meanwhile."""

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch

from conversion import run
from flashnorm.errors import InputError
from flashnorm.files.staging import staging_folder
from flashnorm.planning.tensors import GainUse, TensorFold
from handmade import CHANNELS, Handmade, content, make, write

SHARDS = 12
_KILLS = 3
_ROWS = (24 << 20) // (2 * CHANNELS)


def large(folder: Path) -> Handmade:
    """The handmade checkpoint with a large linear layer in every shard, 290 MB in all."""
    source = make(folder)
    (folder / "model.safetensors").unlink()
    linears = {f"large.{i}.weight": torch.randn(_ROWS, CHANNELS).bfloat16() for i in range(SHARDS)}
    write(folder, linears | source.tensors, SHARDS)
    fold = TensorFold(1, (GainUse("layer.norm.weight", 0.0),))
    return Handmade(
        folder,
        {},
        source.plan,
        replace(source.names, folds=source.names.folds | dict.fromkeys(linears, fold)),
    )


def disturbed(
    source: Handmade, target: Path, executor: Executor, workers: Callable[[], Collection[int]], seed: int
) -> tuple[int, int, int]:
    """Convert, and kill a random worker at a random moment, `_KILLS` times. After an error, the same run is repeated.

    Args:
        source: the checkpoint.
        target: the folder to write.
        executor: what runs the workers.
        workers: the numbers of their processes, as they are now.
        seed: of the random numbers.

    Returns:
        How many workers were killed, how many runs ended with an error of ours, and how many shards the last one took
        over.
    """
    chance, ended, kills, errors = random.Random(seed), threading.Event(), 0, 0
    journal = staging_folder(target) / "journal.json"

    def kill() -> None:
        nonlocal kills
        finished = 0
        while not ended.wait(0.02):
            # Not before another shard is finished: it takes long to start a worker, and none might ever finish one.
            try:
                now = journal.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if now == finished:
                continue
            finished = now
            ended.wait(chance.uniform(0, 0.3))
            if kills < _KILLS and (running := sorted(workers())):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(running), signal.SIGKILL)
                    kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while True:
            try:
                result = run(source, target, executor=executor)
                break
            except InputError as error:
                if target.exists() or "run the same command again" not in str(error):
                    raise
                errors += 1
    finally:
        ended.set()
        killer.join()
    assert not staging_folder(target).exists()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return kills, errors, result.resumed_shards


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    return content(one) == content(other)
