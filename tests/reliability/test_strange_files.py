"""Files that are not what they seem: each is refused with its name and what to do, and nothing waits for it."""

import json
import os
import shutil
import signal
import socket
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import tiny
from flashnorm.convert.acceptance import check_places
from flashnorm.convert.whole import convert_checkpoint
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.files.strict_json import MAX_BYTES, parse_object
from flashnorm.planning.config import MAX_LAYERS
from flashnorm.planning.planned import plan
from flashnorm.trace import build as models
from handmade import Handmade, content, make

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"
NAMES = ("config.json", INDEX, SHARD, "README.md", "tokenizer.json")


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Whoever waits for a pipe is woken, and fails."""
    signal.alarm(30)
    yield
    signal.alarm(0)


@pytest.fixture
def source(tmp_path: Path) -> Handmade:
    made = make(tmp_path / "source", shards=3)
    for name in ("README.md", "tokenizer.json"):
        (made.folder / name).write_text("{}")
    return made


def convert(source: Handmade) -> dict[str, bytes]:
    target = source.folder.parent / "out"
    convert_checkpoint(source.planned(), target)
    return content(target)


def refused(source: Handmade, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(source)
    assert not (source.folder.parent / "out").exists()
    assert not list(source.folder.parent.glob(".*"))


class TestJson:
    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (b'{"a": {"b": 1, "c": 2, "b": 1}}', "'b' twice"),
            (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "more than 100 deep"),
            (b'{"a":' * 100_000, "nested too deeply"),
            (b'{"a": "\\ud800"}', "surrogate"),
            (b'{"\\udfff": 1}', "surrogate"),
            (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
            (b'\xff\xfe{"a": 1}', "utf-8"),
            (b"null", "NoneType"),
        ],
    )
    def test_refused(self, raw: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_object(raw)

    def test_twins_among_many_keys_are_found_at_once(self) -> None:
        keys = [f'"{i}": 0' for i in range(200_000)]
        with pytest.raises(ValueError, match="'199999' twice"):
            parse_object(f"{{{', '.join([*keys, keys[-1]])}}}".encode())

    @pytest.mark.parametrize("name", ["config.json", INDEX])
    def test_a_key_that_comes_twice(self, source: Handmade, name: str) -> None:
        path = source.folder / name
        path.write_text('{"metadata": {}, "metadata": {}, ' + path.read_text()[1:])
        refused(source, rf"{name}: expected JSON, found something else \(the key 'metadata' twice")

    @pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
    def test_more_than_the_limit_is_refused_unread(self, source: Handmade, name: str) -> None:
        with (source.folder / name).open("r+b") as file:
            file.write((MAX_BYTES + 1).to_bytes(8, "little"))
            file.truncate(2 * MAX_BYTES)
        tracemalloc.start()
        refused(source, rf"{name}: expected .* at most {MAX_BYTES} bytes")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()

    def test_infinity_and_nan_in_a_config_are_carried(self, source: Handmade) -> None:
        path = source.folder / "config.json"
        path.write_text('{"limit": [0.0, Infinity, -Infinity, NaN, -0.0]}')
        assert b"Infinity,\n    -Infinity,\n    NaN,\n    -0.0" in convert(source)["config.json"]


class TestLinks:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("absolute", [False, True])
    def test_one_that_leads_out(self, source: Handmade, name: str, absolute: bool) -> None:
        outside = source.folder.parent / "secret"
        shutil.move(source.folder / name, outside)
        (source.folder / name).symlink_to(outside if absolute else "../secret")
        refused(source, rf"{name}: expected a file of this folder, found a link to .*secret")

    @pytest.mark.parametrize("name", NAMES)
    def test_one_within_the_folder(self, source: Handmade, name: str) -> None:
        expected = convert(source)
        shutil.rmtree(source.folder.parent / "out")
        (source.folder / ".git").mkdir()  # is not copied
        shutil.move(source.folder / name, source.folder / ".git" / "blob")
        (source.folder / name).symlink_to(".git/blob")
        assert convert(source) == expected

    def hub_snapshot(self, source: Handmade, blobs: Path) -> None:
        """Make a snapshot of the hub's cache of a source; its blobs lie elsewhere."""
        repository = source.folder.parent / "models--a--b"
        snapshot = repository / "snapshots" / ("0123456789" * 4)
        snapshot.mkdir(parents=True)
        blobs.mkdir(parents=True)
        for path in source.folder.iterdir():
            shutil.move(path, blobs / f"blob of {path.name}")
            (snapshot / path.name).symlink_to(f"../../blobs/blob of {path.name}")
        source.folder = snapshot

    def test_a_snapshot_of_the_hub_consists_of_links(self, source: Handmade) -> None:
        expected = convert(source)
        shutil.rmtree(source.folder.parent / "out")
        self.hub_snapshot(source, source.folder.parent / "models--a--b" / "blobs")
        target = source.folder.parents[2] / "out"
        convert_checkpoint(source.planned(), target, source_id=None)
        found = content(target)
        assert found.keys() == expected.keys()
        assert all(found[name] == expected[name] for name in expected if name not in ("README.md", "flashnorm.json"))

    @pytest.mark.parametrize("shared", [False, True])
    def test_a_folder_of_links_into_the_cache_of_the_hub(self, source: Handmade, tmp_path: Path, shared: bool) -> None:
        expected = convert(source)
        shutil.rmtree(source.folder.parent / "out")
        repository = tmp_path / "cache" / "models--a--b"
        for folder in ("snapshots", "blobs"):
            (repository / folder).mkdir(parents=True)
        store = tmp_path / "cache" / "blobs" / "ab"
        store.mkdir(parents=True)
        (store.parent / ".huggingface-shared-blobs").write_text("1\n")
        for path in [*source.folder.iterdir()]:
            blob = repository / "blobs" / f"blob of {path.name}"
            kept = shutil.move(path, store / f"content of {path.name}" if shared else blob)
            if shared:
                blob.symlink_to(kept)
            path.symlink_to(blob)
        assert convert(source) == expected

    @pytest.mark.parametrize("where", ["blobs", "blobs/ab", "models--a--b/other"])
    def test_what_only_looks_like_the_cache_of_the_hub(self, source: Handmade, tmp_path: Path, where: str) -> None:
        (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
        (tmp_path / where).mkdir(parents=True)
        kept = shutil.move(source.folder / "config.json", tmp_path / where / "ab12")
        (source.folder / "config.json").symlink_to(kept)
        refused(source, r"config\.json: expected a file of this folder, found a link to .*ab12")

    def test_a_snapshot_whose_blobs_are_elsewhere(self, source: Handmade, tmp_path: Path) -> None:
        self.hub_snapshot(source, tmp_path / "etc")
        (source.folder.parents[1] / "blobs").symlink_to(tmp_path / "etc")
        with pytest.raises(InputError, match=r"found a link to .*/etc/blob of config\.json"):
            source.open()

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("to", ["absent", "loop"])
    def test_one_that_leads_nowhere(self, source: Handmade, name: str, to: str) -> None:
        (source.folder / name).unlink()
        (source.folder / name).symlink_to(name if to == "loop" else "absent")
        refused(source, name)

    def test_a_linked_folder(self, source: Handmade, tmp_path: Path) -> None:
        """It would not be copied, silently."""
        (tmp_path / "elsewhere").mkdir()
        (source.folder / "1_Pooling").symlink_to(tmp_path / "elsewhere")
        refused(source, "1_Pooling: expected a folder, found a link to one")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its address must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero: has no end
    except PermissionError:
        pytest.skip("only root can make devices")


@pytest.mark.parametrize(
    ("put", "kind"),
    [(pipe, "a named pipe"), (listening, "a socket"), (device, "a device"), (Path.mkdir, "a folder")],
    ids=["pipe", "socket", "device", "folder"],
)
class TestNoFiles:
    @pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, "README.md"])
    def test_in_place_of_one_that_is_needed(
        self, source: Handmade, name: str, put: Callable[[Path], object], kind: str
    ) -> None:
        (source.folder / name).unlink()
        put(source.folder / name)
        refused(source, f"{name}: expected a file, found {kind}")

    def test_in_place_of_the_single_file(self, source: Handmade, put: Callable[[Path], object], kind: str) -> None:
        (source.folder / INDEX).unlink()
        put(source.folder / "model.safetensors")
        refused(source, f"model.safetensors: expected a file, found {kind}")

    def test_in_place_of_a_config_to_plan(self, tmp_path: Path, put: Callable[[Path], object], kind: str) -> None:
        put(tmp_path / "config.json")
        with pytest.raises(InputError, match=rf"config\.json: expected a file, found {kind}"):
            plan(tmp_path)

    def test_beside_the_others_they_are_not_copied(
        self, source: Handmade, put: Callable[[Path], object], kind: str
    ) -> None:
        put(source.folder / "other")
        converted = convert(source)
        assert "other" not in converted
        left_out = ["other/" if kind == "a folder" else "other"]
        assert json.loads(converted["flashnorm.json"])["source"]["left_out"] == left_out


