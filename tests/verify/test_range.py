"""Products that leave the range of their dtype: the norm stays, everything else folds, and `verify` is of one mind."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import flashnorm
import tiny
from flashnorm.arithmetic import fold_weight, gain_of, largest_weights, overflowed
from flashnorm.convert.whole import convert_checkpoint
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.files.records import file_record
from flashnorm.plan import FoldPlan, Kept
from flashnorm.planning.names import tensor_plan
from flashnorm.planning.planned import plan_checkpoint
from flashnorm.verify.formats import FORMATS
from flashnorm.verify.gains import ExactGain
from flashnorm.verify.integrity import IntegrityReport
from flashnorm.verify.range import out_of_range
from flashnorm.verify.report import VerifyReport
from handmade import content

INPUT, POST = "model.layers.{}.input_layernorm.weight", "model.layers.{}.post_attention_layernorm.weight"
Q, UP = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"
FINAL, HEAD = "model.norm.weight", "lm_head.weight"
TAGS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def build(model_type: str = "llama", dtype: torch.dtype = torch.float16, **config: Any) -> PreTrainedModel:
    return tiny.model(tiny.config(model_type, **{"tie_word_embeddings": False} | config), dtype)


def enlarge(model: nn.Module, norm: str, gain: float, linear: str, weight: float, channel: int = 5) -> None:
    """Give a norm and one weight of a linear values whose product is to be tried."""
    with torch.no_grad():
        model.get_parameter(norm)[channel] = gain
        model.get_parameter(linear)[..., 3, channel] = weight


def finite(folder: Path) -> bool:
    return all(t.isfinite().all() for file in folder.glob("*.safetensors") for t in load_file(file).values())


def compare(source: Path, out: Path) -> VerifyReport:
    return flashnorm.verify(source, out, weights_only=True)


def alone(out: Path) -> IntegrityReport:
    report = flashnorm.verify(out, weights_only=True)
    assert isinstance(report, IntegrityReport)
    return report


def check(tmp_path: Path, model: PreTrainedModel, kept: set[str], shard: str = "5GB", **options: Any) -> str:
    """Convert; the named norms stay, the rest folds, all that reads the result agrees. The reasons."""
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source, max_shard_size=shard)
    foldable = {fold.norm for fold in flashnorm.plan(source, untie=options.get("untie", False)).folds}
    result = flashnorm.convert(source, out, **options)
    plan = result.plan
    assert {fold.norm for fold in plan.folds} == foldable - kept
    assert kept <= set(plan.kept)
    assert result.norms == len(plan.folds)
    assert finite(out)
    manifest = json.loads((out / "flashnorm.json").read_text())
    why = {name: replace(reason, kind=None) for name, reason in plan.kept.items()}
    assert FoldPlan.from_dict(manifest["plan"]) == replace(plan, kept=why)
    assert not set(json.loads((out / "config.json").read_text())["flashnorm"]["weightless"]) & kept
    assert compare(source, out).weights.findings == ()
    assert alone(out).findings == ()
    loaded = flashnorm.load(out, optimize=False)
    assert kept <= {name for name, _ in loaded.named_parameters()}
    for name in kept:
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    return "; ".join(plan.kept[name].reason for name in sorted(kept))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("keep_norms", [False, True])
def test_one_product_that_does_not_fit_keeps_its_norm(tmp_path: Path, shard: str, keep_norms: bool) -> None:
    model = build()
    enlarge(model, INPUT.format(1), -3000, Q.format(1), 60)
    reason = check(tmp_path, model, {INPUT.format(1)}, shard, keep_norms=keep_norms)
    assert reason == f"its gain of -3000 times a weight of 60 in channel 5 of {Q.format(1)} is too large for float16"


def test_a_product_just_below_the_limit_folds(tmp_path: Path) -> None:
    model = build()
    enlarge(model, INPUT.format(1), 2.0, Q.format(1), 32752.0)  # 65504, the largest float16
    check(tmp_path, model, set())


def test_several_norms_in_several_shards(tmp_path: Path) -> None:
    model = build()
    enlarge(model, INPUT.format(0), 3000, Q.format(0), 60)
    enlarge(model, POST.format(1), 3000, UP.format(1), 60)
    enlarge(model, FINAL, 3000, HEAD, -60)
    check(tmp_path, model, {INPUT.format(0), POST.format(1), FINAL}, "60KB")


def test_a_gain_of_one_plus_w(tmp_path: Path) -> None:
    model = build("gemma")
    enlarge(model, INPUT.format(1), 1092.0, Q.format(1), 60)  # 1093 * 60 > 65520 > 1092 * 60
    assert "gain of 1093 " in check(tmp_path, model, {INPUT.format(1)})


@pytest.mark.slow
def test_fused_projections_and_experts(tmp_path: Path) -> None:
    fused = build("phi3")
    enlarge(fused, INPUT.format(1), 3000, "model.layers.1.self_attn.qkv_proj.weight", 60)
    check(tmp_path / "fused", fused, {INPUT.format(1)})
    experts = build("qwen3_moe", **tiny.EXPERTS)
    enlarge(experts, POST.format(1), 3000, "model.layers.1.mlp.experts.gate_up_proj", 60)
    assert "60 in channel 5 of model.layers.1.mlp.experts." in check(tmp_path / "experts", experts, {POST.format(1)})


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.slow
def test_a_head_that_is_untied(tmp_path: Path, shard: str) -> None:
    model = build(tie_word_embeddings=True)
    enlarge(model, FINAL, 3000, "model.embed_tokens.weight", 60)
    assert "of lm_head.weight" in check(tmp_path, model, {FINAL}, shard, untie=True)


@pytest.mark.parametrize(("dtype", "gain"), [(torch.bfloat16, 3e4), (torch.float32, 3.5e4)])
def test_wide_dtypes(tmp_path: Path, dtype: torch.dtype, gain: float) -> None:
    model = build(dtype=dtype)
    enlarge(model, INPUT.format(1), gain, Q.format(1), 2e34)
    check(tmp_path, model, {INPUT.format(1)})


def test_what_the_source_holds_is_not_our_doing(tmp_path: Path) -> None:
    model = build()
    enlarge(model, INPUT.format(0), 2.0, Q.format(0), float("inf"))
    enlarge(model, INPUT.format(1), float("inf"), Q.format(1), 60)
    enlarge(model, POST.format(0), 2.0, UP.format(0), float("nan"))
    enlarge(model, POST.format(1), float("nan"), UP.format(1), 60000)
    model.save_pretrained(tmp_path / "source")
    result = flashnorm.convert(tmp_path / "source", tmp_path / "out")
    assert (result.norms, result.plan.kept) == (5, {})
    assert compare(tmp_path / "source", tmp_path / "out").weights.findings == ()
    assert {finding.name for finding in alone(tmp_path / "out").findings} >= {Q.format(0), Q.format(1)}
    assert len(flashnorm.fold_(model).config.flashnorm["weightless"]) == 5  # pyright: ignore[reportAttributeAccessIssue]


def test_an_infinity_in_the_source_hides_no_product(tmp_path: Path) -> None:
    model = build()
    enlarge(model, INPUT.format(1), 3000, Q.format(1), 60)
    with torch.no_grad():
        model.get_parameter(Q.format(1))[2, 5] = float("inf")
        model.get_parameter(Q.format(1))[1, 5] = float("nan")
    model.save_pretrained(tmp_path / "source")
    result = flashnorm.convert(tmp_path / "source", tmp_path / "out")
    assert set(result.plan.kept) == {INPUT.format(1)}
    assert compare(tmp_path / "source", tmp_path / "out").weights.findings == ()


def test_nothing_left_to_fold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = build(num_hidden_layers=1, tie_word_embeddings=True)
    enlarge(model, INPUT.format(0), 3000, Q.format(0), 60)
    enlarge(model, POST.format(0), 3000, UP.format(0), 60)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match=r"found none .*times a weight of 60"):
        flashnorm.convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(InputError, match=r"found none .*times a weight of 60"):
        flashnorm.fold_(model)


def test_folding_in_memory(tmp_path: Path) -> None:
    model = build()
    enlarge(model, INPUT.format(1), 3000, Q.format(1), 60)
    model.save_pretrained(tmp_path / "source")
    flashnorm.convert(tmp_path / "source", tmp_path / "out")
    flashnorm.fold_(model).save_pretrained(tmp_path / "saved")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", range(8))
def test_an_interrupted_run_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    model = build()
    enlarge(model, INPUT.format(1), 3000, Q.format(1), 60)
    enlarge(model, FINAL, 3000, HEAD, -60)
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="30KB")
    flashnorm.convert(source, tmp_path / "whole")
    checkpoint = Checkpoint.open(source)
    writes = 0

    def interrupted(self: Checkpoint) -> None:  # it is asked after each shard
        nonlocal writes
        writes += 1
        if writes > killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "check_unchanged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(plan_checkpoint(checkpoint), tmp_path / "out")
    result = flashnorm.convert(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert set(result.plan.kept) == {INPUT.format(1), FINAL}
    if killed_at == 7:
        assert result.resumed_shards > 1


def test_a_plan_without_norms_is_the_plan_made_without_them(tmp_path: Path) -> None:
    for model_type in ("qwen3_moe", "phi3", "gpt2", "gemma"):
        source = tmp_path / model_type
        build(model_type, **tiny.EXPERTS).save_pretrained(source)
        planned = plan_checkpoint(Checkpoint.open(source))
        for fold in planned.plan.folds:
            without = planned.keep({fold.norm: Kept("so")})
            assert without.tensors == tensor_plan(without.plan, planned.stored)


class TestVerify:
    """`verify` decides by itself what must stay."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        model = build()
        enlarge(model, INPUT.format(1), 3000, Q.format(1), 60)
        model.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    def test_an_old_conversion_that_folded_it_fails(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        with monkeypatch.context() as patched:
            patched.setattr("flashnorm.planning.overflow.Overflows.reasons", lambda self, norms: {})
            flashnorm.convert(source, out)
        assert not finite(out)
        report = compare(source, out)
        assert not report.ok
        (finding,) = report.weights.findings
        assert str(finding) == (
            f"tensor {Q.format(1)}: became infinite, as the product does not fit F16: its norm must be kept; 1 of 4096 "
            "elements, the first at [3, 5]: found inf (0x7c00), expected 60 (0x5380) times a gain of 3000"
        )
        (finding,) = alone(out).findings
        assert finding.problem.startswith("holds infinite weights")
        assert finding.index == (3, 5)

    @pytest.mark.parametrize("kept", [INPUT.format(0), POST.format(1)])
    def test_a_norm_that_stays_without_need_fails(self, source: Path, tmp_path: Path, kept: str) -> None:
        planned = plan_checkpoint(Checkpoint.open(source)).keep({kept: Kept("without need")})
        convert_checkpoint(planned, tmp_path / "out")
        assert not compare(source, tmp_path / "out").ok
        assert any(kept in str(finding) for finding in compare(source, tmp_path / "out").weights.findings)
        assert any(kept in str(finding) for finding in alone(tmp_path / "out").findings)

    def test_a_kept_norm_must_be_unchanged(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        flashnorm.convert(source, out)
        tensors = load_file(out / "model.safetensors")
        tensors[INPUT.format(1)][0] += 1
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        manifest = json.loads((out / "flashnorm.json").read_text())
        manifest["files"]["model.safetensors"] = vars(file_record(out / "model.safetensors"))
        (out / "flashnorm.json").write_text(json.dumps(manifest))
        (finding,) = compare(source, out).weights.findings
        assert finding.name == INPUT.format(1)

    @pytest.mark.slow
    def test_convert_verifies_it(self, source: Path, tmp_path: Path) -> None:
        model = build()
        enlarge(model, INPUT.format(1), 3000, Q.format(1), 60)
        with torch.no_grad():  # the channel is silent, else the source computes infinities itself
            model.get_parameter("model.embed_tokens.weight")[:, 5] = 0
            model.get_parameter("model.layers.0.self_attn.o_proj.weight")[5] = 0
            model.get_parameter("model.layers.0.mlp.down_proj.weight")[5] = 0
        model.save_pretrained(source)
        result = flashnorm.convert(source, tmp_path / "out", verify=True)
        assert result.report
        assert result.report.ok
        assert INPUT.format(1) in result.report.conversion.plan.kept


def test_lost_bits_are_counted(tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        model.get_parameter(INPUT.format(1))[7] = 1e-4
        weight = model.get_parameter(Q.format(1))
        weight[:, 7] = 1.0
        weight[0, 7], weight[1, 7], weight[2, 7], weight[3, 7] = 0.01, 1e-4, 0.0, 1e-7  # the last is subnormal itself
        for name in ("k", "v"):
            model.get_parameter(f"model.layers.1.self_attn.{name}_proj.weight")[:, 7] = 1.0
    model.save_pretrained(tmp_path / "source")
    flashnorm.convert(tmp_path / "source", tmp_path / "out")
    report = compare(tmp_path / "source", tmp_path / "out")
    underflow = report.weights.underflow
    expected = reference(load_file(tmp_path / "source" / "model.safetensors"), tmp_path)
    assert (underflow.products, underflow.zeros) == expected
    assert underflow.zeros >= 1
    assert underflow.largest_error == 1.0
    assert json.loads(report.to_json())["weights"]["underflow"] == underflow.to_dict()
    assert str(underflow)[:60] in str(report)


def reference(tensors: dict[str, Tensor], folder: Path) -> tuple[int, int]:
    """Products below the normal numbers though the weight is not and the gain is not zero, and zeros, one by one."""
    names = plan_checkpoint(Checkpoint.open(folder / "source")).tensors
    small = zeros = 0
    for name, fold in names.folds.items():
        gain = tensors[fold.gains[0].norm].double()
        folded = fold_weight(tensors[name], gain_of(tensors[fold.gains[0].norm]), fold.axis)
        lost = (folded.abs() < 2.0**-14) & (tensors[name].abs() >= 2.0**-14) & (gain != 0)
        small, zeros = small + int(lost.sum()), zeros + int((lost & (folded == 0)).sum())
    return small, zeros


@given(data=st.data())
@pytest.mark.parametrize("dtype", TAGS, ids=str)
def test_both_criteria_are_those_of_rational_numbers(dtype: torch.dtype, data: st.DataObject) -> None:
    """Infinite if and only if the exact product is at least half a unit beyond the largest number."""
    limits = torch.finfo(dtype)
    limit = Fraction(limits.max) * (1 + Fraction(limits.eps) / 2 / (2 - Fraction(limits.eps)))
    offset = data.draw(st.sampled_from([0.0, 1.0]))
    near = st.floats(limits.max / 4, limits.max).map(lambda x: x / 300)
    weights = data.draw(st.lists(near | st.sampled_from([0.0, limits.max, float("inf"), float("nan")]), min_size=1))
    gains = st.floats(-400, 400) | st.sampled_from([300.0, 1.0, limits.eps / 2, float("inf"), float("nan")])
    weight = torch.tensor(weights, dtype=torch.float64).to(dtype)[None]
    norm = torch.tensor(data.draw(st.lists(gains, min_size=len(weights), max_size=len(weights)))).to(dtype)
    gain = gain_of(norm, offset)
    folded = fold_weight(weight, gain, 1)
    expected = []
    for w, g in zip(weight[0].tolist(), norm.tolist(), strict=True):
        exact = np.isfinite([w, g]).all() and abs(Fraction(w) * (Fraction(g) + Fraction(offset))) >= limit
        expected.append(bool(exact))
    assert (overflowed(weight, folded, gain, 1) != 0).tolist() == expected
    row = largest_weights(weight, 1)[None]
    assert (overflowed(row, fold_weight(row, gain, 1), gain, 1) != 0).tolist() == expected
    bits = FORMATS[TAGS[dtype]].bits
    source, stored = (t.contiguous().view(torch.uint8).numpy().view(bits).reshape(-1) for t in (weight, folded))
    exact_gain = ExactGain.of(norm.double().numpy(), offset, len(weights))
    places, _ = out_of_range(TAGS[dtype], source, stored, exact_gain, 0, 1)
    assert places.tolist() == [i for i, infinite in enumerate(expected) if infinite]
