"""Code that comes with a checkpoint runs with --trust-remote-code, and never without it."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flashnorm
import planted
from flashnorm.errors import InputError
from flashnorm.models.load import load_tokenizer
from flashnorm.models.status import folder_status
from forked import Commands, assert_refused, forked_commands

pytestmark = pytest.mark.slow  # each test runs commands

FLAG = "--trust-remote-code"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    home = tmp_path_factory.mktemp("home")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    with forked_commands(environment) as commands:
        yield commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture
def witness(folder: Path) -> Path:
    """The file in which planted code leaves its names; absent, until it runs."""
    path = folder / "witness"
    path.unlink(missing_ok=True)
    return path


@pytest.fixture(scope="module")
def custom(folder: Path) -> Path:
    """A model that only the code beside it can build."""
    return planted.custom_model(folder / "custom", folder / "witness")


@pytest.fixture(scope="module")
def custom_out(custom: Path, run: Commands) -> Path:
    out = custom.with_name("custom-out")
    result = run("convert", custom, out, FLAG)
    assert result.returncode == 0, result
    return out


@pytest.fixture(scope="module")
def known(folder: Path) -> Path:
    """A model that Transformers knows, with code beside it that its files name all the same."""
    return planted.known_model(folder / "known", folder / "witness")


@pytest.fixture(scope="module")
def known_out(known: Path, run: Commands) -> Path:
    out = known.with_name("known-out")
    result = run("convert", known, out)
    assert result.returncode == 0, result
    assert (out / "modeling_planted.py").exists()
    return out


def test_commands_on_a_custom_model_are_refused_without_the_flag(
    run: Commands, custom: Path, custom_out: Path, witness: Path, tmp_path: Path
) -> None:
    for command in (
        ["plan", custom],
        ["convert", custom, tmp_path / "out"],
        ["verify", custom, custom_out],
        ["verify", custom_out, "--weights-only"],
        ["generate", custom_out, "t5 t6"],
        ["status", custom_out],
        ["status", custom],
    ):
        assert_refused(run(*command), "config.json", f"run with {FLAG} only")
    assert not witness.exists()
    assert not [*tmp_path.iterdir()]


def test_functions_on_a_custom_model_refuse_it_without_the_flag(
    custom: Path, custom_out: Path, witness: Path, tmp_path: Path
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: flashnorm.plan(custom),
        lambda: flashnorm.convert(custom, tmp_path / "out"),
        lambda: flashnorm.verify(custom, custom_out),
        lambda: flashnorm.verify(custom_out, weights_only=True),
        lambda: flashnorm.load(custom_out),
        lambda: folder_status(custom_out),
        lambda: load_tokenizer(custom_out),
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"run with {FLAG} only"):
            call()
    assert not witness.exists()
    assert not [*tmp_path.iterdir()]


def test_a_known_model_runs_on_the_code_of_transformers_without_the_flag(
    run: Commands, known: Path, known_out: Path, witness: Path, tmp_path: Path
) -> None:
    for command in (
        ["plan", known],
        ["convert", known, tmp_path / "out", "--verify"],
        ["verify", known, known_out],
        ["verify", known_out, "--weights-only"],
        ["status", known_out],
        ["status", known],
    ):
        result = run(*command)
        assert result.returncode == 0, result
    # There is no text without its tokenizer, which only its own code can build.
    assert_refused(run("generate", known_out, "t5 t6"), "tokenizer", f"run with {FLAG} only")
    assert type(flashnorm.load(known_out)).__module__ == "transformers.models.llama.modeling_llama"
    assert not witness.exists()


@pytest.mark.parametrize("auto_map", ["tokenization_planted.PlantedTokenizer", 5, {"AutoTokenizer": 5}, [], [5, 5]])
def test_a_tokenizer_that_names_its_code_in_another_form(
    known_out: Path, witness: Path, tmp_path: Path, auto_map: Any
) -> None:
    folder = shutil.copytree(known_out, tmp_path / "copy")
    planted.change(folder / "tokenizer_config.json", auto_map=auto_map)
    with pytest.raises(InputError, match=FLAG):
        load_tokenizer(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "planted"},
        {"model_type": "planted", "auto_map": {"AutoConfig": "configuration_planted.PlantedConfig"}},
        {"model_type": "planted", "auto_map": {"AutoConfig": "org/other--configuration_planted.PlantedConfig"}},
        {"model_type": "../known/configuration_planted"},
        {"model_type": "modeling_planted", "auto_map": {}},
        {"auto_map": {"AutoConfig": 5}},
        {"auto_map": 5},
        {"attn_implementation": "org/kernels"},
    ],
)
def test_a_config_that_asks_for_code_is_refused(
    known: Path, witness: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    folder = shutil.copytree(known, tmp_path / "copy")
    planted.change(folder / "config.json", **keys)
    for call in (flashnorm.plan, lambda source: flashnorm.convert(source, tmp_path / "out")):
        with pytest.raises(InputError):
            call(folder)
    assert not (tmp_path / "out").exists()
    assert not witness.exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"architectures": ["modeling_planted.PlantedForCausalLM"]},
        {"architectures": ["PlantedForCausalLM", "dynamic_module_utils", "__file__", ""]},
        {"tokenizer_class": "tokenization_planted.PlantedTokenizer", "processor_class": "processing_planted"},
        {"auto_map": {"AutoModelForCausalLM": "org/other--modeling_planted.PlantedForCausalLM"}},
        {"auto_map": {"AutoConfig": "org/other--configuration_planted.PlantedConfig"}},
        {"custom_generate": ".", "trust_remote_code": True, "code_revision": "main"},
    ],
)
def test_a_config_that_names_code_which_nothing_needs(
    known: Path, witness: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    folder = shutil.copytree(known, tmp_path / "copy")
    planted.change(folder / "config.json", **keys)
    assert len(flashnorm.plan(folder).folds) == 3
    out = flashnorm.convert(folder, tmp_path / "out").target
    assert type(flashnorm.load(out)).__name__ == "LlamaForCausalLM"
    assert not witness.exists()


def test_a_custom_model_runs_on_its_own_code_with_the_flag(
    run: Commands, custom: Path, custom_out: Path, witness: Path
) -> None:
    planned = run("plan", custom, FLAG)
    assert planned.returncode == 0, planned
    assert "planted: 3 norms, 3 folded into 6 linears, 0 kept" in planned.stdout
    assert "modeling_planted" in witness.read_text()
    for command, expected in (
        (["verify", custom, custom_out], "is the same model as"),
        (["verify", custom_out, "--weights-only"], "is whole"),
        (["generate", custom_out, "t5 t6", "--max-new-tokens", "2"], "t5 t6"),
        (["status", custom_out], "a FlashNorm checkpoint of planted, 3 norms folded"),
    ):
        result = run(*command, FLAG)
        assert result.returncode == 0, result
        assert expected in result.stdout
    assert "tokenization_planted" in witness.read_text()


def test_a_custom_model_is_loaded_with_the_flag(
    custom: Path, custom_out: Path, witness: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Transformers copies the code there to import it.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = flashnorm.load(custom_out, trust_remote_code=True)
    assert type(model).__name__ == "PlantedForCausalLM"
    assert not [name for name, _ in model.named_parameters() if "norm" in name]
    assert "modeling_planted" in witness.read_text()
