"""MLX's build for processors, through mlx-lm."""

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import convert
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


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


def without_weights(folder: Path) -> nn.Module:
    """A weightless folder in mlx-lm: the patch that it would need."""
    model, config = load_model(folder, strict=False)
    names = config.get("flashnorm", {}).get("weightless", [])
    norms = [(name.removesuffix(".weight"), Weightless(config["rms_norm_eps"])) for name in names]
    model.update_modules(tree_unflatten(norms))
    expected = {name for name, _ in tree_flatten(model.parameters())}
    found = {name for file in folder.glob("*.safetensors") for name in mx.load(str(file))}
    if absent := expected - found:
        raise ValueError(f"{sorted(absent)[0]} is absent, and not in the list of weightless norms")
    return model


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """Converted by `mlx_lm.convert`, which needs a tokenizer; without one, or if `variant` is "patched", as it is."""
    if variant == "patched":
        return Model(without_weights(folder))
    if (folder / "tokenizer.json").exists():
        convert(str(folder), str(scratch / "mlx"), dtype="float32")
        folder = scratch / "mlx"
    return Model(load_model(folder)[0])
