"""The picture of a plan: kinds of layers, with what happens to their norms."""

from flashnorm.plan import Fold, FoldPlan, Kept, Linear
from flashnorm.verify.layers import LayerKind, NormInLayer, layer_kinds


def fold(norm: str, *linears: str, offset: float = 0.0) -> Fold:
    return Fold(norm, offset, tuple(Linear(name, 1) for name in linears))


def test_layers_of_two_kinds_and_what_is_outside() -> None:
    """Layers 0, 1 and 3 are dense, 2 has experts; the final norm stays."""
    folds = []
    for layer in range(4):
        at = f"model.layers.{layer}"
        folds.append(fold(f"{at}.in.weight", f"{at}.attn.q.weight", f"{at}.attn.k.weight"))
        mlp = [f"{at}.mlp.{i}.up.weight" for i in range(3)] if layer == 2 else [f"{at}.mlp.up.weight"]
        folds.append(fold(f"{at}.post.weight", *mlp, offset=1.0))
    kept = {
        f"model.layers.{layer}.attn.q_norm.weight": Kept("it adds", "aten.add", f"model.layers.{layer}.attn (m.py:1)")
        for layer in range(4)
    }
    kept["model.norm.weight"] = Kept("tied")
    attention = NormInLayer("in.weight", "w", ("attn.q.weight", "attn.k.weight"))
    stays = NormInLayer("attn.q_norm.weight", None, why="it adds (aten.add, attn (m.py:1))")
    dense = (attention, NormInLayer("post.weight", "1 + w", ("mlp.up.weight",)), stays)
    experts = (attention, NormInLayer("post.weight", "1 + w", ("mlp.*.up.weight",)), stays)
    kinds = layer_kinds(FoldPlan("x", tuple(folds), kept))
    assert kinds == [
        LayerKind("model.layers", (0, 1, 3), dense),
        LayerKind("model.layers", (2,), experts),
        LayerKind("", (), (NormInLayer("model.norm.weight", None, why="tied"),)),
    ]
    assert [kind.title for kind in kinds] == ["model.layers 0-1, 3", "model.layers 2", "outside the layers"]
