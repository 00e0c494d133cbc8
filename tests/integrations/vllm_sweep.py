"""Every language model type that Transformers and vLLM both know: a tiny one in vLLM, converted against its source.

* `make vllm-architectures`, in the environment of `make test-vllm`, writes `docs/vllm-architectures.md`.
* `python tests/integrations/vllm_sweep.py TYPE ...` (with `PYTHONPATH=tests`) replaces the rows of single types.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import vllm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.registry import ModelRegistry

import flashnorm
from architectures import causal, configs
from flashnorm.errors import brief
from integrations.conftest import difference, job, vllm_environment

TABLE = Path(__file__).parents[2] / "docs" / "vllm-architectures.md"
SAME, NOTHING, REFUSED, WRONG, NOT_RUN = "same", "nothing folds", "refused", "WRONG", "not run"
TOLERANCE = 1e-3  # of log-probabilities
TIMEOUT = 600  # seconds for the two runs of a type

# vLLM's attention on the CPU has kernels for certain sizes only, and reads fields that Transformers' configs lack.
SIZES = {
    "hidden_size": 128,
    "n_embd": 128,
    "n_head": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "index_head_dim": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
LATENT = {"head_dim": 64}
BESIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "falcon": {"ffn_hidden_size": 512},
    "glm4_moe": {"head_dim": 64},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "granitemoehybrid": {"mamba_d_head": 32},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 32, "route_norm": True, "qk_norm": True},
    "lfm2": {"conv_dim": 128, "block_dim": 128, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0},
    "llama4_text": {"attention_chunk_size": 128, "num_experts_per_tok": 1},
    "mamba2": {"num_heads": 4},
}

EXPLANATION = """\
A tiny model of every language model type that both Transformers and vLLM know, with random weights, gains far from one,
in float32; `make vllm-architectures` writes this table. The converted checkpoint runs in the same vLLM as its source.

* *vectors* of norms that vLLM has as parameters for the source, and how many are *gone* in the converted model.
* *difference*: the largest, of the log-probabilities of the best few tokens, over 48 generated tokens.
* *same*: all tokens are identical, and the difference is at most 1e-3; random weights amplify the rounding of float32.
* *nothing folds*: the checkpoint stays as it is. *refused*: with the reason. *not run*: there is no tiny model, or vLLM
  itself does not run it on this machine: what it says of the source.
"""


@dataclass(frozen=True)
class Row:
    """What was found about a model type; the cells of the table."""

    model_type: str
    vectors: str = ""
    gone: str = ""
    difference: str = ""
    result: str = NOT_RUN
    note: str = ""


HEADINGS = ["type", "vectors", "gone", "difference", "result", "note"]


def model_types() -> list[str]:
    """The causal language model types whose class vLLM knows."""
    known = ModelRegistry.get_supported_archs()
    return sorted(name for name, of_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if of_class in known)


def examine(model_type: str, folder: Path) -> Row:
    """Everything about one type; the row says what went wrong."""
    besides = configs.BESIDES.get(model_type, {}) | BESIDES.get(model_type, {})
    try:
        with (
            patch.dict(configs.SIZES, SIZES),
            patch.dict(configs.LATENT, LATENT),
            patch.dict(configs.BESIDES, {model_type: besides}),
        ):
            causal.build(model_type).float().save_pretrained(folder / "source")
    except Exception as error:
        return Row(model_type, note=f"no tiny model: {brief(error)}")
    try:
        flashnorm.convert(folder / "source", folder / "converted")
    except flashnorm.InputError as error:
        nothing = "expected norms that can be folded, found none" in str(error)
        return Row(model_type, result=NOTHING if nothing else REFUSED, note="" if nothing else brief(error))
    found = run(folder, [job(name, folder / name, options={"max_model_len": 64}) for name in ("source", "converted")])
    source, converted = (found.get(name, {"error": "its process died"}) for name in ("source", "converted"))
    if "error" in source:
        return Row(model_type, note=f"vLLM, of the source: {source['error']}")
    # Everything that is taken away is a vector of a norm.
    norms = {name for name in source["vectors"] if "norm" in name or "ln_" in name}
    if "error" in converted:
        refused = converted["error"].startswith("InputError: ")
        return Row(model_type, str(len(norms)), result=REFUSED if refused else WRONG, note=converted["error"])
    gone = set(source["vectors"]) - set(converted["vectors"])
    try:
        largest = difference(converted, source)
    except AssertionError:
        largest = float("inf")
    same = converted["tokens"] == source["tokens"] and largest <= TOLERANCE and gone and gone <= norms
    return Row(model_type, str(len(norms)), str(len(gone)), f"{largest:.0e}", SAME if same else WRONG)


def run(folder: Path, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """What `vllm_jobs.py` says of the jobs; nothing of those that its process did not live to do."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    results = folder / "results.json"
    command = [sys.executable, Path(__file__).with_name("vllm_jobs.py"), folder / "jobs.json", results]
    with (folder / "jobs.log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False, env=vllm_environment(folder)
        )
    return json.loads(results.read_text()) if results.exists() else {}


def cells(row: Row) -> list[str]:
    """As Markdown has them; a note is one line without paths, and not long."""
    note = " ".join(row.note.split()).replace("|", "\\|")
    return [*astuple(row)[:-1], note if len(note) <= 200 else note[:200] + " ..."]


def read_table() -> dict[str, list[str]]:
    """The rows that the table has."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = [[cell.strip() for cell in line[2:-1].split(" |", len(HEADINGS) - 1)] for line in lines if line[:2] == "| "]
    return {row[0]: row for row in rows if row[0] not in (HEADINGS[0], "---")}


def write_table(rows: dict[str, list[str]]) -> None:
    """Write the table, with a summary and the versions before it."""
    counts = Counter(row[HEADINGS.index("result")] for row in rows.values())
    versions = f"vLLM {vllm.__version__}, PyTorch {version('torch')}, Transformers {version('transformers')}"
    summary = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    lines = [" | ".join(row) for row in [HEADINGS, ["---"] * len(HEADINGS), *(rows[name] for name in sorted(rows))]]
    table = "\n".join(f"| {line} |" for line in lines)
    TABLE.write_text(f"# Architectures in vLLM\n\n{EXPLANATION}\n{versions}: {summary}.\n\n{table}\n")


def main() -> None:
    """Examine types, one after the other, and write down each at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="replace the rows of these alone")
    types = parser.parse_args().types
    known = model_types()
    rows = {name: row for name, row in read_table().items() if name in known}
    for model_type in types or known:
        with tempfile.TemporaryDirectory() as scratch:
            row = examine(model_type, Path(scratch))
        print(*astuple(row), sep="  ", flush=True)
        rows[model_type] = cells(row)
        write_table(rows)


if __name__ == "__main__":
    main()
