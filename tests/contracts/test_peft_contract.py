"""What is asked of PEFT (`compat/peft.py`)."""

from pathlib import Path
from typing import Any

import pytest

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
