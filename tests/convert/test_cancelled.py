"""`convert --cancel`: norms whose divisions cancel are not computed, through convert, load, verify and generate."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import flashnorm
import tiny
from architectures import causal, configs
from flashnorm.cli import app
from flashnorm.models.cancelled import CancelledNorm, EndingNorm
from flashnorm.models.status import folder_status
from flashnorm.plan import Ending, Form
from flashnorm.planning.cancelled import _why_not
from flashnorm.verify.float64 import float64_everywhere
from flashnorm.verify.integrity import verify_integrity
from flashnorm.verify.outputs_report import OutputsReport

EPS = 0.05  # large enough to show


def source_of(model_type: str, folder: Path, dtype: torch.dtype = torch.float64, **overrides: Any) -> Path:
    config = configs.tiny_config(model_type)
    for name, value in overrides.items():
        setattr(config, name, value)
    model: Any = causal.random_model(causal.model_class(config), config)
    model.to(dtype).save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 100, (2, 4), generator=torch.Generator().manual_seed(0))  # as many tokens as heads
    with torch.no_grad(), float64_everywhere():
        return model.double()(input_ids=ids).logits


def cancelled(model: nn.Module) -> list[CancelledNorm]:
    return [module for module in model.modules() if isinstance(module, CancelledNorm)]


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With queries, keys and values that are normalised, and an `eps` of a size that matters."""
    return source_of("gemma4_text", tmp_path_factory.mktemp("gemma4") / "source", rms_norm_eps=EPS)


@pytest.fixture(scope="module")
def exact(gemma4: Path) -> Path:
    flashnorm.convert(gemma4, gemma4.parent / "exact", cancel="exact")
    return gemma4.parent / "exact"


@pytest.fixture(scope="module")
def drop(gemma4: Path) -> Path:
    flashnorm.convert(gemma4, gemma4.parent / "drop", cancel="drop")
    return gemma4.parent / "drop"


@pytest.mark.slow
def test_the_exact_form_is_the_same_model(gemma4: Path, exact: Path) -> None:
    report = flashnorm.verify(gemma4, exact, weights_only=True)
    assert report.ok, str(report)
    assert verify_integrity(exact).ok
    model = flashnorm.load(exact)
    assert len(cancelled(model)) == 2
    expected = logits(AutoModelForCausalLM.from_pretrained(gemma4))
    assert (logits(model) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (logits(copy.deepcopy(model)) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.slow
def test_no_division_is_computed(exact: Path) -> None:
    model: Any = flashnorm.load(exact)
    for layer in model.model.layers:
        x = 100 * torch.randn(2, 3, 64, dtype=torch.float64)
        assert layer.input_layernorm(x) is x
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm, layer.self_attn.v_norm):
            assert isinstance(norm, EndingNorm)
    assert "2 are not computed" in str(folder_status(exact))


@pytest.mark.slow
def test_with_eps_dropped_it_is_an_approximation(gemma4: Path, drop: Path) -> None:
    """`verify` says how large the change is in a norm, and that it is not the same model if it shows."""
    report = flashnorm.verify(gemma4, drop)
    assert report.weights.ok
    assert isinstance(report.outputs, OutputsReport)
    assert report.outputs.dropped is not None
    assert 1e-3 < report.outputs.dropped < 1
    assert not report.ok
    assert "eps was dropped: what a norm gives changes by at most" in str(report)
    model = flashnorm.load(drop)
    assert len(cancelled(model)) == 2
    assert not any(isinstance(module, EndingNorm) for module in model.modules())
    expected = logits(AutoModelForCausalLM.from_pretrained(gemma4))
    change = (logits(model) - expected).abs().max() / expected.abs().max()
    assert 1e-6 < change < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["exact", "drop"])
