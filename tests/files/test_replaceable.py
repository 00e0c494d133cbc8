"""`--force` deletes a folder only if `convert` wrote everything in it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flashnorm.errors import InputError
from flashnorm.files.replaceable import check_contents, check_hashes
from handmade import content, listed

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "assets/.hidden/words": b"a b"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "out", listed(FILES))


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def check(folder: Path) -> None:
    check_hashes(folder, check_contents(folder))


def test_what_convert_wrote_may_go(folder: Path):
    check(folder)
    # So may what is left of it.
    (folder / "model.safetensors").unlink()
    (folder / "assets" / ".hidden" / "words").unlink()
    check(folder)


def test_an_empty_folder_may_go(tmp_path: Path):
    check(tmp_path)


@pytest.mark.parametrize("name", ["notes", ".env", "assets/notes", ".git/HEAD", "assets/.hidden/.git/HEAD", "a\nb"])
def test_other_files_are_named(folder: Path, name: str):
    written(folder, {name: b"mine"})
    named = name.split(".git")[0] + ".git/" if ".git" in name else name
    with pytest.raises(InputError) as refused:
        check(folder)
    assert f"found {named!r}, not listed in flashnorm.json; move what you need out of it" in str(refused.value)


def test_many_other_files_are_counted(folder: Path):
    written(folder, dict.fromkeys(("1", "2", "3", "4", ".git/HEAD", ".git/config"), b""))
    with pytest.raises(InputError, match=r"found '\.git/', '1', '2' and 2 more, not listed"):
        check(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("config.json"),
        lambda path: path.symlink_to("assets"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: os.mkfifo(path),
    ],
    ids=["empty folder", "link", "link to a folder", "dangling link", "pipe"],
)
@pytest.mark.parametrize("name", ["mine", "model.safetensors"])
def test_what_is_no_file_stays(folder: Path, make: Callable[[Path], object], name: str):
    """Under a name of its own, or under one that is listed."""
    if name == "model.safetensors":
        (folder / name).unlink()
    make(folder / name)
    with pytest.raises(InputError, match=name):
        check(folder)


@pytest.mark.parametrize("data", [b"weightS", b"longer than before"])
def test_changed_files_are_named(folder: Path, data: bytes):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"found 'model\.safetensors', changed since"):
        check(folder)


def test_a_clone_of_a_model_is_no_conversion(tmp_path: Path):
    written(tmp_path, dict.fromkeys((".git/HEAD", "README.md", "config.json", "model.safetensors"), b""))
    with pytest.raises(InputError, match=r"found '\.git/', 'README\.md', 'config\.json' and 1 more, and no flashnorm"):
        check(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": []}',
        b'{"files": {}}',
        b'{"files": {"letter": {}}}',
        b'{"files": {"letter": {"sha256": "0", "size": 6}}}',
        b'{"files": {"letter/": {"sha256": "0", "size": 6}, "/": {"sha256": "0", "size": 0}}}',
        b'{"files": {"../out/letter": {"sha256": "0", "size": 6}, "./letter": {"sha256": "0", "size": 6}}}',
        b'{"files": {"flashnorm.json": {"sha256": "0", "size": 57}}}',
    ],
)
def test_a_manifest_that_is_damaged_or_made_up_deletes_nothing(tmp_path: Path, manifest: bytes):
    folder = written(tmp_path / "out", {"letter": b"Dear A", "flashnorm.json": manifest})
    with pytest.raises(InputError):
        check(folder)


def test_a_manifest_that_is_a_link_is_not_ours(tmp_path: Path):
    elsewhere = written(tmp_path / "elsewhere", listed(FILES))
    folder = written(tmp_path / "out", FILES)
    (folder / "flashnorm.json").symlink_to(elsewhere / "flashnorm.json")
    with pytest.raises(InputError, match=r"'flashnorm\.json', changed"):
        check(folder)


def test_the_manifest_of_another_folder_lists_nothing_here(tmp_path: Path, folder: Path):
    other = written(tmp_path / "other", {name: data.upper() for name, data in FILES.items()})
    other.joinpath("flashnorm.json").write_bytes((folder / "flashnorm.json").read_bytes())
    with pytest.raises(InputError, match="changed since"):
        check(other)
    assert json.loads((folder / "flashnorm.json").read_bytes())["files"].keys() == FILES.keys()
    assert content(folder) == listed(FILES)
