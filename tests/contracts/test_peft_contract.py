"""What is asked of PEFT (`compat/peft.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from flashnorm.compat import peft as compat

peft = pytest.importorskip("peft")
VERSION = f"peft {peft.__version__}"


def adapted(**options: Any) -> Any:
    config = peft.LoraConfig(target_modules=["q_proj"], **options)
    return peft.get_peft_model(tiny.model(tiny.config("llama")), config)


def test_an_adapter_wraps_the_linears_that_it_takes() -> None:
    model = adapted().base_model.model
    name = "model.layers.0.self_attn.q_proj"
    (found,) = compat.wrappers(model, name)
    assert compat.holds(found, "default"), f"{VERSION}: an adapter is not found in its module"
    assert not compat.holds(found, "another")
    assert not list(compat.wrappers(model, "model.layers.0.self_attn.k_proj"))


def test_a_module_that_is_saved_whole_is_found() -> None:
    model = adapted(modules_to_save=["lm_head"]).base_model.model
    (found,) = compat.wrappers(model, "lm_head")
    assert compat.holds(found, "default"), f"{VERSION}: modules_to_save are kept in another way"


def test_a_model_knows_its_adapters() -> None:
    model = adapted()
    assert "peft_config" in vars(model.base_model.model) or "peft_config" in vars(model.base_model), (
        f"{VERSION} keeps the configs of adapters elsewhere"
    )


def test_where_an_adapters_config_is(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    assert Path(str(compat.config_file(str(tmp_path)))).name == "adapter_config.json"


def test_a_model_without_its_adapters() -> None:
    """The wrappers go, and the parameters are the same objects."""
    model = adapted(modules_to_save=["lm_head"])
    base, configs = compat.base_and_configs(model)
    assert base is model.get_base_model()
    assert configs.keys() == {"default"}
    assert compat.base_and_configs(base)[1].keys() == {"default"}, f"{VERSION} keeps the configs of adapters elsewhere"
    assert {name for wrapper in compat.wrappers_of(base) for name in compat.adapters_in(wrapper)} == {"default"}
    weight = base.get_parameter("model.layers.0.self_attn.q_proj.base_layer.weight")
    compat.unwrap_(base)
    assert base.get_parameter("model.layers.0.self_attn.q_proj.weight") is weight
    plain = dict(tiny.model(tiny.config("llama")).named_parameters())
    assert dict(base.named_parameters()).keys() == plain.keys()
    assert compat.base_and_configs(tiny.model(tiny.config("llama")))[1] == {}


def test_merged_adapters_are_told() -> None:
    model = adapted()
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        found = {compat.is_merged(wrapper) for wrapper in compat.wrappers_of(model)}
        assert found == {merged}, f"{VERSION} says in another way that adapters are merged"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_would_be_saved_is_in_the_parameters(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(**options)
    model.save_pretrained(tmp_path)
    tensors = compat.saved_tensors(model, "default")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == saved.keys()
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(tensor.data_ptr() in places for tensor in tensors.values()), f"{VERSION} copies what it saves"
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    found = compat.saved_config(model.peft_config["default"])
    assert found | {"inference_mode": True, "auto_mapping": said["auto_mapping"]} == said


def test_a_lora_gets_a_bias() -> None:
    model = adapted()
    b = next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)
    layer = compat.lora_layer(model, "default", b)
    before = model(input_ids=tiny.ids()).logits
    compat.add_lora_bias(layer, "default", torch.ones(b.shape[0]))
    assert not torch.equal(model(input_ids=tiny.ids()).logits, before), f"{VERSION} adds no bias"
    assert layer.scaling["default"] == 1.0
