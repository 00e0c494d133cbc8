"""Widely used models at their published size: one config a file, and the table of what the planner makes of each.

* The hyperparameters are as published in the model's config.json: those of the architecture only, without what is about
  quantization, generation or training.
* Gemma 3n is its language model alone: its image tower needs a package of its own.
* Norms are those of the language model. Those of the towers, which read images and audio, are counted apart.

`python tests/architectures/published.py` prints the table as markdown.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import flashnorm
from flashnorm.plan import Kept, Kind
from flashnorm.planning.config import load_config
from flashnorm.trace.build import meta_model

FOLDER = Path(__file__).with_suffix("")

# Modules that read images or audio, or project what those make of them.
_TOWER = re.compile(
    r"(^|\.)(visual|vision_\w+|audio_\w+|embed_vision|embed_audio|multi_modal_projector|mm_projector)\."
)
# Version of transformers and model type: there, its forward fails whatever it is given.
BROKEN = {("5.24.0", "llama4")}  # it reads `image_outputs` of the language model's output, which has none
_COLUMNS = ("model", "type", "parameters", "norms", "folded", "kept", "why kept", "linears", "tower norms", "seconds")


@dataclass(frozen=True)
class Published:
    """What the planner makes of one model.

    Attributes:
        name: the hub id.
        model_type: `config.model_type`.
        parameters: how many, with towers.
        norms: how many norm weights the language model has.
        folded: how many of them fold.
        kept: why the others stay -> how many.
        unknown: how many of these stay for want of a rule.
        linears: how many weights take a gain.
        tower_norms: how many norm weights the towers have, as far as they were traced.
        seconds: of one core, to build the model on the meta device and to plan it.
    """

    name: str
    model_type: str
    parameters: int
    norms: int
    folded: int
    kept: dict[str, int]
    unknown: int
    linears: int
    tower_norms: int
    seconds: float


def configs() -> dict[str, Path]:
    """Hub id -> the file that holds the model's config."""
    return {_name(path): path for path in sorted(FOLDER.glob("*.json"), key=_name)}


def runs(path: Path) -> bool:
    """Whether this version of transformers can run the model of a config file."""
    return (transformers.__version__, json.loads(path.read_text())["model_type"]) not in BROKEN


def plan_published(path: Path) -> Published:
    """Plan the model of a config file at full size. No weights exist, so this needs little memory."""
    start = time.process_time()
    model = meta_model(load_config(path))
    plan = flashnorm.plan(model)
    seconds = time.process_time() - start
    folds = [fold for fold in plan.folds if not _TOWER.search(fold.norm)]
    others = {norm: why for norm, why in plan.kept.items() if not _TOWER.search(norm)}
    kept = Counter(_short(why) for why in others.values())
    return Published(
        name=_name(path),
        model_type=plan.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        norms=len(folds) + len(others),
        folded=len(folds),
        kept=dict(kept),
        unknown=sum(why.kind is Kind.UNKNOWN for why in others.values()),
        linears=len({linear.name for fold in folds for linear in fold.linears}),
        tower_norms=plan.norms - len(folds) - len(others),
        seconds=seconds,
    )


def markdown(rows: Iterable[Published]) -> str:
    """The table."""
    cells = [
        (
            row.name,
            row.model_type,
            f"{row.parameters / 1e9:.2f}B",
            row.norms,
            row.folded,
            sum(row.kept.values()),
            "; ".join(f"{count} {why}" for why, count in row.kept.items()),
            row.linears,
            row.tower_norms,
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *cells]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _name(path: Path) -> str:
    return path.stem.replace("--", "/")


def _short(kept: Kept) -> str:
    """A reason that is the same in every layer, and in every model with a tied output head."""
    return "tied" if kept.kind is Kind.TIED else re.sub(r"\.\d+\.", ".*.", kept.reason)


def main() -> None:
    """Print the table, sorted by name. One thread, so that the times are those of one core."""
    torch.set_num_threads(1)
    print(markdown(plan_published(path) for path in configs().values() if runs(path)))


if __name__ == "__main__":
    main()
