"""Layouts of inputs: which numbers are there, and which are not."""

import torch
from transformers import PretrainedConfig

from flashnorm.trace.inputs.layouts import layouts_of

CONFIG = PretrainedConfig(patch_size=2, num_channels=3, image_size=8)


def test_what_a_model_computes_with_has_no_values_and_its_dtype() -> None:
    for name in ("pixel_values", "pixel_values_videos", "input_features", "input_values"):
        for layouts in layouts_of(CONFIG, torch.bfloat16).values():
            for layout in layouts:
                if name in layout.tensors:
                    assert layout.tensors[name].is_meta
                    assert layout.tensors[name].dtype == torch.bfloat16


def test_grids_and_lengths_have_values_and_are_integers() -> None:
    images, audios = layouts_of(CONFIG, torch.bfloat16)["image"], layouts_of(CONFIG, torch.bfloat16)["audio"]
    for numbers in (images[0].tensors["image_grid_thw"], audios[0].spare["audio_feature_lengths"]):
        assert numbers.device.type == "cpu"
        assert numbers.dtype == torch.long


def test_a_grid_goes_with_as_many_patches() -> None:
    patches = layouts_of(CONFIG, torch.float32)["image"][0].tensors
    assert patches["image_grid_thw"].prod(-1).sum() == patches["pixel_values"].shape[0]


def test_decoders_get_token_ids_of_their_own() -> None:
    text, *_ = layouts_of(PretrainedConfig(), torch.float32)["text"]
    assert text.tensors.keys() == {"input_ids"}
    text, *_ = layouts_of(PretrainedConfig(is_encoder_decoder=True), torch.float32)["text"]
    assert text.tensors.keys() == {"input_ids", "decoder_input_ids"}


def test_a_strip_of_patches_holds_what_its_sizes_say() -> None:
    images = layouts_of(CONFIG, torch.float32)["image"]
    strip = next(one.tensors for one in images if "target_sizes" in one.marks)
    assert strip["pixel_values"].shape == (1, 3, 2, 2 * strip["target_sizes"].prod(-1).sum())


def test_an_image_and_its_prompt_are_one_above_the_other() -> None:
    images = layouts_of(PretrainedConfig(image_size=[8, 4], patch_size=2), torch.float32)["image"]
    prompted = next(one.tensors for one in images if "prompt_masks" in one.tensors)
    assert {tensor.shape for tensor in prompted.values()} == {(2, 3, 4, 4)}


def test_mel_bins_of_stacked_frames_are_in_one_row() -> None:
    audio, *_ = layouts_of(PretrainedConfig(num_mel_bins=10, num_stacked_frames=7), torch.float32)["audio"]
    assert audio.tensors["input_features"].shape[1] == 70


def test_a_codec_gets_as_many_frames_as_codes() -> None:
    audios = layouts_of(PretrainedConfig(hop_length=960, num_mel_bins=10), torch.float32)["audio"]
    both = [one.tensors for one in audios if {"input_values", "input_features"} <= one.tensors.keys()]
    assert both[-1]["input_features"].shape == (2, both[-1]["input_values"].shape[-1] // 960, 10)