def test_ordinary_eps(form: str, tmp_path: Path) -> None:
    """With the `eps` that models have, both forms are the same model in their dtype, and write the same text."""
    source = source_of("gemma4_text", tmp_path / "source", torch.bfloat16)
    result = flashnorm.convert(source, tmp_path / "out", cancel=form, verify=form == "drop")
    assert result.cancelled == 2
    if result.report is not None:
        assert isinstance(result.report.outputs, OutputsReport)
        assert result.report.outputs.dropped is not None
        assert result.report.outputs.dropped < 1e-3
    ids = tiny.ids(batch=1, tokens=5) % 100
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(source), flashnorm.load(tmp_path / "out")]
    texts = [model.float().generate(ids, max_new_tokens=6, do_sample=False) for model in models]
    assert torch.equal(*texts)


@pytest.mark.slow
def test_behind_a_squared_relu(tmp_path: Path) -> None:
    """BitNet's MLP: gate and up are behind the norm, and `relu(gate)^2 * up` has the third power of its scale."""
    source = source_of("bitnet", tmp_path / "source", rms_norm_eps=EPS)
    plan = flashnorm.convert(source, tmp_path / "out", cancel="exact").plan
    assert {one.power for ends in plan.cancelled.norms.values() for one in ends} == {6.0}
    assert flashnorm.verify(source, tmp_path / "out").ok


def test_what_does_not_know_the_key_computes_the_norms(gemma4: Path, exact: Path, drop: Path) -> None:
    """No weight is changed, so plain Transformers has the source's outputs, also where `eps` is dropped."""
    expected = logits(AutoModelForCausalLM.from_pretrained(gemma4))
    for out in (exact, drop):
        found = logits(AutoModelForCausalLM.from_pretrained(out))
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert json.loads((exact / "config.json").read_text())["flashnorm"]["version"] == 3


@pytest.mark.slow
def test_a_saved_model_says_so_as_well(exact: Path, tmp_path: Path) -> None:
    flashnorm.load(exact).save_pretrained(tmp_path / "saved")
    again = flashnorm.load(tmp_path / "saved")
    assert len(cancelled(again)) == 2
    assert torch.equal(logits(again), logits(flashnorm.load(exact)))


def test_in_float16_norms_are_computed(exact: Path) -> None:
    """What is not divided may be too large for float16."""
    model: Any = flashnorm.load(exact, dtype=torch.float16)
    norm = model.model.layers[0].input_layernorm
    x = torch.full((1, 3, 64), 300.0, dtype=torch.float16)
    assert float(norm(x).abs().max()) <= 1
    assert norm.squares is None


