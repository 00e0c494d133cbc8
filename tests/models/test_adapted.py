"""`fold_` on a model with adapters: base and adapters are folded together, and stay what they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import flashnorm
import tiny
from flashnorm.errors import InputError

peft = pytest.importorskip("peft")

import adapters  # noqa: E402
from adapters import EXACT_KINDS, REFUSED  # noqa: E402

EXACT = 1e-12

# What `flashnorm adapter` refuses and what can be folded here, because it is in the base model's own parameters.
ONLY_IN_MEMORY = "norm's bias trained"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a name of `adapters.MODELS` to that model, as it is loaded from a folder."""
    folder = tmp_path_factory.mktemp("models")

    def made(kind: str) -> Any:
        if not (folder / kind).exists():
            tiny.save(folder / kind, adapters.model(kind))
        return adapters.source(folder / kind)

    return made


def two(source: Any, tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with two adapters, one of them DoRA, and its outputs with each."""
    configs = {
        "lora": peft.LoraConfig(target_modules=["q_proj", "o_proj"], use_rslora=True, modules_to_save=["lm_head"]),
        "dora": peft.LoraConfig(target_modules=["up_proj", "down_proj"], use_dora=True),
    }
    for name, config in configs.items():
        adapters.train(source("llama"), config, tmp_path / name)
    model = adapters.with_adapter(source("llama"), tmp_path / "lora", adapter_name="lora")
    model.load_adapter(tmp_path / "dora", "dora")
    return model, outputs(model)


def outputs(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("lora", "dora"):
        model.set_adapter(name)
        found[name] = adapters.logits(model)
    with model.disable_adapter():
        found["none"] = adapters.logits(model)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT_KINDS, ONLY_IN_MEMORY])
def test_folded_together(source: Any, tmp_path: Path, name: str) -> None:
    kind, make = EXACT_KINDS[name] if name in EXACT_KINDS else REFUSED[name][:2]
    plain = adapters.logits(source(kind))
    model = adapters.train(source(kind), make(), tmp_path)
    expected = adapters.logits(model)
    assert adapters.distance(plain, expected) > 1e-3, "the adapter does nothing"
    before = dict(model.named_parameters()).keys()
    assert flashnorm.fold_(model) is model
    assert before - dict(model.named_parameters()).keys()  # the folded norms
    assert adapters.distance(adapters.logits(model.train().eval()), expected) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "experts", "saved layers", "norm biases", "trained biases"])
def test_what_is_saved_is_the_converted_adapter(source: Any, tmp_path: Path, name: str) -> None:
    """Tensor by tensor, and with a base that only models with the same folds accept."""
    kind, make = EXACT_KINDS[name]
    original = source(kind)
    model = adapters.train(original, make(), tmp_path / "adapter")
    flashnorm.convert_adapter(tmp_path / "adapter", original.name_or_path, tmp_path / "converted")
    flashnorm.fold_(model).save_pretrained(tmp_path / "saved")
    found, expected = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("saved", "converted"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    said, wanted = (json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("saved", "converted"))
    for key in ("base_model_name_or_path", "revision", "lora_bias"):
        assert said.get(key) == wanted.get(key)


def test_several_adapters(source: Any, tmp_path: Path) -> None:
    """Each alone, both at once, none; further ones are looked at; merged at the end."""
    model, expected = two(source, tmp_path)
    model.base_model.set_adapter(["lora", "dora"])
    both = adapters.logits(model)
    flashnorm.fold_(model)
    for name, logits in outputs(model).items():
        assert adapters.distance(logits, expected[name]) < EXACT
    with pytest.raises(InputError, match="gives wrong results here"):
        model.load_adapter(tmp_path / "dora", "another")
    model.delete_adapter("another")
    model.base_model.set_adapter(["lora", "dora"])
    assert adapters.distance(adapters.logits(model), both) < EXACT
    assert adapters.distance(adapters.logits(model.merge_and_unload()), both) < EXACT


def test_merged_for_a_while(source: Any, tmp_path: Path) -> None:
    model, expected = two(source, tmp_path)
    flashnorm.fold_(model)
    model.set_adapter("dora")
    model.merge_adapter()
    assert adapters.distance(adapters.logits(model), expected["dora"]) < EXACT
    model.unmerge_adapter()
    for name, logits in outputs(model).items():
        assert adapters.distance(logits, expected[name]) < EXACT


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_trained_on(source: Any, tmp_path: Path, name: str) -> None:
    """The same loss, and for `B` the same gradients. (Where norms have biases, a part of `B A` is a constant then.)"""
    kind, make = EXACT_KINDS[name]
    model = adapters.train(source(kind), make(), tmp_path).train()
    loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
    loss.backward()
    before = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    flashnorm.fold_(model)
    again = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
    assert again.item() == pytest.approx(loss.item(), rel=1e-9)  # Transformers computes the loss in float32
    again.backward()
    after = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert before.keys() <= after.keys()
    for name in before:
        if "lora_B" in name:
            assert adapters.distance(after[name][None], before[name][None]) < 1e-6


def test_an_adapter_that_transformers_has_loaded(source: Any, tmp_path: Path) -> None:
    """There is no `PeftModel` then."""
    adapters.train(source("llama"), EXACT_KINDS["lora"][1](), tmp_path)
    model = source("llama")
    model.load_adapter(str(tmp_path))
    expected = adapters.logits(model)
    assert flashnorm.fold_(model) is model
    assert adapters.distance(adapters.logits(model), expected) < EXACT
    with pytest.raises(InputError, match="gives wrong results here"):
        model.load_adapter(str(tmp_path), adapter_name="another")


@pytest.mark.parametrize("name", [name for name in REFUSED if name != ONLY_IN_MEMORY])
def test_what_cannot_be_exact_is_refused(source: Any, name: str) -> None:
    """For the reason that `flashnorm adapter` gives, and nothing is changed."""
    kind, make, words = REFUSED[name]
    model = peft.get_peft_model(source(kind).float(), make())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=words):
        flashnorm.fold_(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())


def test_adapters_in_a_state_that_is_refused(source: Any, tmp_path: Path) -> None:
    model, _ = two(source, tmp_path)
    model.merge_adapter()
    with pytest.raises(InputError, match="call unmerge_adapter"):
        flashnorm.fold_(model)
    model.unmerge_adapter()
    scaled = next(module for module in model.modules() if "dora" in getattr(module, "lora_B", {}))
    scaled.set_scale("dora", 3.0)
    with pytest.raises(InputError, match="a DoRA with the scale of its config"):
        flashnorm.fold_(model)
    scaled.set_scale("dora", 1.0)
    model.peft_config["lora"].base_model_name_or_path = "x#flashnorm-0123456789ab"
    with pytest.raises(InputError, match="one of a folded model"):
        flashnorm.fold_(model)
    del vars(model.get_base_model())["peft_config"]
    with pytest.raises(InputError, match="config of each adapter"):
        flashnorm.fold_(model.get_base_model())
