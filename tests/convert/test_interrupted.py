"""An interrupted `convert` continues when it is run again, and ends with the same bytes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conversion import assert_folded, run, tensors_of
from flashnorm.convert import shards as shard
from flashnorm.errors import InputError
from handmade import Handmade, content, make, write


class TestInterrupted:
    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shard, "PIECE_BYTES", 256)

    def interrupt(self, source: Handmade, target: Path, at: float, do: Callable[[], object] | None = None) -> None:
        """Run until a share of the bytes is written, and stop there; or do something there, which should stop it."""

        def progress(done: int, total: int) -> None:
            if done >= at * total:
                if do is None:
                    raise KeyboardInterrupt
                do()

        with pytest.raises((KeyboardInterrupt, InputError)):
            run(source, target, progress=progress)

    @pytest.mark.parametrize("at", [0.01, 0.3, 0.6, 0.9, 1.0])
    def test_continues_and_ends_with_the_same_bytes(self, tmp_path: Path, source: Handmade, at: float):
        run(source, tmp_path / "undisturbed")
        target = tmp_path / "out"
        self.interrupt(source, target, at)
        assert not target.exists()
        left = [path.name for path in (tmp_path / ".out.flashnorm-partial").rglob("*.safetensors")]
        result = run(source, target)
        assert result.resumed_shards == len(left)
        assert content(target) == content(tmp_path / "undisturbed")
        assert not (tmp_path / ".out.flashnorm-partial").exists()

    def test_nothing_is_left_if_nothing_was_finished(self, tmp_path: Path, source: Handmade):
        self.interrupt(source, tmp_path / "out", 0.0)
        assert list(tmp_path.iterdir()) == [source.folder]

    def test_a_finished_shard_that_was_changed_is_written_again(self, tmp_path: Path, source: Handmade):
        run(source, tmp_path / "undisturbed")
        self.interrupt(source, tmp_path / "out", 0.9)
        path = next((tmp_path / ".out.flashnorm-partial").rglob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"\x99")
        run(source, tmp_path / "out")
        assert content(tmp_path / "out") == content(tmp_path / "undisturbed")

    @pytest.mark.parametrize("change", ["source", "option"])
    def test_starts_over_for_another_conversion(self, tmp_path: Path, source: Handmade, change: str):
        self.interrupt(source, tmp_path / "out", 0.9)
        if change == "source":
            write(source.folder, {name: tensor + 1 for name, tensor in source.tensors.items()}, shards=3)
        assert run(source, tmp_path / "out", keep_norms=change == "option").resumed_shards == 0

    def test_a_source_that_changes_meanwhile_is_refused(self, tmp_path: Path, source: Handmade):
        path = next(source.folder.glob("*.safetensors"))
        self.interrupt(source, tmp_path / "out", 0.5, do=lambda: path.write_bytes(path.read_bytes()))
        assert not (tmp_path / "out").exists()

    def test_two_runs_at_once(self, tmp_path: Path, source: Handmade):
        def second(done: int, total: int) -> None:
            with pytest.raises(InputError, match="another run"):
                run(source, tmp_path / "out")

        run(source, tmp_path / "out", progress=second)
        assert_folded(tmp_path / "out", source, absent=set(source.names.norms))

    @pytest.mark.slow
    def test_a_full_disk(self, tmp_path: Path):
        """A limit on the size of a file stands in for a disk that is full: the error comes from the same call."""
        source = make(tmp_path / "source", shards=3)
        write(source.folder, source.tensors | {"x": torch.zeros(1 << 18)}, shards=3)
        script = f"""
import resource
from pathlib import Path
from handmade import make, write
from conversion import run
from flashnorm.errors import InputError
source = make(Path({str(tmp_path / "unused")!r}), shards=3)
source.folder = Path({str(source.folder)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
try:
    run(source, Path({str(tmp_path / "out")!r}))
except InputError as error:
    print(error)
"""
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert "make room and run the same command again" in result.stdout, result.stderr
        assert not (tmp_path / "out").exists()
        # `x` comes first, in the first shard, so nothing was finished.
        assert not (tmp_path / ".out.flashnorm-partial").exists()
        run(source, tmp_path / "out")
        assert "x" in tensors_of(tmp_path / "out")
