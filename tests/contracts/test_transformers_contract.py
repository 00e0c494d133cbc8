"""What `compat/transformers.py` asks of the Transformers that is installed. A failure says what changed, and what that
means."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import tiny
from flashnorm.compat import transformers as compat

NORM = "model.layers.0.input_layernorm.weight"


def meta(model_type: str, **overrides: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny.config(model_type, **overrides))


def test_classes() -> None:
    sentence = "auto classes do not show their table any more: a config that names no class would find none"
    assert compat.class_for(AutoModelForCausalLM, tiny.config("llama")) is LlamaForCausalLM, sentence
    assert compat.class_for(AutoModelForCausalLM, transformers.ViTConfig()) is None, sentence
    assert compat.class_for(AutoModel, transformers.ViTConfig()) is transformers.ViTModel, sentence


def test_code_of_the_checkpoint() -> None:
    config = tiny.config("llama")
    assert not compat.has_code_for(AutoModelForCausalLM, config)
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    assert compat.has_code_for(AutoModelForCausalLM, config), "auto classes have other names than in config.json"
    assert not compat.has_code_for(AutoModel, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_built(dtype: torch.dtype) -> None:
    model = compat.built(LlamaForCausalLM, tiny.config("llama", dtype=dtype))
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == dtype, "a config's dtype does not count: pictures and sounds would be traced in another one"


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_dequantising(method: str) -> None:
    sentence = "quantisers do not take dequantize any more: verify could not run what they load"
    settings = compat.dequantising(tiny.config("llama", quantization_config={"quant_method": method}))
    assert settings is not None, sentence
    assert settings.get_loading_attributes()["dequantize"] is True, sentence
    assert compat.dequantising(tiny.config("llama", quantization_config={"quant_method": "gptq", "bits": 4})) is None
    assert compat.dequantising(tiny.config("llama", quantization_config={"quant_method": "of another release"})) is None
    assert compat.dequantising(tiny.config("llama")) is None


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_plain_operators(model_type: str) -> None:
    model = meta(model_type)
    before = model.config._attn_implementation, model.config._experts_implementation
    assert before[0] not in (None, "eager"), "configs do not say which attention runs: it would be traced as it is"
    with compat.plain_operators(model):
        assert model.config._attn_implementation == model.model.config._attn_implementation == "eager"
        if model_type == "qwen3_moe":
            assert model.config._experts_implementation == "batched_mm", "experts would be traced as they are"
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
    with compat.plain_operators(nn.Linear(1, 1)):
        pass  # a model of another kind


def test_experts_in_float64() -> None:
    model = tiny.model(tiny.config("qwen3_moe"), torch.float64)
    compat.use_experts_for_float64(model)
    assert model.config._experts_implementation == "eager", "experts cannot be chosen: the reference would not run"
    assert model(tiny.ids()).logits.dtype == torch.float64


def test_stored_names() -> None:
    """Mixtral's stacked experts are stored one by one, by operators of PyTorch."""
    model = meta("mixtral")
    stored = compat.as_stored(model, dict(model.named_parameters()))
    sentence = "the way to stored names changed: checkpoints of such models could not be converted"
    assert NORM in stored, sentence
    single = [
        tensor for name, tensor in stored.items() if name.endswith("layers.0.block_sparse_moe.experts.0.w1.weight")
    ]
    assert [tuple(tensor.shape) for tensor in single] == [(96, 64)], sentence


def test_names_around_a_checkpoint() -> None:
    assert compat.prefix_of_base(meta("llama")) == "model.", "base models have no prefix: their files would seem empty"
    optional = compat.optional_tensors(meta("gpt2"))
    assert isinstance(optional, tuple)
    assert all(isinstance(pattern, str) for pattern in optional)
    for attribute in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
        assert hasattr(PreTrainedModel, attribute), f"{attribute} is gone: tensors that may be absent would be missed"


def test_ignored_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a class is told to pass over is reported neither as unexpected nor as anything else; another tensor is."""
    model = tiny.model(tiny.config("llama"))
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | {"a.b": torch.ones(1), "axb": torch.ones(1)})

    class Ignoring(LlamaForCausalLM):
        pass

    compat.ignore_stored(Ignoring, ["a.b"])
    assert LlamaForCausalLM._keys_to_ignore_on_load_unexpected is None
    _, info = Ignoring.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == ["axb"], "--keep-norms: loading would warn of each norm, or pass all over"
    assert not info["missing_keys"], "missing_keys is no collection of what is absent: damaged checkpoints would load"
    compat.ignore_stored(Ignoring, ["axb"])
    assert not Ignoring.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"]


def test_initialised() -> None:
    model = tiny.model(tiny.config("llama"))
    norm = model.model.norm
    before = norm.weight.detach().clone()
    compat.initialise(model, norm)
    assert torch.equal(norm.weight, torch.ones_like(before)), (
        "`_init_weights` does not set a norm's weight: it would not be known which absent norms come out right"
    )


def test_ties() -> None:
    model = meta("llama", tie_word_embeddings=True)
    tied = "lm_head.weight"
    assert tied in model.all_tied_weights_keys, "ties are listed elsewhere: folded norms that are tied would come back"
    compat.forget_ties(model, {tied})
    assert tied not in model.all_tied_weights_keys
    compat.forget_ties(nn.Linear(1, 1), {tied})
