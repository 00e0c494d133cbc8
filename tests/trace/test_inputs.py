"""Plans of models that take more than token ids: towers and encoders are in them, and what cannot be traced is not."""

from typing import Any

import pytest
import torch
from torch import nn

import flashnorm
from architectures.families import build
from flashnorm.trace.inputs import MixedDevices, example_calls
from flashnorm.trace.rules import UNKNOWN_OPERATOR

META = torch.device("meta")

# Family and type -> a norm of its tower or encoder, and what it folds into.
TOWERS = {
    ("image-text-to-text", "llava"): ("model.vision_tower.encoder.layers.0.layer_norm2.weight", "mlp.fc1"),
    ("image-text-to-text", "qwen2_vl"): ("model.visual.merger.ln_q.weight", "mlp.0"),
    ("image-text-to-text", "idefics3"): ("model.vision_model.encoder.layers.1.layer_norm2.weight", "mlp.fc1"),
    ("image-text-to-text", "mllama"): ("model.language_model.layers.1.input_layernorm.weight", "cross_attn.q_proj"),
    ("speech-seq2seq", "whisper"): ("model.encoder.layers.0.final_layer_norm.weight", "fc1"),
    ("masked-lm", "bert"): ("bert.encoder.layer.1.output.LayerNorm.weight", "cls.predictions.transform.dense"),
    ("plain", "siglip"): ("vision_model.encoder.layers.0.layer_norm2.weight", "mlp.fc1"),
    ("plain", "vit"): ("layers.0.layernorm_after.weight", "fc1"),
}


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
    assert reasons == {f"{UNKNOWN_OPERATOR}: get_image_features cannot be traced: out of luck"}


def test_a_call_whose_inputs_are_not_known_leaves_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("image-text-to-text", "llava")
    monkeypatch.setattr(type(model), "get_image_features", lambda self, from_the_future: None)
    plan = flashnorm.plan(model)
    assert plan.folds
    assert all("language_model" in fold.norm for fold in plan.folds)


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


class TestMixedDevices:
    def test_numbers_stay_known_on_the_meta_device(self) -> None:
        with MixedDevices(True, lambda: None):
            sizes = torch.tensor([[1, 2, 3], [1, 4, 5]]).to(META)
            assert sizes.prod(-1).tolist() == [6, 20]
            sizes += 1
            assert (sizes[0] == 2).nonzero().shape == (1, 1)
            assert int(sizes.max()) == 6

    def test_together_with_unknown_numbers_they_are_unknown(self) -> None:
        with MixedDevices(True, lambda: None):
            sizes = torch.tensor([1, 2]).to(META)
            alias = sizes.view(2, 1)
            sizes += torch.ones(2, dtype=torch.long, device=META)
            assert (torch.ones(2) + torch.ones(2, device=META)).is_meta
            with pytest.raises(NotImplementedError):
                alias.tolist()

    def test_unknown_numbers_are_not_written_into_known_ones(self) -> None:
        with MixedDevices(True, lambda: None), pytest.raises(NotImplementedError, match="without values"):
            torch.ones(2).add_(torch.ones(2, device=META))

    @pytest.mark.parametrize("guess", [True, False])
    def test_comparisons_are_guessed_and_that_is_noted(self, guess: bool) -> None:
        asked: list[bool] = []
        with MixedDevices(guess, lambda: asked.append(guess)):
            real = torch.ones(2, 3, device=META) == 0
            assert not asked
            assert real.sum().tolist() == 6 * guess
            assert (real.view(1, 6) & True).tolist() == [[guess] * 6]
        assert len(asked) == 2


class Chooses(nn.Module):
    """Takes another path through its code where some number of an activation is large."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.linear(h) if (x > 0).flatten().tolist()[0] else h


def test_both_paths_of_a_choice_by_numbers_count() -> None:
    plan = flashnorm.plan(Chooses(), (torch.zeros(2, 6),))
    assert plan.kept["norm.weight"].reason == "it is an output of the model"
