"""Checkpoints with some weights quantised: norms that only plain weights read fold, and all commands agree on which."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import flashnorm
import quantised
import tiny
from conversion import same_bits, tensors_of
from flashnorm.convert.whole import convert
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.models.status import folder_status
from flashnorm.plan import Kind
from flashnorm.planning.planned import plan_checkpoint
from flashnorm.verify.integrity import verify_integrity
from flashnorm.verify.whole import verify

FINAL = "model.norm.weight"
ATTENTION = "model.layers.0.input_layernorm.weight"
FOLDS: dict[Callable[[Path], Path], set[str]] = {
    quantised.gpt_oss: {FINAL, ATTENTION, "model.layers.1.input_layernorm.weight"},
    quantised.fp8: {FINAL},
    quantised.fp8_experts: {FINAL, ATTENTION, "model.layers.1.input_layernorm.weight"},
    quantised.gptq: {FINAL},
    quantised.compressed_tensors: {FINAL, ATTENTION},
}


@pytest.fixture(params=FOLDS, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    return request.param


def test_norms_that_plain_weights_read_fold(make: Callable[[Path], Path], tmp_path: Path):
    source, out = make(tmp_path / "source"), tmp_path / "out"
    plan = convert(source, out).plan
    assert {fold.norm for fold in plan.folds} == FOLDS[make]
    assert {kept.kind for name, kept in plan.kept.items() if "_layernorm" in name} == {Kind.QUANTISED}
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() - after.keys() == FOLDS[make]
    folded = {linear.name for fold in plan.folds for linear in fold.linears}
    assert all(same_bits(before[name], tensor) for name, tensor in after.items() if name not in folded)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert set(configs[1]["flashnorm"]["weightless"]) == FOLDS[make]
    assert verify(source, out, weights_only=True).ok
    assert verify_integrity(out).ok
    assert set(plan_checkpoint(Checkpoint.open(out)).tensors.norms) == FOLDS[make]


def test_the_reason_names_the_tensor_and_how_it_is_stored(tmp_path: Path):
    plan = plan_checkpoint(Checkpoint.open(quantised.gpt_oss(tmp_path / "source"))).plan
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    reason = plan.kept["model.layers.0.post_attention_layernorm.weight"].reason
    assert reason == f"{experts} is stored quantised, as {experts}_blocks (U8)"


@pytest.mark.parametrize("make", [quantised.gpt_oss, quantised.fp8, quantised.fp8_experts])
@pytest.mark.slow
def test_outputs_of_what_transformers_dequantises(make: Callable[[Path], Path], tmp_path: Path):
    source, out = make(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    options = {"dtype": torch.float32}
    models = [AutoModelForCausalLM.from_pretrained(folder, **options) for folder in (source, out)]
    expected, plain, loaded = (model(tiny.ids()).logits for model in (*models, flashnorm.load(out, **options)))
    scale = expected.abs().max().item()
    for found in (plain, loaded):  # the folded weights are rounded to bfloat16
        assert (found - expected).abs().max().item() < 2e-2 * scale
    assert folder_status(out).folded == len(FOLDS[make])


@pytest.mark.slow
@pytest.mark.parametrize("make", [quantised.gpt_oss, quantised.fp8])
def test_verify_runs_what_transformers_dequantises(make: Callable[[Path], Path], tmp_path: Path):
    source, out = make(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    outputs = verify(source, out).outputs
    assert outputs is not None
    assert outputs.skipped is None
    assert outputs.ok
    assert outputs.dtype == "bfloat16"


def test_verify_says_why_outputs_were_not_compared(tmp_path: Path):
    source, out = quantised.gptq(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    report = verify(source, out)
    assert report.ok
    assert report.outputs is not None
    assert "q_proj.qweight (I32), and transformers" in str(report.outputs.skipped)


def test_a_checkpoint_that_is_quantised_throughout_is_refused(tmp_path: Path):
    source = quantised.fp8(tmp_path / "source", but=())
    with pytest.raises(InputError, match=r"quantization_config \(fp8\); a gain cannot be folded exactly into"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_output_head_is_no_absent_one(tmp_path: Path):
    def pack(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["lm_head.qweight"] = torch.zeros(8, 128, dtype=torch.int32)

    planned = plan_checkpoint(Checkpoint.open(amended(quantised.gptq(tmp_path / "source"), pack)))
    assert type(planned.model).__name__ == "LlamaForCausalLM"
    assert planned.plan.kept[FINAL].reason == "lm_head.weight is stored quantised, as lm_head.qweight (I32)"


def test_untying_a_quantised_embedding_is_refused(tmp_path: Path):
    source = quantised.fp8(tmp_path / "source", tie_word_embeddings=True)
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight is stored quantised, as F8_E4M3; leave out"):
        convert(source, tmp_path / "out", untie=True)


def amended(source: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("make", [quantised.gptq, quantised.fp8])
def test_the_final_norm_stays_before_a_quantised_head_that_no_code_reads(make: Callable[[Path], Path], tmp_path: Path):
    proj = "model.layers.0.self_attn.q_proj."

    def add(tensors: dict[str, Tensor]) -> None:
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(proj)}
        tensors |= {name.replace("layers.0", "layers.2"): tensor.clone() for name, tensor in mine.items()}

    source = amended(make(tmp_path / "source"), add)
    kept = plan_checkpoint(Checkpoint.open(source)).plan.kept[FINAL]
    assert kept.kind is Kind.UNKNOWN
    assert "model.layers.2.self_attn.q_proj." in kept.reason


def test_scales_alone_are_no_weight(tmp_path: Path):
    source, out = quantised.gptq(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    lost = "model.layers.0.self_attn.q_proj"
    amended(out, lambda tensors: tensors.pop(f"{lost}.qweight"))
    findings = verify_integrity(out).findings
    assert any(finding.name == f"{lost}.weight" and finding.problem == "is missing" for finding in findings)


def test_a_checkpoint_that_was_quantised_after_its_conversion_loads(tmp_path: Path):
    folded, out = tmp_path / "folded", tmp_path / "out"
    convert(tiny.save(tmp_path / "source", tiny.model(tiny.config("llama"), torch.bfloat16)), folded)
    other = quantised.fp8(tmp_path / "other")
    out.mkdir()
    tensors = tensors_of(other)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "norm" not in name},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((other / "config.json").read_text())
    keys = json.loads((folded / "config.json").read_text())["flashnorm"]
    (out / "config.json").write_text(json.dumps(config | {"flash_norm": True, "flashnorm": keys}))
    assert not any("norm" in name for name, _ in flashnorm.load(out).named_parameters())
