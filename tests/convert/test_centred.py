"""`convert --center`: LayerNorms become RMSNorms, through convert, load, verify and generate; and what is refused."""

import contextlib
import inspect
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import flashnorm
import tiny
from conversion import same_bits, tensors_of
from flashnorm.cli import app
from flashnorm.convert import dry_run as dry_runs
from flashnorm.convert import shards, sums
from flashnorm.format import listed_centred
from flashnorm.means import centre, exact_sums
from flashnorm.models.centred import CentredNorm
from flashnorm.models.status import folder_status
from flashnorm.plan import FoldPlan
from flashnorm.verify.float64 import float64_everywhere
from flashnorm.verify.integrity import verify_integrity
from flashnorm.verify.outputs_report import OutputsReport
from handmade import content

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96, "n_positions": 40},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}


def source_of(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    config = tiny.config(model_type, **(SIZES.get(model_type, {}) | {"max_position_embeddings": 40} | overrides))
    return tiny.save(folder, tiny.model(config, dtype))


def is_tied(folder: Path) -> bool:
    return AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings


def logits(model: Any) -> Tensor:
    with torch.no_grad(), float64_everywhere() if model.dtype == torch.float64 else contextlib.nullcontext():
        return model(input_ids=tiny.ids()).logits


def norms(model: nn.Module) -> list[CentredNorm]:
    return [module for module in model.modules() if isinstance(module, CentredNorm)]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_of("gpt2", tmp_path_factory.mktemp("gpt2") / "source")


@pytest.fixture(scope="module")
def out(gpt2: Path) -> Path:
    flashnorm.convert(gpt2, gpt2.parent / "out", center=True, untie=True)
    return gpt2.parent / "out"


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """The converted folder, to be damaged."""
    return Path(shutil.copytree(out, tmp_path / "copy"))


@pytest.mark.slow
def test_it_is_the_same_model(gpt2: Path, out: Path) -> None:
    report = flashnorm.verify(gpt2, out)
    assert report.ok, str(report)
    assert (report.weights.centred, report.weights.folded, report.weights.unchanged) == (10, 5, 0)
    assert "10 the source's minus their mean" in str(report)
    assert verify_integrity(out).ok


def test_every_layer_norm_is_an_rms_norm_when_it_is_loaded(out: Path) -> None:
    model = flashnorm.load(out)
    assert len(norms(model)) == 5
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    x = torch.randn(3, 64) + 5  # not centred, so that the two norms differ
    found = norms(model)[0](x)
    assert torch.allclose(found, x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(), rtol=1e-5)
    assert folder_status(out).centred == 5
    assert "5 LayerNorms are RMSNorms" in str(folder_status(out))


def test_greedy_text_is_the_same(gpt2: Path, out: Path) -> None:
    prompt = tiny.ids(batch=1)
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(gpt2), flashnorm.load(out)]
    assert torch.equal(*(model.generate(prompt, max_new_tokens=8, do_sample=False) for model in models))


def test_centred_weights_are_exact(gpt2: Path, out: Path) -> None:
    before, after = tensors_of(gpt2), tensors_of(out)
    named = listed_centred(json.loads((out / "config.json").read_text()), out)
    assert len(named.writers) == 10
    for writer in named.writers:
        lines = before[writer.name].movedim(writer.axis, -1)
        shape, lines = lines.shape, lines.flatten(0, -2) if lines.dim() > 1 else lines[None]
        expected = centre(lines, exact_sums(lines), lines.shape[1]).view(shape).movedim(-1, writer.axis)
        assert same_bits(after[writer.name], expected)
    assert same_bits(before["transformer.wte.weight"] * before["transformer.ln_f.weight"], after["lm_head.weight"])