@pytest.mark.slow
def test_with_an_adapter_norms_are_computed(exact: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(flashnorm.load(exact), config).eval()
    assert all(norm.computed for norm in cancelled(wrapped))


@pytest.mark.parametrize("dims", [(0, 1), (0, 2)])
def test_tokens_are_found_by_their_dimensions(dims: tuple[int, ...]) -> None:
    """Not by their number: here there are as many tokens as heads."""
    x = torch.randn(2, 4, 16, dtype=torch.float64) * torch.logspace(-2, 2, 4)[:, None]
    first, second = CancelledNorm(EPS, Form.EXACT), EndingNorm(EPS)
    second.takes_over(first, Ending("second", 2.0, dims))
    heads = x.view(2, 4, 4, 4) if dims == (0, 1) else x.view(2, 4, 4, 4).transpose(1, 2)
    root = (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    divided = (x / root).view(2, 4, 4, 4)
    divided = divided if dims == (0, 1) else divided.transpose(1, 2)
    expected = divided * torch.rsqrt(divided.pow(2).mean(-1, keepdim=True) + EPS)
    assert first(x) is x
    assert torch.allclose(second(heads), expected, rtol=1e-12)
    first(x[:1])
    with pytest.raises(RuntimeError, match="expected 1 tokens along dimension 0"):
        second(heads)


# --- almost


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("llama", {}, r"none among 5 \(0 cancel in part\)"),
        ("qwen3", {}, r"none among 9 \(2 cancel in part\)"),
        ("gemma4_text", {"attention_bias": True}, r"found none among 18"),
    ],
    ids=["nothing behind", "a second reader without norm", "a bias before the second norm"],
)
def test_what_is_not_cancelled(model_type: str, overrides: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = source_of(model_type, tmp_path / "source", torch.float32, **overrides)
    with pytest.raises(flashnorm.InputError, match=reason):
        flashnorm.convert(source, tmp_path / "out", cancel="exact")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class Shared(nn.Module):
    """A norm that two blocks share, or one behind it that they share."""

    def __init__(self, first: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(6, elementwise_affine=False) for _ in range(2 - first))
        self.ends = nn.ModuleList(nn.RMSNorm(8, elementwise_affine=False) for _ in range(1 + first))
        self.linears = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip((self.norms[0], self.norms[-1]), (self.ends[0], self.ends[-1]), self.linears, strict=True)
        return torch.cat([end(linear(norm(x * (1 + i)))) for i, (norm, end, linear) in enumerate(pairs)])


@pytest.mark.parametrize(("first", "shared"), [(True, "norms.0"), (False, "ends.0")])
def test_norms_of_two_blocks(first: bool, shared: str) -> None:
    found = flashnorm.removable(Shared(first), (torch.randn(2, 3, 6),))
    cancels = [one for one in found.divisions if one.verdict.value == "cancels"]
    assert cancels
    for division in cancels:
        assert division.shared == shared
        assert _why_not(division, (), set(), set()) == f"{shared} runs more than once"


@pytest.mark.slow
def test_a_norm_that_keeps_its_gain_is_computed(gemma4: Path, tmp_path: Path) -> None:
    keep = ["model.layers.0.input_layernorm"]
    plan = flashnorm.convert(gemma4, tmp_path / "out", cancel="exact", keep=keep).plan
    assert [*plan.cancelled.norms] == ["model.layers.1.input_layernorm"]
    assert "does not fold" in plan.cancelled.kept["model.layers.0.input_layernorm"].reason
    expected = logits(AutoModelForCausalLM.from_pretrained(gemma4))
    assert (logits(flashnorm.load(tmp_path / "out")) - expected).abs().max() <= 1e-10 * expected.abs().max()


# --- what verify finds, and the command line


@pytest.mark.slow
@pytest.mark.parametrize("change", ["power", "gone"])
def test_a_wrong_config_is_found(exact: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(exact, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    if change == "power":
        config["flashnorm"]["cancelled"]["norms"]["model.layers.0.input_layernorm"][0]["power"] = 4
    else:
        del config["flashnorm"]["cancelled"]
    (folder / "config.json").write_text(json.dumps(config))
    assert {"config.json"} <= {one.name for one in verify_integrity(folder).findings}


def test_a_config_that_cannot_be_read(exact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exact, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["flashnorm"]["cancelled"]["form"] = "half"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(flashnorm.InputError, match=r"flashnorm\.cancelled"):
        flashnorm.load(folder)


@pytest.mark.slow
def test_the_commands(gemma4: Path, tmp_path: Path) -> None:
    run, out = CliRunner().invoke, str(tmp_path / "out")
    assert "is not computed (exact)" in run(app, ["convert", str(gemma4), out, "--cancel", "exact", "--dry-run"]).output
    with pytest.raises(flashnorm.InputError, match="expected exact or drop for --cancel, found 'half'"):
        flashnorm.convert(gemma4, out, cancel="half")


def test_code_with_another_eps_computes_the_norms(gemma4: Path, exact: Path, tmp_path: Path) -> None:
    """As a newer Transformers would have it, of which config.json says nothing."""
    out = shutil.copytree(exact, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    listed = config["flashnorm"]["cancelled"]["norms"]
    for ends in listed.values():
        ends[0]["power"] = 4
    (out / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=f"{len(listed)} norms are computed, although config.json says"):
        model = flashnorm.load(out, dtype=torch.float64)
    assert not cancelled(model)
    expected = logits(AutoModelForCausalLM.from_pretrained(gemma4, dtype=torch.float64))
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
