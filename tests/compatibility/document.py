"""`docs/compatibility.md`."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compatibility.checks import CHECKS
from compatibility.environments import REPOSITORY, TORCH, TRANSFORMERS

DOCUMENT = REPOSITORY / "docs" / "compatibility.md"

EXPLANATION = f"""\
# Compatibility

Written by `make compatibility`, which makes an environment for each row in `.venv-compat`, installs the wheel there,
and tries it. The oldest versions are those that are supported, the newest those that the package index has, within the
bounds of `pyproject.toml` or beyond: when the row of a newer version holds, its bound is raised.

The pin, which `make test` runs with, is transformers {TRANSFORMERS} and torch {TORCH}.

* *contracts*: `tests/contracts`, what is asked of upstreams. *proofs, fused runs*: `tests/cpu` and `tests/models`.
  *real models*: `tests/real`. *its own tests*: the tests of this integration.
* *greedy text*: SmolLM2-135M in float32, optimised, next to plain Transformers; and whose code `generate` ran: the
  fused loop, the fused layers in Transformers' loop, or Transformers' own.
* *decode*: tokens a second of the optimised SmolLM2-135M in bfloat16, divided by those of the pin. Two processes take
  turns; ratio of the medians (range of the turns). The pin's own row is the noise. No row passes or fails by it.
* *new types*: causal language model types that the next older Transformers in the table lacks, as in
  [architectures.md](architectures.md).
* *Transformers' tests*: `ModelTesterMixin` of its source distribution, on tiny Llama, Qwen3, Mistral and Gemma 3.
"""


def machine() -> str:
    """In a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def document(rows: Sequence[dict[str, Any]]) -> str:
    """From the rows: `{"name", "versions", "machine", "problem", "results": {check: {"cell", "details"}}}`."""
    columns = list(dict.fromkeys(title for title, _ in CHECKS.values()))
    lines = [*EXPLANATION.splitlines(), "", _line(["environment", "found inside", *columns])]
    lines.append(_line(["---"] * (2 + len(columns))))
    notes: list[str] = []
    for row in rows:
        cells = dict.fromkeys(columns, "")
        if row["problem"]:
            cells[columns[0]] = f"not tried: {row['problem']}"
        for check, result in row["results"].items():
            title = CHECKS[check][0]
            cells[title] = result["cell"]
            if result["details"]:
                notes += [
                    "",
                    f"### {row['name']}: {title}",
                    "",
                    *(f"* {_cell(detail)}" for detail in result["details"]),
                ]
        inside = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
        lines.append(_line([row["name"], inside, *cells.values()]))
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    lines += ["", f"Machine: {machines}.", *(["", "## Details", *notes] if notes else [])]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ").strip()[:300]