@pytest.mark.parametrize(
    ("model_type", "keep_norms"),
    [
        ("gpt_neox", True),
        *(
            pytest.param(name, False, marks=pytest.mark.slow)
            for name in ("gpt_neox", "opt", "stablelm", "cohere", "olmo", "nemotron")
        ),
    ],
)
def test_in_float64_the_outputs_are_the_same(model_type: str, keep_norms: bool, tmp_path: Path) -> None:
    """In `flashnorm.load`, and in plain Transformers, where the norms still are LayerNorms."""
    source = source_of(model_type, tmp_path / "source", torch.float64)
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64))
    result = flashnorm.convert(source, tmp_path / "out", center=True, untie=is_tied(source), keep_norms=keep_norms)
    assert flashnorm.verify(source, tmp_path / "out", weights_only=True).ok
    loaded = flashnorm.load(tmp_path / "out", dtype=torch.float64)
    assert len(norms(loaded)) == result.centred > 0
    for model in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)):
        assert (logits(model) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.slow
def test_narrow_weights(tmp_path: Path) -> None:
    source = source_of("gpt_neox", tmp_path / "source", torch.bfloat16)
    flashnorm.convert(source, tmp_path / "out", center=True)
    report = flashnorm.verify(source, tmp_path / "out")
    assert report.ok, str(report)
    assert len(norms(flashnorm.load(tmp_path / "out"))) == 5


@pytest.mark.slow
def test_whisper(tmp_path: Path) -> None:
    """The decoder's norms; a GELU writes into the encoder's stream."""
    from architectures import causal, families

    config = families.tiny("speech-seq2seq", "whisper")
    config.tie_word_embeddings = False
    source = tmp_path / "source"
    causal.random_model(families.model_class("speech-seq2seq", "whisper"), config).save_pretrained(source)
    result = flashnorm.convert(source, tmp_path / "out", center=True)
    assert flashnorm.verify(source, tmp_path / "out", weights_only=True).ok
    assert {name.split(".")[1] for name in result.plan.centred.norms} == {"decoder"}
    assert {name.split(".")[1] for name in result.plan.centred.kept} == {"encoder"}
    assert len(norms(flashnorm.load(tmp_path / "out"))) == result.centred == 7


def test_embeddings_that_a_caller_gives(gpt2: Path, out: Path) -> None:
    """They may have means: those of the source's embedding do."""
    source = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float64)
    loaded = flashnorm.load(out, dtype=torch.float64)
    assert norms(loaded)
    position = [*inspect.signature(loaded.transformer.forward).parameters].index("inputs_embeds")
    with torch.no_grad(), float64_everywhere():
        given = source.get_input_embeddings()(tiny.ids())
        assert given.mean(-1).abs().max() > 0.01
        expected = source(inputs_embeds=given).logits
        found = loaded(inputs_embeds=given).logits
        of_body = loaded.lm_head(loaded.transformer(*[None] * position, given)[0])
    for one in (found, of_body):
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)  # the files are in float32


@pytest.mark.slow
def test_a_centred_model_can_run_on_the_fused_kernels(tmp_path: Path) -> None:
    """OLMo is a Llama with LayerNorms: centred, the kernels fit it."""
    source = source_of("olmo", tmp_path / "source")
    flashnorm.convert(source, tmp_path / "out", center=True)
    model = flashnorm.load(tmp_path / "out")
    assert flashnorm.status(model).fused_layers == 2
    report = flashnorm.verify(source, tmp_path / "out")
    assert report.ok, str(report)
    assert isinstance(report.outputs, OutputsReport)
    assert "on the fused kernels" in str(report.outputs.as_loaded)
    for norm in norms(model):
        norm.subtracts_mean = True
    assert flashnorm.status(model).fused_layers == 0


# --- what is refused


