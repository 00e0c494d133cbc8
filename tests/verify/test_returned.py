"""Verification of models that are no causal language models: what they return is compared, and wrong ones are found."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import tiny
from flashnorm.convert.whole import convert
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.planning.planned import plan_checkpoint
from flashnorm.verify import returned
from flashnorm.verify.divergence import vector_errors
from flashnorm.verify.inputs import DRAWS, PIECES, CallWithNumbers, NotRunError, calls_with_numbers
from flashnorm.verify.outputs import verify_outputs
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.returned import ReturnedReport, compare_returned
from flashnorm.verify.runs import Runner, source_loader

IMAGES = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
IMAGES |= {"num_attention_heads": 2, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2}
TEXT = tiny.SIZES | {"max_position_embeddings": 96, "num_labels": 1}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
WHISPER = {"vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "eos_token_id": 1}
WHISPER |= {"bos_token_id": 1, "decoder_start_token_id": 1}

# Class -> type, sizes, and a tensor that takes a gain.
KINDS = {
    "ModernBertForMaskedLM": ("modernbert", TEXT, "model.layers.1.mlp.Wi.weight"),
    "LlamaForSequenceClassification": ("llama", TEXT, "model.layers.0.self_attn.v_proj.weight"),
    "Qwen3Model": ("qwen3", TEXT, "layers.1.mlp.up_proj.weight"),
    "ViTForImageClassification": ("vit", IMAGES, "vit.encoder.layer.1.intermediate.dense.weight"),
    "T5ForConditionalGeneration": ("t5", T5, "encoder.block.1.layer.1.DenseReluDense.wi.weight"),
    "WhisperForConditionalGeneration": ("whisper", WHISPER, "model.decoder.layers.1.fc1.weight"),
}


def make(folder: Path, name: str, dtype: torch.dtype, **sizes: object) -> Path:
    """A random model of a class, with gains that matter."""
    model_type, known, _ = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(AutoConfig.for_model(model_type, **{**known, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            width = parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(0.7 + 0.3 * noise if parameter.dim() == 1 else noise / width)
    model.to(dtype).save_pretrained(folder)
    return folder


def blank(source: Path) -> PreTrainedModel:
    """The model on the meta device."""
    return plan_checkpoint(Checkpoint.open(source)).model


def compared(source: Path, out: Path) -> ReturnedReport:
    report = verify_outputs(source, out)
    assert isinstance(report, ReturnedReport)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_right_ones_pass_and_one_weight_left_unfolded_is_found(tmp_path: Path, name: str) -> None:
    dtype = torch.float32 if name in ("Qwen3Model", "WhisperForConditionalGeneration") else torch.bfloat16
    source, out = make(tmp_path / "source", name, dtype), tmp_path / "out"
    convert(source, out)
    report = compared(source, out)
    assert report.ok, report.criteria
    assert report.model_class == name
    for one in report.returned:
        assert 0 < one.source.mean < (1e-4 if dtype == torch.float32 else 0.1), one
        assert 0 < one.rounding.mean < 2 * one.source.mean, one
    original = load_file(source / "model.safetensors")[KINDS[name][2]]
    tensors = load_file(out / "model.safetensors")
    assert not torch.equal(tensors[KINDS[name][2]], original)
    save_file(tensors | {KINDS[name][2]: original}, out / "model.safetensors", metadata={"format": "pt"})
    assert [criterion.ok for criterion in compared(source, out).criteria] == [False, False]


def test_a_model_that_draws_random_numbers(tmp_path: Path) -> None:
    """In bfloat16 it draws other ones than in float64, so that it is compared in float64 alone."""
    config = AutoConfig.for_model("vit_mae", **IMAGES)
    source, out = tmp_path / "source", tmp_path / "out"
    transformers.ViTMAEModel(config).bfloat16().save_pretrained(source)
    convert(source, out)
    state = torch.get_rng_state()
    report = compared(source, out)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers go on
    assert len(report.criteria) == 1
    assert report.ok
    assert not any(one.judged for one in report.returned)
    assert "does not repeat there: forward: last_hidden_state" in report.unchecked[0]


@pytest.mark.slow
def test_streamed_from_disk_no_number_changes(tmp_path: Path) -> None:
    source, out = make(tmp_path / "source", "T5ForConditionalGeneration", torch.float32), tmp_path / "out"
    convert(source, out)
    whole, streamed = (verify_outputs(source, out, streamed=way) for way in (False, True))
    assert isinstance(streamed, ReturnedReport)
    assert streamed.streamed
    assert streamed.returned == whole.returned


def test_a_converted_model_that_fails_is_no_skipped_one(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "ModernBertForMaskedLM", torch.float32)
    load = source_loader(source, False, transformers.ModernBertForMaskedLM)
    calls = calls_with_numbers(blank(source), torch.arange(24), torch.float32)

    def broken(dtype: torch.dtype, **options: object) -> PreTrainedModel:
        found = load(dtype, **options)
        del found.head
        return found

    with pytest.raises(InputError, match=r"runs? as its source does, .* fails: .*head"):
        compare_returned(
            Runner(), load, broken, calls, torch.float32, model_class="ModernBertForMaskedLM", stage=lambda words: None
        )
    with pytest.raises(NotRunError, match="runs on none of the inputs that are known"):
        compare_returned(
            Runner(), broken, load, calls, torch.float32, model_class="ModernBertForMaskedLM", stage=lambda words: None
        )


def test_inputs_that_are_not_known_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make(tmp_path / "source", "Qwen3Model", torch.float32), tmp_path / "out"
    convert(source, out)
    monkeypatch.setattr(returned, "_outputs", lambda *arguments: {}["unknown"])
    report = verify_outputs(source, out)
    assert isinstance(report, OutputsReport)
    assert report.skipped == "Qwen3Model runs on none of the inputs that are known ('unknown')"


def test_texts_are_pieces_that_end_and_images_are_drawn_again(tmp_path: Path) -> None:
    text = blank(make(tmp_path / "text", "Qwen3Model", torch.float32))
    tokens = torch.arange(4, 84)
    forward, *others = calls_with_numbers(text, tokens, torch.float32)
    assert not others
    pieces = [one["input_ids"] for one in forward.alternatives[0]]
    assert len(pieces) == PIECES
    assert all(piece.shape == (1, 11) and piece[0, -1] == tiny.SIZES["eos_token_id"] for piece in pieces)
    assert torch.equal(torch.cat([piece[0, :-1] for piece in pieces]), tokens)
    images = blank(make(tmp_path / "images", "ViTForImageClassification", torch.float32))
    forward, *_ = calls_with_numbers(images, tokens, torch.bfloat16)
    pixels = [one["pixel_values"] for one in forward.alternatives[0]]
    assert len(pixels) == DRAWS
    assert all(one.dtype == torch.bfloat16 for one in pixels)
    assert not torch.equal(pixels[0], pixels[1])


def test_floating_arguments_take_the_dtype_of_the_run() -> None:
    class Module(torch.nn.Module):
        def forward(self, pixels: Tensor, ids: Tensor) -> tuple[torch.dtype, torch.dtype]:
            return pixels.dtype, ids.dtype

    call = CallWithNumbers("forward", (({"pixels": torch.ones(2), "ids": torch.arange(2)},),), "forward")
    for dtype in (torch.float64, torch.bfloat16):
        assert call.run(Module(), call.alternatives[0][0], dtype) == (dtype, torch.int64)


def test_the_error_of_a_vector_is_relative_to_the_lengths_of_all() -> None:
    reference = torch.zeros(20, 4)
    reference[:, 0] = 2.0
    run = reference.clone()
    run[3, 1] = 0.5
    errors = vector_errors(reference, run)
    assert errors.shape == (20,)
    assert errors[3] == 0.25
    assert errors.sum() == 0.25


def test_few_vectors_are_taken_number_by_number() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    errors = vector_errors(reference, reference + torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(errors, torch.tensor([0.2, 0, 0, 0], dtype=torch.float64))


def test_infinity_must_stay_where_it_is() -> None:
    reference = torch.tensor([[1.0, -torch.inf, torch.nan]])
    assert vector_errors(reference, reference.clone()).tolist() == [0, 0, 0]
    for place, value in ((1, torch.inf), (1, 1.0), (2, 1.0), (0, torch.nan), (0, torch.inf)):
        run = reference.clone()
        run[0, place] = value
        assert vector_errors(reference, run)[place] == torch.inf
    assert vector_errors(reference, reference[:, :2]).tolist() == [torch.inf]
