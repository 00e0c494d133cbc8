"""A dry run says what the conversion then does, writes nothing, and fetches only headers and norms."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashnorm
import tiny
from flashnorm.errors import InputError
from flashnorm.files.strict_json import MAX_BYTES
from forked import Commands, assert_refused, forked_commands
from hub_server import Hub, hub_server


def source(folder: Path, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Path:
    tiny.save(folder, tiny.model(tiny.config("llama", **sizes), dtype))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "runs").mkdir()
    return folder


def everything(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "options", [{}, {"keep_norms": True}, {"keep": ["final"]}, {"keep": ["*.post_attention_layernorm"]}]
)
def test_it_says_what_the_conversion_does(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = source(tmp_path / "source")
    before = everything(tmp_path)
    said = flashnorm.dry_run(folder, tmp_path / "out", **options)
    assert everything(tmp_path) == before
    done = flashnorm.convert(folder, tmp_path / "out", **options)
    assert (said.plan, said.linears, said.left_out) == (done.plan, done.linears, done.left_out)
    assert said.left_out == ("optimizer.pt", "runs/")
    sizes = {path.name: path.stat().st_size for path in done.target.iterdir()}
    assert said.written == {"model.safetensors": sizes["model.safetensors"]}
    assert said.copied == {name: sizes[name] for name in ("generation_config.json", "tokenizer.json")}
    assert json.loads(said.to_json())["bytes_needed"] == said.needed == sum((said.written | said.copied).values())


def test_it_tells_values_that_rule_out_a_fold(tmp_path: Path) -> None:
    """A LayerNorm's bias that cannot be divided by a gain of zero."""
    folder = tiny.save(tmp_path / "source", tiny.model(tiny.config("stablelm", use_qkv_bias=False)))
    tensors = load_file(folder / "model.safetensors")
    norm = "model.layers.0.input_layernorm"
    tensors[f"{norm}.weight"][3] = 0
    tensors[f"{norm}.bias"][3] = 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = flashnorm.dry_run(folder, tmp_path / "out")
    assert "cannot be divided by its gain: 1 / 0 in channel 3" in said.plan.kept[f"{norm}.weight"].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_tells_what_only_weights_can_decide(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = source(tmp_path / "source", dtype)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][0] = 3000
    for name in tensors:
        if "norm" in name and "layers.0.input" not in name:
            tensors[name].clamp_(max=1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    undecided = flashnorm.dry_run(folder, tmp_path / "out").undecided
    if dtype is torch.bfloat16:
        assert not undecided
    else:
        ((norm, why),) = undecided.items()
        assert norm == "model.layers.0.input_layernorm.weight"
        assert why.startswith("its largest gain is 3000, and a product in model.layers.0.self_attn.")


def test_it_refuses_what_the_conversion_refuses(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    out = flashnorm.convert(folder, tmp_path / "out").target
    with pytest.raises(InputError, match="exists"):
        flashnorm.dry_run(folder, out)
    assert flashnorm.dry_run(folder, out, force=True).written
    with pytest.raises(InputError, match="converted already"):
        flashnorm.dry_run(out, tmp_path / "again")
    with pytest.raises(InputError, match="outside of the source"):
        flashnorm.dry_run(folder, folder / "out")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as running:
        yield running


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    home = str(tmp_path_factory.mktemp("home"))
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": home, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    absent = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "HF_TOKEN", "TRANSFORMERS_OFFLINE")
    with forked_commands(environment | dict.fromkeys(absent)) as commands:
        yield commands


@pytest.mark.slow
def test_on_the_hub_it_fetches_headers_and_norms(hub: Hub, run: Commands, tmp_path: Path) -> None:
    folder = source(tmp_path / "source", vocab_size=20_000)
    hub.publish("org/large", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    (folder / "runs").rmdir()  # as on the hub, which has no empty folders
    result = run("convert", "org/large", tmp_path / "out", "--dry-run", "--json")
    assert result.returncode == 0, result
    said, expected = json.loads(result.stdout), flashnorm.dry_run(folder, tmp_path / "out").to_dict()
    assert {**said, "source": "", "bytes_free": 0} == {**expected, "source": "", "bytes_free": 0}
    assert not (tmp_path / "out").exists()
    sent = [request for request in hub.requests if request.method == "GET" and request.address == hub.storage]
    asked = [request.headers["Range"] for request in sent]
    ranges = [tuple(map(int, one.removeprefix("bytes=").split("-"))) for one in asked]
    size = (folder / "model.safetensors").stat().st_size
    # Half a megabyte is asked for at first, which is more than the header; then the norms.
    assert 0 < sum(end + 1 - start for start, end in ranges) < (1 << 19) + 50_000 < size / 4
    assert "tokenizer.json" not in hub.fetched("org/large")


@pytest.mark.slow
def test_what_is_not_on_the_hub(hub: Hub, run: Commands, tmp_path: Path) -> None:
    assert_refused(run("convert", "org/none", tmp_path / "out", "--dry-run"), "org/none", "check the name")
    hub.publish("org/empty", {"config.json": b"{}", "pytorch_model.bin": b""})
    assert_refused(run("convert", "org/empty", tmp_path / "out", "--dry-run"), "org/empty:", "pickles only")


@pytest.mark.slow
def test_a_damaged_header_on_the_hub_is_not_fetched(hub: Hub, run: Commands, tmp_path: Path) -> None:
    """The file is as large as its header claims to be, so that the size alone does not show the damage."""
    damaged = (MAX_BYTES + 1).to_bytes(8, "little") + bytes(MAX_BYTES + 1)
    hub.publish("org/damaged", {"config.json": b'{"model_type": "llama"}', "model.safetensors": damaged})
    before = len(hub.requests)
    result = run("convert", "org/damaged", tmp_path / "out", "--dry-run")
    assert_refused(result, "org/damaged/model.safetensors", f"a header of at most {MAX_BYTES} bytes")
    sent = {one.headers["Range"] for one in hub.requests[before:] if one.method == "GET" and "Range" in one.headers}
    assert sent == {"bytes=0-22", "bytes=0-524287"}  # the config, and the first half megabyte of the weights


@pytest.mark.slow
def test_on_the_hub_at_a_revision_in_a_subfolder(hub: Hub, run: Commands, tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    files = {f"inner/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}
    commit = hub.publish("org/inside", files)
    hub.publish("org/inside", {"config.json": b"{}"})
    said = run("convert", "org/inside", tmp_path / "out", "--dry-run", "--revision", commit, "--subfolder", "inner")
    assert said.returncode == 0, said
    assert "would fold 5 norms into 11 tensors" in said.stdout
    for options in (["--subfolder", "inner"], ["--subfolder", "../x"], ["--revision", "none"]):
        assert_refused(run("convert", "org/inside", tmp_path / "out", "--dry-run", *options), "org/inside")
