"""MLX's build for processors, through mlx-lm."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm import convert
from mlx_lm.generate import generate_step
from mlx_lm.utils import _get_classes, load_model


class Model:
    """A model of mlx-lm."""

    gains, note = None, ""

    def __init__(self, model: nn.Module):
        self.version = f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
        self.model = model

    def logits(self, ids: list[int]) -> np.ndarray:
        """Without a cache."""
        return np.array(self.model(mx.array([ids]))[0].astype(mx.float32))

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy, by the loop of `mlx_lm.generate`."""
        steps = generate_step(mx.array(ids), self.model, max_tokens=tokens, sampler=lambda x: mx.argmax(x, axis=-1))
        return [int(token) for token, _ in steps]


class Weightless(nn.Module):
    """What is to stand where a norm has no weight."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, self.eps)


def weightless_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """What a weightless folder needs in mlx-lm: its classes, with other modules where norms have no weight."""
    model_class, arguments = _get_classes(config)
    names = config.get("flashnorm", {}).get("weightless", [])

    def build(of: Any) -> nn.Module:
        model = model_class(of)
        norms = [(name.removesuffix(".weight"), Weightless(config["rms_norm_eps"])) for name in names]
        return model.update_modules(tree_unflatten(norms)) if norms else model

    return build, arguments


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """Converted by `mlx_lm.convert`, which needs a tokenizer; without one, or if `variant` is "patched", as it is."""
    if variant == "patched":
        return Model(load_model(folder, get_model_classes=weightless_classes)[0])
    if (folder / "tokenizer.json").exists():
        convert(str(folder), str(scratch / "mlx"), dtype="float32")
        folder = scratch / "mlx"
    return Model(load_model(folder)[0])
