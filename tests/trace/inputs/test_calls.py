"""Plans of models that take more than token ids: towers and encoders are in them, and what cannot be traced is not."""

import inspect
from typing import Any

import pytest
import torch

import flashnorm
from architectures import causal
from architectures.families import build
from flashnorm.trace.inputs import example_calls
from flashnorm.trace.records import unknown

# Family and type -> a norm of its tower or encoder, and what it folds into.
TOWERS = {
    ("image-text-to-text", "llava"): ("model.vision_tower.encoder.layers.0.layer_norm2.weight", "mlp.fc1"),
    ("image-text-to-text", "minicpmv4_6"): ("model.vision_tower.encoder.layers.0.layer_norm2.weight", "mlp.fc1"),
    ("image-text-to-text", "qwen2_vl"): ("model.visual.merger.ln_q.weight", "mlp.0"),
    ("image-text-to-text", "idefics3"): ("model.vision_model.encoder.layers.1.layer_norm2.weight", "mlp.fc1"),
    ("image-text-to-text", "mllama"): ("model.language_model.layers.1.input_layernorm.weight", "cross_attn.q_proj"),
    ("speech-seq2seq", "whisper"): ("model.encoder.layers.0.final_layer_norm.weight", "fc1"),
    ("masked-lm", "bert"): ("bert.encoder.layer.1.output.LayerNorm.weight", "cls.predictions.transform.dense"),
    ("plain", "siglip"): ("vision_model.encoder.layers.0.layer_norm2.weight", "mlp.fc1"),
    ("plain", "vit"): ("layers.0.layernorm_after.weight", "fc1"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "model_type"), TOWERS)
def test_norms_of_towers_fold(family: str, model_type: str) -> None:
    norm, linear = TOWERS[family, model_type]
    plan = flashnorm.plan(build(family, model_type))
    fold = next(fold for fold in plan.folds if fold.norm == norm)
    assert fold.linears[0].name.endswith(f"{linear}.weight")
    assert not any("cannot be traced" in kept.reason for kept in plan.kept.values())


def test_a_call_that_fails_leaves_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("image-text-to-text", "llava")
    whole = flashnorm.plan(model)
    original = type(model).get_image_features

    def fails(self: Any, pixel_values: torch.Tensor) -> None:
        original(self, pixel_values)
        raise ValueError("out of luck")

    monkeypatch.setattr(type(model), "get_image_features", fails)
    plan = flashnorm.plan(model)
    assert plan.folds == tuple(fold for fold in whole.folds if "language_model" in fold.norm)
    reasons = {plan.kept[fold.norm].reason for fold in whole.folds if "vision_tower" in fold.norm}
    assert reasons == {unknown("get_image_features cannot be traced: out of luck").reason}


def test_a_call_whose_inputs_are_not_known_leaves_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("image-text-to-text", "llava")
    monkeypatch.setattr(type(model), "get_image_features", lambda self, from_the_future: None)
    plan = flashnorm.plan(model)
    assert plan.folds
    assert all("language_model" in fold.norm for fold in plan.folds)


def test_a_call_that_hands_on_whatever_it_gets_has_the_inputs_of_the_base_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("image-text-to-text", "llava")
    whole = flashnorm.plan(model)
    handed_on = type(model.base_model).get_image_features
    monkeypatch.setattr(
        type(model), "get_image_features", lambda self, *args, **kwargs: handed_on(self.model, *args, **kwargs)
    )
    assert flashnorm.plan(model) == whole


def test_what_the_base_model_s_method_requires_is_given_to_the_one_that_hands_it_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("image-text-to-text", "llava")
    whole = flashnorm.plan(model)
    inner = type(model.base_model).get_image_features

    def with_sizes(self: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> Any:
        return inner(self, pixel_values)

    monkeypatch.setattr(type(model.base_model), "get_image_features", with_sizes)
    monkeypatch.setattr(
        type(model),
        "get_image_features",
        lambda self, pixel_values, **kwargs: self.model.get_image_features(pixel_values, **kwargs),
    )
    assert flashnorm.plan(model) == whole


def test_the_base_model_s_methods_are_called_where_the_forward_fails_with_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("image-text-to-text", "llava")
    whole = flashnorm.plan(model)
    monkeypatch.delattr(type(model), "get_image_features")
    last = example_calls(model)[-1]
    assert (last.method, [call.method for call in last.instead]) == ("forward", ["get_image_features"])
    original = type(model).forward

    def fails(self: Any, *args: Any, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if pixel_values is not None:
            raise ValueError("more features than tokens")
        return original(self, *args, **kwargs)

    fails.__signature__ = inspect.signature(original)
    monkeypatch.setattr(type(model), "forward", fails)
    assert flashnorm.plan(model) == whole


def test_embeddings_in_the_place_of_an_image_are_left_out_where_they_do_not_fit() -> None:
    forward = example_calls(build("plain", "rt_detr"))[0]
    with_embeddings = ["inputs_embeds" in arguments for arguments in forward.alternatives]
    assert with_embeddings[0]
    assert not all(with_embeddings)
    assert flashnorm.plan(build("plain", "rt_detr")).folds


def test_inputs_that_are_given_are_the_only_ones() -> None:
    ids = torch.zeros(1, 5, dtype=torch.long)
    plan = flashnorm.plan(build("image-text-to-text", "llava"), (ids,))
    assert plan.folds
    assert not any("vision_tower" in norm for norm in (*plan.kept, *(fold.norm for fold in plan.folds)))


def test_pictures_have_the_type_of_the_model() -> None:
    model = build("plain", "vit")
    assert flashnorm.plan(model.bfloat16()) == flashnorm.plan(model.float())


def test_the_forward_comes_first() -> None:
    calls = example_calls(build("image-text-to-text", "qwen2_vl"))
    assert [call.method for call in calls] == ["forward", "get_image_features", "get_video_features"]
    assert calls[0].alternatives[0].keys() == {"input_ids", "use_cache"}


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt2", "gemma3_text"])
def test_a_model_of_text_is_called_once_and_without_a_cache(model_type: str) -> None:
    """A cache would be one more output, which no norm may change."""
    (forward,) = example_calls(causal.build(model_type))
    assert all(arguments["use_cache"] is False for arguments in forward.alternatives)


def test_what_no_method_shows_is_called_without_a_cache_as_well() -> None:
    first, *_, last = example_calls(build("image-text-to-text", "gemma4"))
    assert first.method == last.method == "forward"
    assert "input_features" in last.alternatives[0]
    assert "pixel_values" not in last.alternatives[0]
    assert last.alternatives[0]["use_cache"] is False