@pytest.mark.parametrize(
    ("model_type", "overrides", "untie", "reason"),
    [
        ("gpt2", {}, False, r"tied: lm_head.weight is transformer.wte.weight.*--untie"),
        ("llama", {}, False, "no norm subtracts a mean; leave out --center"),
        ("opt", {"do_layer_norm_before": False}, True, "no parameter writes"),
        ("xglm", {"d_model": 64, "ffn_dim": 96, "attention_heads": 4, "num_layers": 2}, True, "no parameter writes"),
    ],
    ids=["tied", "RMSNorm", "a writer that cannot be centred", "positions that are computed"],
)
def test_what_cannot_be_centred(
    model_type: str, overrides: dict[str, Any], untie: bool, reason: str, tmp_path: Path
) -> None:
    source = source_of(model_type, tmp_path / "source", **overrides)
    with pytest.raises(flashnorm.InputError, match=reason):
        flashnorm.convert(source, tmp_path / "out", center=True, untie=untie)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _changed(source: Path, folder: Path, name: str, value: Tensor) -> Path:
    shutil.copytree(source, folder)
    save_file(load_file(folder / "model.safetensors") | {name: value}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_no_code_reads(gpt2: Path, tmp_path: Path) -> None:
    """They may read the residual stream, as the heads of speculative decoding do."""
    source = _changed(gpt2, tmp_path / "source", "mtp.proj.weight", torch.randn(64, 64))
    with pytest.raises(flashnorm.InputError, match=r"mtp\.proj\.weight, which it does not"):
        flashnorm.convert(source, tmp_path / "out", center=True, untie=True)


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.0.mlp.c_proj.bias"])
def test_infinite_weights(gpt2: Path, tmp_path: Path, name: str) -> None:
    value = load_file(gpt2 / "model.safetensors")[name].clone()
    value.view(-1)[7] = float("inf")
    source = _changed(gpt2, tmp_path / "source", name, value)
    with pytest.raises(flashnorm.InputError, match=rf"expected {name} to be centred, found .*infinite"):
        flashnorm.convert(source, tmp_path / "out", center=True, untie=True)
    assert not (tmp_path / "out").exists()


def test_integers_where_weights_are_expected(gpt2: Path, tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_proj.bias"
    source = _changed(gpt2, tmp_path / "source", name, torch.zeros(64, dtype=torch.int8))
    with pytest.raises(flashnorm.InputError, match=f"{name} as one of"):
        flashnorm.convert(source, tmp_path / "out", center=True, untie=True)


# --- several shards, small pieces, interruptions


@pytest.fixture
def in_shards(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same checkpoint in many shards, of which pieces of 1 KB are read: less than a weight's lines have."""
    for module in (shards, sums):
        monkeypatch.setattr(module, "PIECE_BYTES", 1 << 10)
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 3
    return tmp_path / "shards"


@pytest.mark.slow
def test_several_shards(in_shards: Path, out: Path, tmp_path: Path) -> None:
    flashnorm.convert(in_shards, tmp_path / "out", center=True, untie=True)
    found, expected = tensors_of(tmp_path / "out"), tensors_of(out)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in found)
    assert flashnorm.verify(in_shards, tmp_path / "out", weights_only=True).ok


def test_a_linear_layer_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines run across all of its rows, so they are added up ahead of the pieces."""
    source = source_of("gpt_neox", tmp_path / "source", torch.bfloat16)
    flashnorm.convert(source, tmp_path / "whole", center=True)
    for module in (shards, sums):
        monkeypatch.setattr(module, "PIECE_BYTES", 1 << 10)
    flashnorm.convert(source, tmp_path / "out", center=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_interrupted_run_continues(in_shards: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"center": True, "untie": True}
    with pytest.raises(KeyboardInterrupt):
        flashnorm.convert(in_shards, tmp_path / "out", progress=interrupt, **options)
    result = flashnorm.convert(in_shards, tmp_path / "out", **options)
    assert result.resumed_shards > 0
    flashnorm.convert(in_shards, tmp_path / "undisturbed", **options)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


# --- what verify finds


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.1.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.bias"]
)
def test_a_wrong_bit_is_found(gpt2: Path, copy: Path, name: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    flat = tensors[name].view(-1).view(torch.int32)
    flat[11] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    findings = {one.name: one for one in flashnorm.verify(gpt2, copy, weights_only=True).weights.findings}
    assert (findings[name].problem, findings[name].differing) == ("is not the source's minus its mean, rounded", 1)
    assert findings[name].index == ((11,) if tensors[name].dim() == 1 else (0, 11))


def test_a_weight_that_was_left_as_it_was_is_found(gpt2: Path, copy: Path) -> None:
    name = "transformer.wpe.weight"
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = load_file(gpt2 / "model.safetensors")[name]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert name in {one.name for one in flashnorm.verify(gpt2, copy, weights_only=True).weights.findings}
    assert "its mean is not zero" in {one.name: one.problem for one in verify_integrity(copy).findings}[name]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["gone", "another axis"])
def test_a_wrong_config_is_found(gpt2: Path, copy: Path, change: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    entry = config["flashnorm"]
    if change == "gone":
        del entry["centred"]
    else:
        entry["centred"]["writers"]["transformer.wpe.weight"] = 0
    (copy / "config.json").write_text(json.dumps(config))
    assert "config.json" in {one.name for one in flashnorm.verify(gpt2, copy, weights_only=True).weights.findings}
    assert "config.json" in {one.name for one in verify_integrity(copy).findings}


@pytest.mark.parametrize("centred", [[], {"norms": ["a"]}, {"norms": [1], "writers": {}}, {"norms": [], "writers": 1}])
def test_a_config_that_cannot_be_read(copy: Path, centred: Any) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["flashnorm"]["centred"] = centred
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(flashnorm.InputError, match=r"flashnorm\.centred"):
        flashnorm.load(copy)


def test_names_that_the_model_does_not_have(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["flashnorm"]["centred"]["norms"].append("transformer.h.9.ln_1")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(flashnorm.InputError, match=r"transformer.h.9.ln_1; do config.json"):
        flashnorm.load(copy)


# --- when weights change


def _plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_training_makes_them_layer_norms(out: Path, tmp_path: Path) -> None:
    """Trained weights are not centred. The model stays what plain Transformers makes of its folder."""
    model = flashnorm.load(out).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.1
    model.eval()
    assert all(norm.subtracts_mean for norm in norms(model))
    model.save_pretrained(tmp_path / "trained")
    with pytest.warns(UserWarning, match="LayerNorms stay"):
        again = flashnorm.load(tmp_path / "trained")
    assert not norms(again)
    expected = logits(_plain(tmp_path / "trained"))
    for one in (model, again):
        assert torch.allclose(logits(one), expected, rtol=1e-5, atol=1e-5)


def test_a_saved_model_is_centred_as_before(out: Path, tmp_path: Path) -> None:
    flashnorm.load(out).save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = flashnorm.load(tmp_path / "saved")
    assert len(norms(again)) == 5
    assert torch.equal(logits(again), logits(flashnorm.load(out)))
    half = flashnorm.load(out, dtype=torch.bfloat16)  # the mean of what was rounded again is not exactly zero
    assert len(norms(half)) == 5


@pytest.mark.slow
def test_adapters_make_them_layer_norms(gpt2: Path, out: Path, tmp_path: Path) -> None:
    """What an adapter writes is not centred. With LayerNorms, the model is the same as in plain Transformers."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(flashnorm.load(out), config).eval()
    found = logits(wrapped)
    assert all(norm.subtracts_mean for norm in norms(wrapped))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(found, logits(peft.PeftModel.from_pretrained(_plain(out), tmp_path / "adapter")), atol=1e-5)
    merged = wrapped.merge_and_unload()
    assert torch.allclose(logits(merged), found, atol=1e-5)
    of_source = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(_plain(gpt2), of_source).save_pretrained(tmp_path / "of the source")
    with pytest.raises(flashnorm.InputError, match="--center"):
        flashnorm.convert_adapter(tmp_path / "of the source", gpt2, tmp_path / "converted", folded=out)


def test_an_adapter_for_the_uncentred_version_is_not_for_this_one(gpt2: Path, out: Path, tmp_path: Path) -> None:
    plan = flashnorm.convert(gpt2, tmp_path / "folded", untie=True).plan
    manifest = json.loads((out / "flashnorm.json").read_text())
    centred = FoldPlan.from_dict(manifest["plan"])
    assert centred.folds == plan.folds
    assert centred.folds_hash() != plan.folds_hash()


# --- the command line


def test_the_commands(gpt2: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    looked = run(app, ["convert", str(gpt2), str(tmp_path / "out"), "--center", "--untie", "--dry-run"])
    assert "centre 10 tensors" in looked.output
    assert "becomes an RMSNorm" in looked.output
    done = run(app, ["convert", str(gpt2), str(tmp_path / "out"), "--center", "--untie"])
    assert "5 LayerNorms are RMSNorms, 10 tensors are centred" in done.output
    found = dry_runs.dry_run(gpt2, tmp_path / "other", center=True, untie=True)
    written = {name: (tmp_path / "out" / name).stat().st_size for name in found.written}
    assert (found.writers, found.written) == (10, written)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 LayerNorms are RMSNorms" in card


def test_code_with_another_writer_subtracts_the_mean(gpt2: Path, copy: Path) -> None:
    """As a newer Transformers would have it, of which config.json says nothing."""
    config = json.loads((copy / "config.json").read_text())
    del config["flashnorm"]["centred"]["writers"]["transformer.wpe.weight"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="5 LayerNorms subtract the mean, although config.json says"):
        model = flashnorm.load(copy, dtype=torch.float64)
    assert not norms(model)
    expected = logits(AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float64))
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)  # its weights are float32
