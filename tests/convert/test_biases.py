"""Norms with a bias: it goes into the linears' biases where every one has one, else it stays, divided by the gain."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import flashnorm
import tiny
from flashnorm.plan import FoldPlan
from flashnorm.verify.float64 import float64_everywhere

N = 12


class Block(nn.Module):
    """A norm and linears that read it."""

    def __init__(self, norm: nn.Module, biases: tuple[bool, ...] = (True, True)):
        super().__init__()
        self.norm = norm
        self.linears = nn.ModuleList(nn.Linear(N, 5 + i, bias=bias) for i, bias in enumerate(biases))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return torch.cat([torch.tanh(linear(h)) for linear in self.linears], -1)


class DyT(nn.Module):
    """Dynamic tanh: `g * tanh(a x) + beta`."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.ones(N))
        self.bias = nn.Parameter(torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class HandWritten(nn.Module):
    """LayerNorm as T5's relatives write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))
        self.bias = nn.Parameter(torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.bias + self.weight * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6))


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def x() -> Tensor:
    return torch.randn(3, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def folded(model: nn.Module, inputs: Tensor | None = None) -> FoldPlan:
    """Fold a model and compare its outputs; its plan."""
    inputs = x() if inputs is None else inputs
    plan = flashnorm.plan(model, (inputs,))
    before = model(inputs)
    flashnorm.fold_(model, (inputs,))
    assert (model(inputs) - before).abs().max() <= 1e-12 * before.abs().max()
    return plan


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(N), DyT, HandWritten])
def test_the_bias_goes_into_the_biases_of_all_linears(norm: Any) -> None:
    model = randomised(Block(norm()))
    (fold,) = folded(model).folds
    assert (fold.bias, fold.bias_removed) == ("norm.bias", True)
    assert [linear.bias for linear in fold.linears] == ["linears.0.bias", "linears.1.bias"]
    assert not {"norm.weight", "norm.bias"} & set(model.state_dict())


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(N), DyT, HandWritten])
def test_the_bias_stays_where_a_linear_has_none(norm: Any) -> None:
    model = randomised(Block(norm(), biases=(True, False)))
    before = model.state_dict()["linears.0.bias"].clone()
    (fold,) = folded(model).folds
    assert (fold.bias, fold.bias_kept) == ("norm.bias", True)
    assert [linear.bias for linear in fold.linears] == [None, None]
    assert set(model.state_dict()) & {"norm.weight", "norm.bias"} == {"norm.bias"}
    assert torch.equal(model.state_dict()["linears.0.bias"], before)


def test_a_layer_norm_without_parameters_is_what_remains() -> None:
    model = Block(nn.LayerNorm(N))
    flashnorm.fold_(randomised(model), (x(),))
    assert type(model.norm) is nn.LayerNorm
    assert list(model.norm.parameters()) == list(model.norm.buffers()) == []


@pytest.mark.parametrize("gain", [0.0, 1e-310])
def test_a_gain_that_cannot_divide_the_bias_keeps_the_norm(gain: float) -> None:
    model = randomised(Block(nn.LayerNorm(N), biases=(False, False)))
    with torch.no_grad():
        model.get_parameter("norm.weight")[3] = gain
    with pytest.raises(flashnorm.InputError, match="found none"):
        flashnorm.fold_(model, (x(),))
    with torch.no_grad():
        model.get_parameter("norm.bias")[3] = 0.0  # nothing to divide
    folded(model)


def test_gains_of_zero_are_no_matter_where_the_bias_leaves() -> None:
    model = randomised(Block(nn.LayerNorm(N)))
    with torch.no_grad():
        model.get_parameter("norm.weight")[::2] = 0.0
    assert len(folded(model).folds) == 1


class Shared(nn.Module):
    """Parameters with more than one use."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.LayerNorm(N), nn.LayerNorm(N)
        self.up, self.down = nn.Linear(N, N), nn.Linear(N, N)
        if kind == "norm bias":
            self.second.bias = self.first.bias
        elif kind == "linear bias":
            self.down.bias = self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        a = self.up(self.first(x))
        if self.kind == "bias read elsewhere":
            a = a * self.up.bias
        if self.kind == "norm bias read elsewhere":
            a = a * self.first.bias
        if self.kind == "linear without the norm":
            a = a + self.up(x)
        return self.down(self.second(torch.tanh(a)))


@pytest.mark.parametrize(
    ("kind", "norms", "leaving"),
    [
        ("nothing", 2, 2),
        ("norm bias", 0, 0),
        ("linear bias", 2, 0),
        ("bias read elsewhere", 2, 1),
        ("norm bias read elsewhere", 1, 1),
        ("linear without the norm", 1, 1),
    ],
)
def test_shared_parameters(kind: str, norms: int, leaving: int) -> None:
    model = randomised(Shared(kind))
    plan = flashnorm.plan(model, (x(),))
    assert len(plan.folds) == norms
    assert sum(fold.bias_removed for fold in plan.folds) == leaving
    if norms:
        folded(model)


class TwoNames(nn.Module):
    """One norm module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.LayerNorm(N)
        self.up, self.down = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.second(torch.tanh(self.up(self.first(x)))))


def test_a_norm_module_with_two_names() -> None:
    model = randomised(TwoNames())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flashnorm.plan(model, (x(),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert folded(model).folds[0].bias_removed
    assert type(model.first) is nn.LayerNorm
    assert not list(model.first.parameters())


class Scaled(nn.Module):
    """A norm whose output is scaled before the linear: the gain passes, the bias does not go into the linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(N), nn.Linear(N, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(-(self.norm(x) * 3.0)) + self.linear(-self.norm(x).flip(0))


def test_a_scaled_bias_stays() -> None:
    (fold,) = folded(randomised(Scaled())).folds
    assert fold.bias_kept


def tiny_model(model_type: str) -> PreTrainedModel:
    config = tiny.config(model_type, n_embd=64, n_head=4, n_layer=2, n_inner=96, tie_word_embeddings=False)
    return tiny.model(config, torch.float64)


def outputs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), float64_everywhere():
        return model(input_ids=tiny.ids()).logits


@pytest.fixture(params=["gpt2", "stablelm", "phi", "nemotron"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """gpt2 and phi have biases for all norms (gpt2's head has none), stablelm and nemotron for none."""
    return tiny.save(tmp_path / "source", tiny_model(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("keep_norms", [False, True])
def test_a_checkpoint_goes_round(source: Path, tmp_path: Path, keep_norms: bool) -> None:
    expected = outputs(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64))
    result = flashnorm.convert(source, tmp_path / "out", keep_norms=keep_norms)
    assert result.norms == result.plan.norms == (3 if result.plan.model_type == "phi" else 5)
    report = flashnorm.verify(source, tmp_path / "out", weights_only=True)
    assert report.ok, str(report)
    for model in (
        flashnorm.load(tmp_path / "out", dtype=torch.float64),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64),
    ):
        assert (outputs(model) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model_type", ["gpt2", "stablelm", "nemotron"])
def test_narrow_biases_are_rounded_once(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", tiny_model(model_type).to(dtype))
    flashnorm.convert(source, tmp_path / "out")
    report = flashnorm.verify(source, tmp_path / "out", weights_only=True)
    assert report.ok, str(report)
    assert report.weights.biases == 5


def test_what_is_written_is_what_folds_in_memory(source: Path, tmp_path: Path) -> None:
    flashnorm.convert(source, tmp_path / "out")
    in_memory = flashnorm.fold_(AutoModelForCausalLM.from_pretrained(source, dtype="auto")).state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert in_memory.keys() <= stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in in_memory.items())


def test_a_wrong_bias_is_found(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = flashnorm.convert(source, out).plan
    fold = plan.folds[0]
    changed = fold.linears[0].bias or fold.bias
    tensors = load_file(out / "model.safetensors")
    assert changed is not None
    tensors[changed].view(torch.int64)[1] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = flashnorm.verify(source, out, weights_only=True)
    found = {finding.name: finding for finding in report.weights.findings}
    assert found[changed].index == (1,)
    assert (found[changed].differing, found[changed].problem[:18]) == (1, "is not the rounded")


def test_zero_gains_keep_a_norm_of_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("stablelm")
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight")[5] = 0.0
    source = tiny.save(tmp_path / "source", model)
    plan = flashnorm.convert(source, tmp_path / "out").plan
    (name, kept), *others = plan.kept.items()
    assert name == "model.layers.1.input_layernorm.weight"
    assert not others
    assert "cannot be divided by its gain" in kept.reason
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["flashnorm"]["weightless"]
    assert len(listed) == 4
    assert flashnorm.verify(source, tmp_path / "out", weights_only=True).ok
    expected = outputs(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64))
    found = outputs(flashnorm.load(tmp_path / "out", dtype=torch.float64))
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


# Encoders tie the head's bias to another parameter together with its weight.
HEADS = {"bert": "cls.predictions", "roberta": "lm_head"}


def tied_with_its_bias(model_type: str, folder: Path, auto: Any = AutoModelForMaskedLM) -> Path:
    config = tiny.config(model_type, max_position_embeddings=40, is_decoder=auto is AutoModelForCausalLM)
    return tiny.save(folder, tiny.randomised(auto.from_config(config)).double())


@pytest.mark.parametrize(
    ("model_type", "auto", "center"),
    [
        ("bert", AutoModelForMaskedLM, False),
        pytest.param("bert", AutoModelForCausalLM, True, marks=pytest.mark.slow),
        pytest.param("roberta", AutoModelForMaskedLM, True, marks=pytest.mark.slow),
    ],
)
def test_a_bias_that_is_untied_together_with_its_head(model_type: str, auto: Any, center: bool, tmp_path: Path) -> None:
    source, out = tied_with_its_bias(model_type, tmp_path / "source", auto), tmp_path / "out"
    expected = outputs(auto.from_pretrained(source, dtype=torch.float64))
    result = flashnorm.convert(source, out, untie=True, center=center)
    assert result.centred == center
    head = HEADS[model_type]
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert f"{head}.decoder.bias" not in before
    assert torch.equal(before[f"{head}.bias"], after[f"{head}.bias"])
    assert not torch.equal(before[f"{head}.bias"], after[f"{head}.decoder.bias"])
    report = flashnorm.verify(source, out, weights_only=True)
    assert report.ok, str(report)
    for model in (flashnorm.load(out, dtype=torch.float64), auto.from_pretrained(out, dtype=torch.float64)):
        assert (outputs(model) - expected).abs().max() <= 1e-10 * expected.abs().max()
    after[f"{head}.decoder.bias"].view(torch.int64)[7] += 1
    save_file(after, out / "model.safetensors", {"format": "pt"})
    found = {finding.name: finding for finding in flashnorm.verify(source, out, weights_only=True).weights.findings}
    assert (found[f"{head}.decoder.bias"].index, found[f"{head}.decoder.bias"].differing) == ((7,), 1)


def test_a_bias_that_is_untied_and_stored_under_its_own_name_alone(tmp_path: Path) -> None:
    source, out = tied_with_its_bias("bert", tmp_path / "source"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    expected = outputs(AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float64))
    flashnorm.convert(source, out, untie=True)
    assert flashnorm.verify(source, out, weights_only=True).ok
    found = outputs(flashnorm.load(out, dtype=torch.float64))
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("stored", [torch.int64, None])
def test_a_bias_that_is_untied_and_cannot_be_changed(stored: torch.dtype | None, tmp_path: Path) -> None:
    source = tied_with_its_bias("bert", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    bias = tensors.pop("cls.predictions.bias")
    if stored is not None:
        tensors["cls.predictions.bias"] = bias.to(stored)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(flashnorm.InputError, match=r"expected .*cls\.predictions\.(decoder\.)?bias.*, found"):
        flashnorm.convert(source, tmp_path / "out", untie=True)
