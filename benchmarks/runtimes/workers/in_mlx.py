"""MLX's build for processors, through mlx-lm."""

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import convert
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


class Model:
    """A model of mlx-lm."""

    gains = None

    def __init__(self, folder: Path):
        self.version = f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
        self.model, _ = load_model(folder)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Without a cache."""
        return np.array(self.model(mx.array([ids]))[0].astype(mx.float32))

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy, by the loop of `mlx_lm.generate`."""
        steps = generate_step(mx.array(ids), self.model, max_tokens=tokens, sampler=lambda x: mx.argmax(x, axis=-1))
        return [int(token) for token, _ in steps]


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """Converted by `mlx_lm.convert`, which needs a tokenizer; a folder without one is loaded as it is."""
    if (folder / "tokenizer.json").exists():
        convert(str(folder), str(scratch / "mlx"), dtype="float32")
        folder = scratch / "mlx"
    return Model(folder)