class TestNames:
    @pytest.mark.parametrize("pair", [("a", "A"), ("\u00e9", "e\u0301"), ("stra\u00dfe", "STRASSE")])
    def test_that_are_one_on_some_file_systems(self, source: Handmade, pair: tuple[str, str]) -> None:
        for name in pair:
            (source.folder / f"{name}.md").write_text(name)
        refused(source, "expected names that differ on every file system")

    @pytest.mark.parametrize("name", ["readme.md", "Config.json", "CONFIG.json"])
    def test_that_are_one_with_a_file_of_ours(self, source: Handmade, name: str) -> None:
        (source.folder / name).write_text("{}")
        refused(source, "expected names that differ on every file system")

    @pytest.mark.parametrize(
        "name",
        ["../x", "/x", "\\x", "a/../x", "c:x", "x\0", ".x", "..", "", "x.safetensors/", "a" * 5000, "x\ud800", "x.bin"],
    )
    def test_in_an_index(self, source: Handmade, name: str) -> None:
        path = source.folder / INDEX
        index = json.loads(path.read_text())
        index["weight_map"]["layer.steps"] = name if name == "x.bin" else name + ".safetensors"
        path.write_text(json.dumps(index))
        refused(source, "not to be trusted|surrogate|1 missing|File name too long")

    def test_shards_that_are_one_on_some_file_systems(self, tmp_path: Path) -> None:
        for name in ("a.safetensors", "A.safetensors"):
            (tmp_path / name).write_bytes(save({name: torch.ones(1)}))
        (tmp_path / "config.json").write_text("{}")
        names = {"a.safetensors": "a.safetensors", "A.safetensors": "A.safetensors"}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
        with pytest.raises(InputError, match=r"found 'A\.safetensors' and 'a\.safetensors'"):
            Checkpoint.open(tmp_path)

    def test_that_are_no_text(self, source: Handmade) -> None:
        name = os.fsdecode(b"\xff\n\x1b[31m.md")
        (source.folder / name).write_text("x")
        assert convert(source)[name] == b"x"


