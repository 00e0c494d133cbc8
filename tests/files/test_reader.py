"""A checkpoint is read as it was written, and a damaged one is refused with a message that names file and remedy."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

import flashnorm
from flashnorm.errors import InputError
from flashnorm.files.header import encode_header, parse_header, read_header
from flashnorm.files.reader import Checkpoint
from flashnorm.files.strict_json import MAX_BYTES

TENSORS = {
    "a": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "b": torch.arange(5, dtype=torch.float32),
    "c": torch.zeros(0, 7, dtype=torch.float16),
    "d": torch.tensor(2.5, dtype=torch.float64),
    "e": torch.tensor([1, 2, 3], dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in two shards."""
    shards = {"one.safetensors": ("a", "b"), "two.safetensors": ("c", "d", "e")}
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file, {"format": "pt"})
    write_index(tmp_path, {name: file for file, names in shards.items() for name in names})
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    return tmp_path


def write_index(folder: Path, weight_map: object, metadata: object = None) -> None:
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def file_of(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def test_reads_what_was_written(folder: Path):
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(TENSORS)
    assert list(checkpoint.headers) == ["one.safetensors", "two.safetensors"]
    assert checkpoint.headers["one.safetensors"].metadata == {"format": "pt"}
    assert checkpoint.config == {"model_type": "tiny"}
    assert checkpoint.total_size == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for name, tensor in TENSORS.items():
        assert_same(checkpoint.read_tensor(name), tensor)


def test_a_single_file_needs_no_index(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.index is None
    assert set(checkpoint.tensors) == set(TENSORS)


def test_a_single_file_comes_before_an_index_of_other_files(folder: Path):
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.index is None
    assert set(checkpoint.tensors) == {"x"}
    write_index(folder, {"x": "model.safetensors"})
    assert Checkpoint.open(folder).index["weight_map"] == {"x": "model.safetensors"}


def test_a_link_to_a_blob_is_followed(tmp_path: Path):
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    (snapshot / "config.json").write_text("{}")
    assert_same(Checkpoint.open(snapshot).read_tensor("a"), TENSORS["a"])


def test_other_dtypes_are_read_as_bytes(tmp_path: Path):
    entry = {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}
    (tmp_path / "model.safetensors").write_bytes(file_of({"x": entry}, b"abc"))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read_bytes("x") == b"abc"
    with pytest.raises(InputError, match="F4"):
        checkpoint.read_tensor("x")


def test_a_changed_file_is_noticed(folder: Path):
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_unchanged()
    with (folder / "two.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"two\.safetensors.*changed"):
        checkpoint.check_unchanged()


def test_the_header_is_written_as_the_library_writes_it():
    raw = save(TENSORS, {"format": "pt"})
    length = int.from_bytes(raw[:8], "little")
    header = parse_header(raw[8 : 8 + length], len(raw), Path("x"))
    entries = ((name, info.dtype, info.shape, info.nbytes) for name, info in header.tensors.items())
    assert encode_header(entries, header.metadata) == raw[: 8 + length]


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("not a folder", lambda folder: Path(folder / "config.json"), "a file"),
        ("no folder", lambda folder: folder / "absent", "found nothing"),
        ("no config", lambda folder: (folder / "config.json").unlink(), r"config\.json"),
        ("config not JSON", lambda folder: (folder / "config.json").write_text("{"), r"config\.json: expected JSON"),
        ("config a list", lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
        ("missing shard", lambda folder: (folder / "two.safetensors").unlink(), r"1 missing: two\.safetensors"),
        ("truncated shard", lambda folder: truncate(folder / "two.safetensors", -3), "truncated"),
        ("truncated header", lambda folder: truncate(folder / "two.safetensors", 60), "a header of"),
        ("empty shard", lambda folder: (folder / "two.safetensors").write_bytes(b""), "at least 8 bytes"),
        ("longer shard", lambda folder: append(folder / "two.safetensors"), "longer"),
        ("index not JSON", lambda folder: (folder / "model.safetensors.index.json").write_text("x"), "expected JSON"),
        ("index empty", lambda folder: write_index(folder, {}), "weight_map"),
        ("index of lists", lambda folder: write_index(folder, {"a": ["one.safetensors"]}), "not to be trusted"),
        ("index goes up", lambda folder: write_index(folder, {"a": "../one.safetensors"}), "not to be trusted"),
        ("index absolute", lambda folder: write_index(folder, {"a": "/one.safetensors"}), "not to be trusted"),
        ("index other drive", lambda folder: write_index(folder, {"a": "c:\\one.safetensors"}), "not to be trusted"),
        ("index other file", lambda folder: write_index(folder, {"a": "config.json"}), "not to be trusted"),
        ("index lacks a tensor", lambda folder: amend_index(folder, b=None), "1 missing, in one.safetensors"),
        ("index names another shard", lambda folder: amend_index(folder, a="two.safetensors"), "found it in one"),
        (
            "index with other metadata",
            lambda folder: write_index(folder, {"a": "one.safetensors"}, 0),
            "metadata as an",
        ),
        ("no index", lambda folder: (folder / "model.safetensors.index.json").unlink(), "without an index"),
        ("pickles only", lambda folder: only_pickles(folder), "save_pretrained"),
    ],
)
def test_refused(folder: Path, name: str, break_it, message: str):
    changed = break_it(folder)
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.open(changed if isinstance(changed, Path) else folder)
    assert str(folder) in str(caught.value)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def amend_index(folder: Path, **entries: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"] | entries
    write_index(folder, {name: file for name, file in weight_map.items() if file})


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file_of(b"{"), "a header in JSON"),
        (file_of(b"\xff\xfe"), "a header in JSON"),
        (file_of(b"[" * 100_000), "a header in JSON"),
        (file_of(b'{"\\ud800": 1}'), "a header in JSON"),
        (file_of([]), "a JSON object"),
        (file_of(b'{"x": {}, "x": {}}'), "'x' twice"),
        (file_of({"x": {"dtype": "F32"}}), "dtype, shape and data_offsets of tensor x"),
        (file_of({"x": F32 | {"more": 1}}, bytes(8)), "dtype, shape and data_offsets"),
        (file_of({"x": F32 | {"dtype": "F5"}}, bytes(8)), "found 'F5'"),
        (file_of({"x": F32 | {"shape": [-2]}}, bytes(8)), "non-negative"),
        (file_of({"x": F32 | {"shape": [2.0]}}, bytes(8)), "non-negative"),
        (file_of({"x": F32 | {"shape": [True, 2]}}, bytes(8)), "non-negative"),
        (file_of({"x": F32 | {"shape": [2**70]}}, bytes(8)), "non-negative"),
        (file_of({"x": F32 | {"shape": [2**62, 2**62]}}, bytes(8)), "bytes for tensor x"),
        (file_of({"x": F32 | {"shape": [3]}}, bytes(8)), "12 bytes for tensor x"),
        (file_of({"x": F32 | {"data_offsets": [8, 0]}}, bytes(8)), "8 bytes for tensor x"),
        (file_of({"x": F32, "y": F32}, bytes(8)), "overlaps"),
        (file_of({"x": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "hole"),
        (file_of({"x": F32}, bytes(7)), "truncated"),
        (file_of({"x": F32, "__metadata__": {"a": 1}}, bytes(8)), "__metadata__"),
        ((MAX_BYTES + 1).to_bytes(8, "little"), "at most"),
        (b"\xff" * 8, "at most"),
        (b"\x01", "at least 8 bytes"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3))
def test_any_json_is_a_header_or_refused(header: dict):
    raw = json.dumps(header).encode()
    size = 8 + len(raw) + 8
    try:
        parsed = parse_header(raw, size, Path("x"))
    except InputError:
        return
    assert sum(info.nbytes for info in parsed.tensors.values()) == 8


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_checkpoint_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    raw = bytearray(save(TENSORS, {"format": "pt"}))
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    try:
        parsed = read_header(path)
    except InputError:
        return
    assert max(info.end for info in parsed.tensors.values()) == len(raw)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_config.json", "an adapter without its model; give the model"),
        ("model_index.json", "a diffusers pipeline"),
        ("model.Q4_K_M.gguf", "a GGUF file; give the checkpoint"),
        ("params.json", "fetch the version for Transformers"),
        ("tokenizer.json", "; fetch the whole repository"),
    ],
)
def test_a_folder_of_something_else(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("{}")
    for read in (Checkpoint.open, flashnorm.plan):
        with pytest.raises(InputError, match=rf"found no config\.json in it.*{said}"):
            read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=said):
        Checkpoint.open(tmp_path)
