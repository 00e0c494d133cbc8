"""`import flashnorm`: its names, and what they import. Each test has a Python of its own, since imports stay."""

import subprocess
import sys
from pathlib import Path

import pytest

import flashnorm
import tiny

# What runs models on fused kernels, and so asks more of Transformers than anything else.
CPU = {f"flashnorm.cpu.{name}" for name in ("optimize", "layers", "fused", "ops", "kernels")}
CPU |= {"flashnorm.decoding.structure"}
GPU = {f"flashnorm.gpu.{name}" for name in ("kernels", "launch", "ops", "decoder", "optimize")}


def python(code: str, *arguments: object) -> str:
    """What a script prints."""
    line = [sys.executable, "-W", "error::ImportWarning", "-c", code, *map(str, arguments)]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("interface") / "source", tiny.model(tiny.config("llama")))


@pytest.mark.slow
def test_names() -> None:
    """`dir` and `from flashnorm import *` show all, before anything was asked for; other names are not there."""
    code = """
import flashnorm
assert set(flashnorm.__all__) <= set(dir(flashnorm))
from flashnorm import *
print(*sorted(name for name in flashnorm.__all__ if name in globals()))
"""
    assert python(code).split() == sorted(flashnorm.__all__) == sorted(flashnorm._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        flashnorm.optimise  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "",
        "import flashnorm.verify.weights, flashnorm.convert, flashnorm.plan",
        "import flashnorm; flashnorm.verify; import flashnorm.verify.page, flashnorm.convert, flashnorm.plan",
    ],
)
def test_functions_with_the_name_of_a_module(before: str, source: Path, tmp_path: Path) -> None:
    """`flashnorm.plan`, `convert` and `verify` are functions, whatever was imported before."""
    code = """
import sys, flashnorm
source, out = sys.argv[1:]
assert flashnorm.plan(source).folds
flashnorm.convert(source, out)
print(flashnorm.verify(source, out, weights_only=True).ok)
import flashnorm.verify.weights, flashnorm.verify as verify
from flashnorm.verify.weights import verify_weights
from flashnorm import convert
assert flashnorm.verify is verify and callable(verify) and callable(convert)
assert sys.modules["flashnorm.verify.weights"].verify_weights is verify_weights
"""
    assert python(before + code, source, tmp_path / "out") == "True\n"


HELP = """
import sys
from flashnorm import cli
commands = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
helpful = [["--help"], ["--version"], *([command, "--help"] for command in commands)]
wrong = [["nonsense"], *([command] for command in commands), *([command, "--nonsense"] for command in commands)]
for line in (*helpful, *wrong):
    sys.argv = ["flashnorm", *line]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == (0 if line in helpful else cli.UNUSABLE), line
    else:
        assert False, line
"""


def test_the_version_is_told_without_building_the_commands() -> None:
    code = "import sys\nfrom flashnorm import cli\nsys.argv[1:] = ['--version']\n"
    found = python(f"{code}try:\n    cli.main()\nfinally:\n    print(*sys.modules, sep='\\n')")
    assert found.startswith("flashnorm ")
    assert not {"torch", "transformers", "pydantic"} & {*found.split()}


@pytest.mark.parametrize("code", ["import flashnorm", HELP], ids=["import", "help and wrong arguments"])
def test_what_uses_no_model_imports_neither_torch_nor_transformers(code: str) -> None:
    found = python(f"{code}\nimport sys; print(*sys.modules, sep='\\n')")
    assert not {"torch", "transformers"} & {*found.split()}
    assert "flashnorm" in found.split()


@pytest.mark.parametrize("module", ["flashnorm.convert.part", "flashnorm.verify.part"])
def test_a_worker_imports_no_transformers(module: str) -> None:
    found = python(f"import sys, {module}\nprint(*sys.modules, sep='\\n')").split()
    assert "torch" in found
    assert not {"transformers", "huggingface_hub"} & {*found}


COMMANDS = """
import sys, flashnorm
from flashnorm.cli import app
source, out = sys.argv[1:]
for line in (["plan", source], ["convert", source, out], ["verify", source, out, "--weights-only"],
             ["verify", out, "--weights-only"]):
    app(line, standalone_mode=False)
assert flashnorm.plan(source).folds
assert flashnorm.verify(source, out, weights_only=True).ok
flashnorm.fold_, flashnorm.load  # found, though not what `load` runs at the end
"""


@pytest.mark.slow
def test_runtime_is_imported_when_it_is_used(source: Path, tmp_path: Path) -> None:
    found = python(COMMANDS + "print(*sys.modules, sep='\\n')", source, tmp_path / "out").split()
    assert "flashnorm.convert" in found
    assert not (CPU | GPU) & {*found}


@pytest.mark.slow
def test_nothing_for_a_gpu_is_imported_for_a_model_on_the_cpu(source: Path) -> None:
    code = """
import sys, transformers, flashnorm
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
flashnorm.status(flashnorm.optimize(model))
print(*sys.modules, sep='\\n')
"""
    found = {*python(code, source).split()}
    assert "flashnorm.cpu.optimize" in found
    assert not GPU & found


@pytest.mark.slow
def test_commands_where_the_runtime_does_not_fit(source: Path, tmp_path: Path) -> None:
    """A Transformers without what the runtime needs of it: everything else works."""
    broken = """
import sys, types, transformers.generation.utils
from transformers import AutoModelForCausalLM
from transformers.generation import configuration_utils
from transformers.models.llama import modeling_llama
del configuration_utils.GenerationMode
sys.modules["transformers.utils.output_capturing"] = types.ModuleType("emptied")
transformers.utils.output_capturing = sys.modules["transformers.utils.output_capturing"]
"""
    end = """
try:
    flashnorm.optimize
except ImportError as error:
    print("refused:", error)
"""
    assert "refused:" in python(broken + COMMANDS + end, source, tmp_path / "out")
