"""Verification of outputs: healthy conversions of small random models pass, and wrong ones do not."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from flashnorm.convert.whole import convert
from flashnorm.cpu import ops
from flashnorm.cpu.fused import FusedDecoder
from flashnorm.cpu.kernels import native
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.models.load import Loading
from flashnorm.plan import FoldPlan
from flashnorm.planning.planned import plan_checkpoint
from flashnorm.verify import measures, outputs
from flashnorm.verify.as_loaded import loaded_model
from flashnorm.verify.conversion import Conversion, Size
from flashnorm.verify.measures import Greedy
from flashnorm.verify.outputs import verify_outputs
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.report import VerifyReport
from flashnorm.verify.runs import Runner, needed_memory, source_loader
from flashnorm.verify.whole import verify

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 199,
    "pad_token_id": 0,
    "max_position_embeddings": 96,
}
HEALTHY = [
    ("llama", torch.bfloat16),
    ("llama", torch.float16),
    ("llama", torch.float32),
    ("llama", torch.float64),
    ("gemma2", torch.bfloat16),
    ("gemma2", torch.float32),
    ("qwen3", torch.bfloat16),
    ("olmo2", torch.float32),
    ("qwen3_moe", torch.bfloat16),
]


def make_source(folder: Path, model_type: str, dtype: torch.dtype, seed: int = 0) -> Path:
    """A random model with gains that matter and predictions that differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **TINY)
    model = AutoModelForCausalLM.from_config(config)
    offset = 0.0 if model_type in ("llama", "qwen3", "olmo2") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + 0.4 * torch.randn_like(parameter) - offset)
            else:
                fan_in = 1.0 if "embed" in name else parameter.shape[-1]
                parameter.copy_(torch.randn_like(parameter) * 1.5 / fan_in**0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    return lambda *args, **kwargs: make_source(tmp_path / "source", *args, **kwargs)


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "dtype"), HEALTHY)
def test_healthy_conversions_pass(
    source: Callable[..., Path], tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    folder = source(model_type, dtype)
    convert(folder, tmp_path / "out")
    report = verify_outputs(folder, tmp_path / "out")
    assert report.ok, report.criteria
    assert report.skipped is None
    assert report.tokens == 96
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.source
    assert report.converted
    assert report.rounding
    assert report.greedy
    assert len(report.greedy.source) == outputs.GREEDY_STEPS
    if dtype != torch.float64:
        assert report.source.kl > 0  # the reference is not the run itself
        assert report.rounding.kl < report.source.kl


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer", [0, 2])
def test_one_weight_left_unfolded_fails(
    source: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, layer: int
) -> None:
    folder = source("llama", dtype)
    convert(folder, tmp_path / "out")
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    original = load_file(folder / "model.safetensors")[name]
    report = verify_outputs(folder, damaged(tmp_path / "out", lambda tensors: tensors.update({name: original})))
    assert not report.ok
    assert [criterion.ok for criterion in report.criteria[:2]] == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("seed", [0, 2])
def test_experts_chosen_by_a_rounding_error_are_no_difference(tmp_path: Path, model_type: str, seed: int) -> None:
    """A few tokens make most of the KL, others in source and converted; a wrong expert is more than that."""
    latent = {"head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 64, "v_head_dim": 16}
    latent |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    sizes = tiny.EXPERTS | (latent if model_type == "deepseek_v3" else {})
    layers = {"num_hidden_layers": 3, "first_k_dense_replace": 1} if model_type == "deepseek_v3" else {}
    model = tiny.model(tiny.config(model_type, **sizes, **layers), torch.bfloat16, seed)
    folder = tiny.save(tmp_path / "source", model)
    convert(folder, tmp_path / "out")
    report = verify_outputs(folder, tmp_path / "out", steps=8)
    assert report.ok, report.criteria
    if (model_type, seed) == ("qwen3_moe", 2):
        return  # its first expert gets too few of the tokens
    originals = load_file(folder / "model.safetensors")
    ends = ("experts.0.w1.weight", "experts.0.gate_proj.weight")
    (name,) = [key for key in originals if "layers.1." in key and key.endswith(ends)]
    report = verify_outputs(
        folder, damaged(tmp_path / "out", lambda tensors: tensors.update({name: originals[name]})), steps=8
    )
    assert not all(criterion.ok for criterion in report.criteria[:2])


@pytest.mark.slow
def test_gemma_folded_as_a_plain_gain_fails(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source("gemma2", torch.bfloat16)
    convert(folder, tmp_path / "out")
    originals = load_file(folder / "model.safetensors")

    def fold_plainly(tensors: dict[str, Tensor]) -> None:
        for layer in range(3):
            gain = originals[f"model.layers.{layer}.input_layernorm.weight"]
            for name in ("q_proj", "k_proj", "v_proj"):
                key = f"model.layers.{layer}.self_attn.{name}.weight"
                tensors[key] = originals[key] * gain

    assert not verify_outputs(folder, damaged(tmp_path / "out", fold_plainly)).ok


@pytest.mark.slow
def test_nan_fails(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source("llama", torch.float32)
    convert(folder, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    report = verify_outputs(folder, damaged(tmp_path / "out", lambda tensors: tensors[name].fill_(torch.nan)))
    assert not report.ok


def test_a_source_that_does_not_fit_is_not_run(
    source: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source("llama", torch.bfloat16)
    convert(folder, tmp_path / "out")
    monkeypatch.setattr(outputs, "available_memory", lambda: 1 << 20)
    report = verify_outputs(folder, tmp_path / "out")
    assert report.skipped
    assert "GB" in report.skipped
    assert report.ok
    assert report.to_dict() == {"ok": True, "skipped": report.skipped}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_streamed_from_disk_no_number_changes(
    source: Callable[..., Path], tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(model_type, torch.bfloat16)
    convert(folder, tmp_path / "out")
    whole = verify_outputs(folder, tmp_path / "out", steps=8)
    assert whole.ok
    assert not whole.streamed
    # As if the model had no room, but each of its modules had.
    fits = needed_memory(AutoModelForCausalLM.from_pretrained(folder), 16, 96, 199, streamed=True)
    monkeypatch.setattr(outputs, "available_memory", lambda: fits)
    streamed = verify_outputs(folder, tmp_path / "out")
    assert streamed == replace(whole, streamed=True)


def test_what_cannot_be_streamed_is_said(source: Callable[..., Path]) -> None:
    """As in Transformers 5.10, where the values of a weight on disk are asked for."""
    load = source_loader(source("llama", torch.float32), False)

    def load_and_ask(dtype: torch.dtype, **options: Any) -> Any:
        return next(load(dtype, **options).parameters()).sum().item()

    with pytest.raises(InputError, match=r"found that it cannot .* meta tensors"):
        Runner(streamed=True).outputs(load_and_ask, torch.float32, torch.arange(3))


@pytest.mark.slow
def test_streamed_experts_differ_by_the_arithmetic_alone(source: Callable[..., Path], tmp_path: Path) -> None:
    """They lie in memory in another order, in which their products are summed differently."""
    folder = source("qwen3_moe", torch.bfloat16)
    convert(folder, tmp_path / "out")
    whole, streamed = (verify_outputs(folder, tmp_path / "out", steps=8, streamed=way) for way in (False, True))
    assert streamed.ok
    assert streamed.greedy
    assert whole.greedy
    assert streamed.greedy.source == whole.greedy.source
    for a, b in ((whole.source, streamed.source), (whole.converted, streamed.converted)):
        assert a
        assert b
        assert a.kl_by_token == pytest.approx(b.kl_by_token, rel=1e-9)


def test_streaming_holds_no_more_than_a_module(source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All other parameters are on the meta device whenever a module runs."""
    folder = source("llama", torch.float32)
    there: set[int] = set()

    def look(model: torch.nn.Module, runs: int) -> None:
        def hook(*args: object) -> None:
            there.add(sum(not parameter.is_meta for parameter in model.parameters()))

        for module in model.modules():
            module.register_forward_hook(hook)

    runner = Runner(streamed=True)
    monkeypatch.setattr(Runner, "_count", lambda self, model, runs: look(model, runs))
    runner.outputs(source_loader(folder, False), torch.float64, torch.arange(5))
    assert max(there) <= 1


def test_the_system_tells_its_memory() -> None:
    assert outputs.available_memory() > 1 << 28


@pytest.mark.slow
def test_the_whole_answer(source: Callable[..., Path], tmp_path: Path) -> None:
    """Through `verify`: plan, weights and outputs; text and JSON; progress to the last byte."""
    folder = source("llama", torch.bfloat16)
    convert(folder, tmp_path / "out")
    seen: list[tuple[int, int]] = []
    stages: list[str] = []
    report = verify(folder, tmp_path / "out", progress=lambda *step: seen.append(step), stage=stages.append)
    assert report.ok
    assert (report.weights.nbytes, report.weights.nbytes) in seen
    assert seen[-1][0] == seen[-1][1]
    assert len(stages) == 8
    data = json.loads(report.to_json())
    assert data["ok"]
    assert data["weights"]["folded"] == 16  # 3 layers of q, k, v, gate, up; and the head
    assert data["outputs"]["source"]["kl"] == report.outputs.source.kl  # type: ignore[union-attr]
    assert "is the same model as" in str(report)
    assert "KL ratio" in str(report)

    damaged(tmp_path / "out", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].neg_())
    report = verify(folder, tmp_path / "out", weights_only=True)
    assert not report.ok
    assert report.outputs is None
    assert "tensor model.layers.1.mlp.up_proj.weight: is not the rounded product; 64 of 6144" in str(report)
    assert "is NOT the same model as" in str(report)


@pytest.mark.slow
def test_untied_conversions_are_recognised(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source("gemma2", torch.bfloat16)
    for untie in (False, True):
        convert(folder, tmp_path / "out", untie=untie, force=True)
        report = verify(folder, tmp_path / "out")
        assert report.ok, str(report)
        assert report.weights.norms == 6 + untie


def test_infinite_numbers_are_json() -> None:
    report = OutputsReport(oracle_perplexity=float("inf"))
    from flashnorm.verify.findings import Finding
    from flashnorm.verify.weights import WeightsReport

    conversion = Conversion(FoldPlan("llama"), Size(1, 2, 1, 0), Size(1, 2, 1, 0))
    weights = WeightsReport(0, 0, 0, 0, 0, 0, 0.0, (Finding("tensor", "a[b]", "is missing"),), 1)
    text = VerifyReport("source", "[bold]out", conversion, weights, report).to_json()
    assert json.loads(text)["outputs"]["oracle_perplexity"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_noise(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(100_000, generator=generator, dtype=torch.float64).mul(5).exp()
    measured = ((numbers.to(dtype).double() - numbers) / numbers).square().mean().sqrt()
    assert measures.rounding_noise(dtype) == pytest.approx(float(measured), rel=0.05)


def test_a_near_tie_is_no_difference() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0], [5.0, 1.0, 4.9], [0.0, 0.0, 9.0]])
    expected = torch.tensor([1, 0, 2])

    def compare(found: list[int], tolerance: float) -> Greedy:
        return measures.compare_greedy(expected, torch.tensor(found), logits, tolerance, None)

    assert compare([1, 0, 2], 0.0).ok
    near = compare([1, 2, 0], 0.2)
    assert (near.identical, near.gap, near.ok) == (1, pytest.approx(0.1, rel=1e-5), True)
    assert not compare([1, 2, 0], 0.05).ok
    assert not compare([1, 1, 2], 0.2).ok
    assert not compare([1, 0], 0.2).ok


# --- as flashnorm.load gives it

needs_kernels = pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")


@pytest.mark.slow
@needs_kernels
def test_what_load_gives_is_judged(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source("llama", torch.bfloat16)
    convert(folder, tmp_path / "out")
    native.runs.clear()
    report = verify_outputs(folder, tmp_path / "out")
    assert native.runs[native.ALL] >= outputs.GREEDY_STEPS
    assert report.ok
    assert report.as_loaded
    assert report.as_loaded.path == "on the fused kernels"
    assert report.as_loaded.run
    assert report.converted
    assert report.as_loaded.run.kl != report.converted.kl
    assert len(report.criteria) == 5


@pytest.mark.slow
def test_what_load_gives_of_a_model_that_the_kernels_do_not_run(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source("cohere", torch.float32)
    convert(folder, tmp_path / "out")
    report = verify_outputs(folder, tmp_path / "out")
    assert report.ok
    assert report.as_loaded
    assert report.as_loaded.path.startswith("in plain PyTorch: ")
    assert report.as_loaded.run == report.converted


def test_without_kernels_the_report_says_so_and_no_warning_does(
    source: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filters of warnings are the process's, so they stay as they are while the model is loaded."""
    convert(source("llama", torch.float32), tmp_path / "out")
    monkeypatch.setattr(native, "library", lambda: None)
    loading = Loading.of(plan_checkpoint(Checkpoint.open(tmp_path / "out")))
    seen: list[list[Any]] = []

    def look(**options: Any) -> Any:
        seen.append(list(warnings.filters))
        return loading.load(**options)

    watched: Any = SimpleNamespace(load=look)
    with warnings.catch_warnings(record=True) as given:
        filters = list(warnings.filters)
        _, path = loaded_model(watched, torch.float32)
    assert path.startswith("in plain PyTorch: expected compiled kernels")
    assert seen == [filters]
    assert not [one for one in given if "plain PyTorch" in str(one.message)]


def _wrong_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    step = FusedDecoder.step
    # Later than the proof behind `optimize` looks.
    monkeypatch.setattr(
        FusedDecoder, "step", lambda self, ids: step(self, ids) * (-1 if self.lengths[0] > 40 else 1), raising=True
    )


def _wrong_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    after = ops.after_attention
    # In longer texts than the proof's.
    monkeypatch.setattr(ops, "after_attention", lambda x, *rest: after(x, *rest) * (0.5 if len(x) > 40 else 1))


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("break_it", [_wrong_steps, _wrong_layers])
def test_a_broken_runtime_fails(
    break_it: Callable[[pytest.MonkeyPatch], None],
    source: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = source("llama", torch.float32)
    convert(folder, tmp_path / "out")
    break_it(monkeypatch)
    report = verify_outputs(folder, tmp_path / "out")
    assert not report.ok
    failed = [criterion for criterion in report.criteria if not criterion.ok]
    assert failed
    assert all("as flashnorm.load gives it (on the fused kernels)" in criterion.asked for criterion in failed)
