"""Folding in memory: the same function in float64, and norms that really have no weight."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import flashnorm
import tiny
from flashnorm.errors import InputError
from flashnorm.models.weightless import WeightlessNorm, make_weightless
from flashnorm.verify.float64 import float64_everywhere

TYPES = [
    ("llama", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gemma", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("olmo2", {}),
    ("phi3", {}),
    ("granite", {}),
    ("cohere2", {}),
    ("qwen3_moe", tiny.EXPERTS),
    ("mixtral", tiny.EXPERTS),
    ("gpt_oss", tiny.EXPERTS),
    # Its code reads the dtype of norm weights from outside of the norms.
    ("mamba", {"state_size": 8, "time_step_rank": 8}),
]


def logits(model: PreTrainedModel) -> torch.Tensor:
    """In float64, with experts computed one after the other (the grouped kernels have no float64)."""
    if hasattr(model.config, "num_experts") or hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    with torch.no_grad(), float64_everywhere():
        return model(input_ids=tiny.ids()).logits


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "overrides"), TYPES)
def test_the_folded_model_computes_the_same(model_type: str, overrides: dict) -> None:
    model = tiny.model(tiny.config(model_type, **overrides), torch.float64)
    before = logits(model)
    plan = flashnorm.plan(model)
    assert flashnorm.fold_(model) is model
    after = logits(model)
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    held = {name for name, _ in model.named_parameters()}
    assert not held & {fold.norm for fold in plan.folds}
    assert held >= set(plan.kept)


def test_norms_multiply_by_nothing() -> None:
    """One multiplication a norm is left: by 1/RMS."""

    class Multiplications(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket is torch.ops.aten.mul
            return func(*args, **(kwargs or {}))

    def count(model: PreTrainedModel) -> int:
        with Multiplications() as mode, torch.no_grad():
            model(input_ids=tiny.ids(), use_cache=False)
        return mode.count

    model = tiny.model(tiny.config("llama"))
    before = count(model)
    flashnorm.fold_(model)
    assert isinstance(model.model.norm, WeightlessNorm)
    assert before - count(model) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_folded_weight_is_the_rounded_product(dtype: torch.dtype) -> None:
    model = tiny.model(tiny.config("gemma"), dtype)
    folded = flashnorm.fold_(copy.deepcopy(model))
    for fold in flashnorm.plan(model).folds:
        gain = model.get_parameter(fold.norm).double() + fold.offset
        for linear in fold.linears:
            exact = model.get_parameter(linear.name).double() * gain
            error = (folded.get_parameter(linear.name).double() - exact).abs()
            assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny).all()


def test_a_model_without_anything_to_fold_is_refused_and_unchanged() -> None:
    model = flashnorm.fold_(tiny.model(tiny.config("llama")))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="norms to fold"):
        flashnorm.fold_(model)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = tiny.AutoModelForCausalLM.from_config(tiny.config("llama"))
    with pytest.raises(InputError, match="meta device"):
        flashnorm.fold_(model)


def test_a_plain_module_folds_with_its_example_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)).double()
    nn.init.normal_(model[0].weight)
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    flashnorm.fold_(model, (x,))
    assert isinstance(model[0], nn.RMSNorm)  # it takes weight = None as it is
    assert model[0].weight is None
    assert (model(x) - before).abs().max() < 1e-14


class Dyt(nn.Module):
    """A norm that does not compute what any weightless one does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.tanh(x)


class GatedNorm(Dyt):
    """An RMSNorm, if it is not given a gate. Here it is."""

    variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * nn.functional.silu(gate)
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class GatedBlock(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x, gate=x))


@pytest.mark.parametrize(("norm", "block"), [(Dyt, nn.Sequential), (GatedNorm, GatedBlock)])
def test_a_norm_of_another_kind_keeps_its_code_and_gets_a_constant(norm: type, block: type) -> None:
    model = block(norm(), nn.Linear(8, 4).double())
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    flashnorm.fold_(model, (x,))
    assert (model(x) - before).abs().max() < 1e-14
    assert "0.weight" not in model.state_dict()
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_eps_is_measured(eps: float) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))
            self.dropout, self.variance_epsilon = 0.1, eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * wide.to(x.dtype)

    model = nn.Sequential(Norm())
    assert make_weightless(model, {"0.weight": 1.0}) == {}
    assert model[0].eps == eps


class Gain(nn.Module):
    """An RMSNorm whose weight is not called so."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@pytest.mark.parametrize("readable", [False, True])
def test_a_weight_of_another_name(readable: bool) -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(Gain())
    expected = model(x)
    names = {"0.gain"} if readable else set[str]()
    assert make_weightless(model, {"0.gain": 1.0}, names).keys() == names
    assert isinstance(model[0], WeightlessNorm)
    assert not model.state_dict()
    assert torch.allclose(model(x), expected, rtol=1e-6, atol=0.0)
    assert (model[0].gain is not None) == readable


def test_a_model_that_remembers_what_it_has_seen_is_not_shown_anything() -> None:
    """Dynamic RoPE keeps the longest length so far: a forward on the meta device would leave one without a value."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 10.0}
    model = flashnorm.fold_(tiny.model(tiny.config("llama", rope_parameters=rope), torch.float32))
    assert isinstance(model.model.rotary_emb.max_seq_len_cached, int)
    assert model(tiny.ids()).logits.isfinite().all()


class ReadsItsNorm(nn.Module):
    """Reads settings of its norm, and its weight's dtype, from outside of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = LlamaRMSNorm(4, eps=1e-3), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.norm(x + self.norm.variance_epsilon).to(self.norm.weight.dtype)
        return self.linear(wide)


def test_what_code_around_a_norm_reads_stays() -> None:
    x, model = torch.randn(2, 4), ReadsItsNorm()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        expected = model(x)
        folded = flashnorm.fold_(model, (x,))
        assert torch.allclose(folded(x), expected, rtol=1e-5, atol=1e-6)
    assert "norm.weight" not in folded.state_dict()


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny.model(tiny.config("gemma3_text"), torch.float64)
        before = logits(model)
        assert (logits(flashnorm.fold_(model)) - before).abs().max() <= 1e-10 * before.abs().max()


class AnyArguments(nn.RMSNorm):
    """Of one parameter that stands for any number of arguments: what a second one does with the weight is not known."""

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return super().forward(tensors[0])


def hooked() -> nn.Module:
    norm = nn.RMSNorm(4)
    norm.register_forward_hook(lambda module, args, output: 2 * output)
    return norm


def patched() -> nn.Module:
    norm = nn.RMSNorm(4)
    norm.forward = lambda x: 2 * nn.functional.rms_norm(x, (4,), norm.weight)
    return norm


@pytest.mark.parametrize("make", [lambda: AnyArguments(4), hooked, patched])
def test_a_norm_that_does_more_than_its_class_says_stays(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(make())
    expected = model(x)
    assert make_weightless(model, {"0.weight": 1.0}) == {"0.weight": 1.0}
    assert torch.equal(model(x), expected)


def test_a_weightless_norm_takes_one_tensor() -> None:
    norm, x = WeightlessNorm(1e-6), torch.ones(2, 4)
    assert norm(hidden_states=x).shape == x.shape
    for args, kwargs in (((x, x), {}), ((x,), {"gate": x}), ((), {"x": x})):
        with pytest.raises(TypeError):
            norm(*args, **kwargs)
