"""Files are written as they should be, in windows or not; a staging folder is published whole or not at all."""

import os
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashnorm.errors import InputError
from flashnorm.files import direct_io
from flashnorm.files.ahead import ahead
from flashnorm.files.direct_io import BLOCK, DirectReader, DirectWriter, buffers, sha256_of
from flashnorm.files.records import file_record
from flashnorm.files.staging import ShardRecord, Staging, copy_file, write_file
from flashnorm.format import FileRecord
from handmade import OLD, content

sizes = st.lists(st.integers(0, 3 * BLOCK) | st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1]), max_size=8)


@pytest.fixture(params=["direct", "through the page cache"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "direct":
        monkeypatch.setattr(direct_io, "_DIRECT", 0)


@pytest.mark.usefixtures("direct")
class TestWindows:
    def test_writes_and_reads_any_windows(self, tmp_path: Path):
        path = tmp_path / "file"

        @settings(max_examples=60, deadline=None)
        @given(sizes=sizes, ahead_by=st.integers(1, 3))
        def check(sizes: list[int], ahead_by: int) -> None:
            content = os.urandom(sum(sizes))
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            ring = buffers(ahead_by, 3 * BLOCK)
            with DirectWriter(path) as writer:
                waiting = []
                for size, end in zip(sizes, ends, strict=True):
                    buffer = next(ring)
                    writer.window(size, buffer)[:] = content[end - size : end]
                    waiting.append((size, buffer))
                    if len(waiting) == ahead_by:
                        writer.write(*waiting.pop(0))
                for size, buffer in waiting:
                    writer.write(size, buffer)
                writer.finish()
            assert path.read_bytes() == content
            with DirectReader(path) as reader:
                for start, end in pairwise([0, *ends]):
                    assert reader.read(start, end - start, next(ring)) == content[start:end]

        check()

    def test_a_file_that_is_too_short_is_refused(self, tmp_path: Path):
        path = tmp_path / "file"
        path.write_bytes(bytes(5000))
        with DirectReader(path) as reader, pytest.raises(InputError, match="shorter"):
            reader.read(4000, 1001, next(buffers(1, 2 * BLOCK)))

    def test_hashes_a_file(self, tmp_path: Path):
        path = tmp_path / "file"
        record = write_file(path, os.urandom((1 << 24) + BLOCK + 17))  # more than is read at once
        assert sha256_of(path) == record.sha256
        assert file_record(path) == record


def test_falls_back_where_direct_io_is_refused_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some file systems let a file be opened for direct I/O and refuse the read or write."""
    monkeypatch.setattr(direct_io, "BLOCK", 100)
    path = tmp_path / "file"
    content = os.urandom(1234)
    ring = buffers(1, 2000)
    with DirectWriter(path) as writer:
        buffer = next(ring)
        writer.window(len(content), buffer)[:] = content
        writer.write(len(content), buffer)
        writer.finish()
    with DirectReader(path) as reader:
        assert reader.read(150, 1000, next(ring)) == content[150:1150]


def test_a_missing_source_is_refused(tmp_path: Path):
    for read in (DirectReader, sha256_of, lambda path: copy_file(path, tmp_path / "copy")):
        with pytest.raises(InputError, match="absent"):
            read(tmp_path / "absent")


class TestAhead:
    def test_passes_items_on_in_order(self):
        assert list(ahead((i for i in range(100)), 3)) == list(range(100))

    def test_holds_no_more_items_than_it_may(self):
        alive, most = set(), 0

        def items():
            nonlocal most
            for i in range(50):
                alive.add(i)
                most = max(most, len(alive))
                yield i

        for i in ahead(items(), 3):
            alive.discard(i)
        assert most <= 3

    def test_passes_errors_on(self):
        def items():
            yield 1
            raise InputError("no")

        stage = ahead(items(), 2)
        assert next(stage) == 1
        with pytest.raises(InputError, match="no"):
            next(stage)

    def test_stops_when_the_consumer_stops(self):
        closed = threading.Event()

        def items():
            try:
                while True:
                    yield 1
            finally:
                closed.set()

        stage = ahead(ahead(items(), 2), 2)
        assert next(stage) == 1
        stage.close()
        assert closed.is_set()


class TestStaging:
    KEY = {"plan": 1}  # noqa: RUF012

    def finish_shard(self, staging: Staging, name: str, data: bytes = b"weights") -> None:
        record = write_file(staging.model / name, data)
        staging.record(name, ShardRecord(source=FileRecord("00", 1), output=record))

    def old(self, folder: Path) -> Path:
        """A folder that `--force` may replace."""
        folder.mkdir(parents=True)
        for name, data in OLD.items():
            (folder / name).write_bytes(data)
        return folder

    def test_publishes_and_leaves_nothing_else(self, tmp_path: Path):
        with Staging(tmp_path / "new" / "out", self.KEY) as staging:
            self.finish_shard(staging, "a")
            write_file(staging.model / "config.json", b"{}")
            assert not staging.target.exists()
            staging.publish()
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]
        assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["a", "config.json"]

    def test_without_a_finished_shard_nothing_is_left(self, tmp_path: Path):
        with suppress(KeyboardInterrupt), Staging(tmp_path / "out", self.KEY) as staging:
            (staging.model / "a").write_bytes(b"half")
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_keeps_finished_shards_for_the_same_key_only(self, tmp_path: Path):
        def interrupted(key: dict[str, int]) -> Staging:
            with suppress(KeyboardInterrupt), Staging(tmp_path / "out", key) as staging:
                kept.append(staging.earlier("a") is not None)
                self.finish_shard(staging, "a")
                (staging.model / "b").write_bytes(b"half")
                raise KeyboardInterrupt
            assert [path.name for path in staging.model.iterdir()] == ["a"]
            return staging

        kept: list[bool] = []
        interrupted(self.KEY)
        interrupted(self.KEY)
        interrupted({"plan": 2})
        assert kept == [False, True, False]

    def test_a_damaged_journal_is_no_journal(self, tmp_path: Path):
        with suppress(KeyboardInterrupt), Staging(tmp_path / "out", self.KEY) as staging:
            self.finish_shard(staging, "a")
            raise KeyboardInterrupt
        (staging.folder / "journal.json").write_text('{"key": {"plan": 1}, "shards": [')
        with Staging(tmp_path / "out", self.KEY) as staging:
            assert staging.earlier("a") is None
            assert list(staging.model.iterdir()) == []

    def test_locks_out_a_second_run(self, tmp_path: Path):
        with Staging(tmp_path / "out", self.KEY) as staging:
            with pytest.raises(InputError, match="another run"), Staging(tmp_path / "out", self.KEY):
                pass
            self.finish_shard(staging, "a")
            staging.publish()
        assert (tmp_path / "out" / "a").exists()

    def test_a_target_that_exists_is_refused(self, tmp_path: Path):
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match="exists"):
            Staging(tmp_path / "out", self.KEY)

    def test_force_replaces_a_model(self, tmp_path: Path):
        old = self.old(tmp_path / "out")
        with Staging(old, self.KEY, force=True) as staging:
            write_file(staging.model / "config.json", b"new")
            assert content(old) == OLD
            staging.publish()
        assert content(old) == {"config.json": b"new"}
        assert list(tmp_path.iterdir()) == [old]

    def test_force_replaces_where_the_system_cannot_exchange(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: None)
        self.test_force_replaces_a_model(tmp_path)

    def test_an_exchange_that_was_cut_in_half_is_undone(self, tmp_path: Path):
        self.old(tmp_path / ".out.flashnorm-partial" / "replaced")
        with suppress(KeyboardInterrupt), Staging(tmp_path / "out", self.KEY, force=True):
            raise KeyboardInterrupt
        assert content(tmp_path / "out") == OLD

    @pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt, SystemExit])
    def test_an_exchange_that_fails_half_way_is_undone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
    ):
        """The old model is aside when the new one cannot take its place."""
        monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: None)
        rename = Path.rename

        def fails(path: Path, target: Path) -> Path:
            if path.name == "model":
                raise stop
            return rename(path, target)

        old = self.old(tmp_path / "out")

        def exchange() -> None:
            with Staging(old, self.KEY, force=True) as staging:
                write_file(staging.model / "config.json", b"new")
                monkeypatch.setattr(Path, "rename", fails)
                staging.publish()

        with pytest.raises(stop):
            exchange()
        assert content(old) == OLD
        assert list(tmp_path.iterdir()) == [old]

    def test_the_lock_is_removed_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Another run may begin as soon as it is gone."""
        removed: list[str] = []
        unlink = Path.unlink
        monkeypatch.setattr(Path, "unlink", lambda path: (removed.append(path.name), unlink(path)))
        with Staging(tmp_path / "out", self.KEY) as staging:
            self.finish_shard(staging, "a")
            for name in ("x", "y", "z"):
                (staging.folder / name).touch()
            staging.publish()
        assert sorted(removed) == ["journal.json", "lock", "x", "y", "z"]
        assert removed[-1] == "lock"

    def test_a_folder_that_the_other_run_has_just_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(Path, "mkdir", lambda path, **options: None)
        with pytest.raises(InputError, match="another run"), Staging(tmp_path / "out", self.KEY):
            pass

    @pytest.mark.skipif(not os.path.ismount("/proc"), reason="there is no mount point to try")
    @pytest.mark.parametrize("force", [False, True])
    def test_a_mount_point_is_refused(self, force: bool):
        with pytest.raises(InputError, match="found a mount point; choose a folder in it: /proc/"):
            Staging(Path("/proc"), {}, force=force)

    def test_force_replaces_nothing_but_a_folder(self, tmp_path: Path):
        self.old(tmp_path / "old")
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("old")
        (tmp_path / "nowhere").symlink_to("absent")
        for name in ("file", "link", "nowhere"):
            with pytest.raises(InputError, match="expected a folder that convert wrote"):
                Staging(tmp_path / name, self.KEY, force=True)

    @pytest.mark.parametrize("when", ["before", "while it runs", "while it runs, and the target is new"])
    def test_what_is_put_into_the_target_stays(self, tmp_path: Path, when: str):
        """It is found just before the old model would go. What is finished is kept for a repeated run."""
        target = tmp_path / "out"
        if "new" not in when:
            self.old(target)
        if when == "before":
            (target / "notes").touch()

        def replace() -> None:
            with Staging(target, self.KEY, force=True) as staging:
                self.finish_shard(staging, "a")
                target.mkdir(exist_ok=True)
                (target / "notes").touch()
                staging.publish()

        with pytest.raises(InputError, match="'notes'"):
            replace()
        (target / "notes").unlink()
        assert content(target) == (OLD if "new" not in when else {})
        with Staging(target, self.KEY, force=True) as staging:
            assert (staging.earlier("a") is None) == (when == "before")
            write_file(staging.model / "config.json", b"new")
            staging.publish()
        assert (target / "config.json").read_bytes() == b"new"
        assert list(tmp_path.iterdir()) == [target]

    def test_a_file_of_the_target_that_is_changed_while_it_runs_stays(self, tmp_path: Path):
        """Its size stays, and so does its time: whoever writes can set that."""
        path = self.old(tmp_path / "out") / "model.safetensors"
        before = path.stat()

        def replace() -> None:
            with Staging(tmp_path / "out", self.KEY, force=True) as staging:
                path.write_bytes(b"new")
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
                staging.publish()

        with pytest.raises(InputError, match=r"'model\.safetensors', changed since"):
            replace()
        assert path.read_bytes() == b"new"

    def test_files_are_read_once(self, tmp_path: Path):
        """Touched ones are read again, and are still ours."""
        for touched in (False, True):
            read: list[tuple[int, int]] = []
            old = self.old(tmp_path / f"out{touched}")
            with Staging(
                old, self.KEY, force=True, progress=lambda *numbers, read=read: read.append(numbers)
            ) as staging:
                if touched:
                    (old / "config.json").touch()
                staging.publish()
            assert read == [(2, 5), (5, 5)] * (1 + touched)

    def test_a_link_in_the_place_of_the_staging_folder_is_not_cleared(self, tmp_path: Path):
        home = self.old(tmp_path / "home")
        (tmp_path / ".out.flashnorm-partial").symlink_to("home")
        (tmp_path / ".other.flashnorm-partial").mkdir()
        (tmp_path / ".other.flashnorm-partial" / "model").symlink_to(home)
        for name in ("out", "other"):
            with pytest.raises(InputError, match="found a link"), Staging(tmp_path / name, self.KEY):
                pass
        assert content(home) == OLD

    def test_a_place_that_cannot_be_written_is_refused(self):
        with pytest.raises(InputError, match="cannot be written"), Staging(Path("/proc/out"), self.KEY):
            pass
