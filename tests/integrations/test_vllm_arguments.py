"""What the plugin wraps around vLLM's functions, around stand-ins that are given more than vLLM gives them."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.compat import vllm
from flashnorm.integrations.vllm import plugin

ORDINARY, FLASHNORM = SimpleNamespace(model_type="llama"), SimpleNamespace(flash_norm=True)


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "version", lambda: "9.9")
    plugin._say_once.cache_clear()


def config(hf_config: Any, name: str = "a model") -> Any:
    return SimpleNamespace(model=name, hf_config=hf_config)


class Loaders:
    """vLLM's functions, each with one parameter more."""

    def __init__(self) -> None:
        self.called: list[Any] = []

    def initialize_model(
        self, vllm_config: Any, *, model_config: Any = None, draft: Any = None, new: Any = 0
    ) -> nn.Module:
        self.called.append((vllm_config, model_config, draft, new))
        return nn.Linear(1, 1)

    def track_weights_loading(self, model: nn.Module, loaded_weights: Any, strict: bool = True) -> None:
        self.called.append((model, loaded_weights, strict))
        raise ValueError("not initialized from checkpoint")


def test_building_is_given_more(caplog: pytest.LogCaptureFixture) -> None:
    """An ordinary model is built as ever, and that is said once; a FlashNorm model is not built."""
    loaders = Loaders()
    build = plugin._with_weightless_norms(loaders.initialize_model)
    usual = SimpleNamespace(model_config=config(ORDINARY))
    with caplog.at_level(logging.WARNING):
        assert isinstance(build(usual, new=0), nn.Linear)  # at its default, which changes nothing
        assert not caplog.records
        for _ in range(2):
            assert isinstance(build(vllm_config=usual, draft="another config"), nn.Linear)
    assert loaders.called == [(usual, None, None, 0), *[(usual, None, "another config", 0)] * 2]
    (record,) = caplog.records
    assert "9.9" in record.message
    assert "initialize_model is given draft" in record.message
    folded = SimpleNamespace(model_config=config(FLASHNORM, "folder"))
    with pytest.raises(flashnorm.InputError, match=r"folder: a FlashNorm .* found version 9\.9, .* is given draft"):
        build(folded, draft="another config")
    with pytest.raises(flashnorm.InputError, match=r"draft folder: .*is given new"):
        build(usual, model_config=config(FLASHNORM, "draft folder"), new=1)
    assert len(loaders.called) == 3


def test_second_look_is_given_more(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM's own refusal stands."""
    loaders = Loaders()
    model = nn.Linear(1, 1)
    plugin._BUILT[model] = plugin._Built(None, config(ORDINARY))
    look = plugin._with_second_look(loaders.track_weights_loading)
    with pytest.raises(ValueError, match="not initialized"), caplog.at_level(logging.WARNING):
        look(model, loaded_weights=None, strict=False)
    assert loaders.called == [(model, None, False)]
    assert "is given strict" in caplog.text


def test_weights_are_given_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def load_weights(self, weights: Any, shard: int = 0) -> list[str]:
            return [name for name, _ in weights]

    monkeypatch.setattr(plugin, "_check", lambda *_: None)
    monkeypatch.setattr(plugin, "make_weightless", lambda *_: {"norm": 1.0})
    model: Any = Model()
    built = plugin._Built(SimpleNamespace(lora_config=None), config(FLASHNORM))
    plugin._fold(model, built, ["norm"], None, None)
    weights = [("norm", torch.ones(2)), ("linear", torch.ones(2))]
    assert model.load_weights(weights) == model.load_weights(weights=weights) == ["linear"]
    with pytest.raises(flashnorm.InputError, match=r"9\.9.*load_weights is given shard"):
        model.load_weights(weights, shard=1)
    with pytest.raises(TypeError, match="weights"):
        model.load_weights()


def test_adapters_are_given_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"flashnorm": True}))
    monkeypatch.setattr(vllm, "adapter_folder", lambda request: tmp_path)
    model, calls = nn.Linear(1, 1), []

    def load_adapter(self: Any, lora_request: Any, rank: int = 0) -> str:
        calls.append((lora_request, rank))
        return "an adapter"

    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(model=model))
    load = plugin._with_adapter_check(load_adapter)
    assert load(manager, "request", rank=1) == "an adapter"  # of an ordinary model
    plugin._BUILT[model] = plugin._Built(None, config(FLASHNORM), {"norm": 1.0})
    assert load(manager, lora_request="request") == "an adapter"
    with pytest.raises(flashnorm.InputError, match=r"9\.9.*load_adapter is given rank"):
        load(manager, "request", rank=1)
    assert calls == [("request", 1), ("request", 0)]


def test_adapters_of_a_folded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by an ordinary model, but not by one of another tool that says that it is folded."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"flashnorm": True}))
    monkeypatch.setattr(vllm, "adapter_folder", lambda request: tmp_path)
    model = nn.Linear(1, 1)
    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(model=model))
    load = plugin._with_adapter_check(lambda self, lora_request: "an adapter")
    plugin._BUILT[model] = plugin._Built(None, config(ORDINARY))
    with pytest.raises(flashnorm.InputError, match="a model, which is not folded"):
        load(manager, "request")
    plugin._BUILT[model] = plugin._Built(None, config(FLASHNORM))
    assert load(manager, "request") == "an adapter"


def test_config_of_another_kind() -> None:
    """Whatever vLLM returns for an ordinary model goes back as it is."""
    create = plugin._with_check(None, lambda *args, **kwargs: (args, kwargs))
    assert create(1, new=2) == ((1,), {"new": 2})


def test_parameters_that_are_needed() -> None:
    here = "integrations.test_vllm_arguments:Loaders"
    assert vllm.Function(here, "initialize_model", (), needed=("vllm_config",)).lacks() is None
    assert vllm.Function(here, "initialize_model", (), needed=("config",)).lacks() == (
        "initialize_model without the parameter config"
    )
    assert "no attribute 'gone'" in str(vllm.Function(here, "gone", ()).lacks())
    assert "No module named" in str(vllm.Function("vllm_of_tomorrow.x", "gone", ()).lacks())
