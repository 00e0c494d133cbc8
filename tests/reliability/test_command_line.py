"""What the command says to files and places that cannot be used: one message, status 2, no traceback."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashnorm
import tiny
from flashnorm.errors import InputError

pytestmark = pytest.mark.slow  # each test runs commands

GATE, DOWN = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "source", tiny.model(tiny.config("llama"), torch.bfloat16))


@pytest.fixture
def converted(source: Path) -> Path:
    return flashnorm.convert(source, source.parent / "converted").target


def without_override() -> None:
    """Even root does not read what it may not: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are dropped."""
    if os.geteuid() == 0:
        for capability in (1, 2):
            assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


def run(*arguments: str | Path, output: str = os.devnull) -> tuple[int, str]:
    with open(output, "w") as stdout:
        result = subprocess.run(
            [sys.executable, "-m", "flashnorm", *map(str, arguments)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            preexec_fn=without_override,
            timeout=120,
            check=False,
        )
    assert "Traceback" not in result.stderr
    return result.returncode, result.stderr


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: value}, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_may_not_be_read(source: Path, name: str) -> None:
    (source / name).chmod(0)
    code, said = run("convert", source, source.parent / "out")
    assert code == 2
    assert f"{name}: cannot be read (Permission denied)" in said
    assert not (source.parent / "out").exists()


def test_a_place_that_may_not_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir(mode=0o555)
    code, said = run("convert", source, tmp_path / "place" / "out")
    assert code == 2
    assert "cannot be written (Permission denied)" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_finds_no_room(source: Path) -> None:
    code, said = run("plan", source, "--json", output="/dev/full")
    assert (code, said) == (2, "flashnorm: the output cannot be written (No space left on device)\n")


@pytest.mark.parametrize("shape", [(96, 63), (95, 64), (), (0, 64)])
@pytest.mark.parametrize("name", [GATE, DOWN])
def test_a_shape_that_is_not_the_architecture_s(
    source: Path, converted: Path, name: str, shape: tuple[int, ...]
) -> None:
    change(converted, name, torch.ones(shape, dtype=torch.bfloat16))
    message = f"expected {name} with shape"
    with pytest.raises(InputError, match=message):
        flashnorm.load(converted)
    report = flashnorm.verify(source, converted)
    assert not report.ok
    assert report.outputs is not None
    assert message in str(report.outputs.skipped)
    change(source, name, torch.ones(shape, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=message):
        flashnorm.convert(source, source.parent / "out")
    with pytest.raises(InputError, match=message):
        flashnorm.verify(source, converted, weights_only=True)


@pytest.mark.parametrize("value", [torch.ones(63), torch.ones(1, 64), torch.ones(64, dtype=torch.int64)])
def test_a_source_s_norm_of_another_form(source: Path, converted: Path, value: torch.Tensor) -> None:
    change(source, NORM, value)
    with pytest.raises(InputError, match=NORM):
        flashnorm.verify(source, converted, weights_only=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_carried_and_reported(source: Path, value: float) -> None:
    change(source, GATE, torch.full((96, 64), value, dtype=torch.bfloat16))
    target = flashnorm.convert(source, source.parent / "out").target
    assert not load_file(target / "model.safetensors")[GATE].isfinite().any()
    report = flashnorm.verify(source, target, weights_only=True)
    assert report.ok
    assert "are infinite or NaN" in str(report)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\xfd"])
def test_a_text_that_is_none(source: Path, converted: Path, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "text").write_bytes(text)
    with pytest.raises(InputError, match="expected a text"):
        flashnorm.verify(source, converted, text=tmp_path / "text")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_text_that_is_no_file(source: Path, converted: Path, tmp_path: Path, make) -> None:
    make(tmp_path / "text")
    with pytest.raises(InputError, match="expected a file, found a"):
        flashnorm.verify(source, converted, text=tmp_path / "text")
