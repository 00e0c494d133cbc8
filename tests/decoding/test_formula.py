"""The proof of the formula leaves the model alone, which may generate for somebody else at the same time."""

import threading
from typing import Any

import pytest
import torch

from decoders import build, text
from flashnorm.decoding import formula


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_the_model_is_not_changed_while_it_is_proven(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(name), text(9)[None]
    compare, used = formula._compare, []

    def used_meanwhile() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    def compared(*arguments: Any) -> None:
        used.append(used_meanwhile())
        compare(*arguments)

    expected, modules, config = used_meanwhile(), str(model), model.config.to_dict()
    attention = model.config._attn_implementation
    monkeypatch.setattr(formula, "_compare", compared)
    formula.read_decoder(model)
    assert len(used) >= 4  # a layer twice, the embedding, and what surrounds the layers
    assert all(torch.equal(found, expected) for found in used)
    assert str(model) == modules
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == attention
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_what_cannot_be_copied_is_shared() -> None:
    model = build("llama")
    vars(model)["busy"] = threading.Lock()
    assert len(formula.read_decoder(model).layers) == len(model.model.layers)