def test_other_configs_for_other_releases(tmp_path: Path) -> None:
    """Transformers would read another file than the one that was checked."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "configuration_files": ["config.4.0.0.json"]}')
    with pytest.raises(InputError, match="remove that key"):
        plan(tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize("count", [MAX_LAYERS + 1, 10**18])
def test_more_layers_than_any_model_has(tmp_path: Path, key: str, part: str | None, count: int) -> None:
    """Transformers would begin to make a list of them; tracing would take hours."""
    config = {key: count}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | ({part: config} if part else config)))
    with pytest.raises(InputError, match=f"at most {MAX_LAYERS} layers, found {key} = {count}"):
        plan(tmp_path)


def test_more_tensors_than_any_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MAX_TENSORS", 75)
    models.meta_model(tiny.config("llama", num_hidden_layers=5))
    with pytest.raises(InputError, match="at most 75 tensors"):
        models.meta_model(tiny.config("llama", num_hidden_layers=10))


def test_other_threads_may_build_what_they_like_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def hooks() -> dict[str, list[int]]:
        found = vars(torch.nn.modules.module).items()
        return {name: list(value) for name, value in found if name.startswith("_global_") and isinstance(value, dict)}

    def build_in_other_thread(*args: Any) -> Any:
        with ThreadPoolExecutor(1) as other:
            large = other.submit(lambda: [torch.nn.Linear(1, 1) for _ in range(100)]).result()
            seen.append((len(large), large[0].weight.device.type, other.submit(hooks).result()))
        return built(*args)

    seen: list[tuple[int, str, dict[str, list[int]]]] = []
    built = models.built
    monkeypatch.setattr(models, "built", build_in_other_thread)
    monkeypatch.setattr(models, "MAX_TENSORS", 75)
    before = hooks()
    models.meta_model(tiny.config("llama", num_hidden_layers=5))
    assert seen == [(100, "cpu", before)]


def test_longer_axes_than_any_model_has() -> None:
    with pytest.raises(InputError, match=r"along an axis, found model\.embed_tokens\.weight of \[17179869184, 64\]"):
        models.meta_model(tiny.config("llama", vocab_size=2**34))


def test_a_target_in_the_source_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "source" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("source/inner")
    for target in ("link", "link/out", "source/inner/../out", "source", "."):
        with pytest.raises(InputError, match="outside of the source"):
            check_places(tmp_path / "source", tmp_path / target)
    check_places(tmp_path / "source", tmp_path / "sourc")
    check_places(tmp_path / "source", tmp_path / "absent" / "out")
