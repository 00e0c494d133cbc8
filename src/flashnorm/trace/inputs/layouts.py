"""The shapes of a model's inputs: the name of a parameter alone does not tell them.

* A layout is a set of tensors that go together (an image for each sequence, the patches of all images, ...). A call has
  all layouts that fit its signature as alternatives, the most specific first.
* Sizes come from the config. Tensors that decide about shapes (grids, masks, lengths) have real numbers, on the CPU;
  token ids and everything that the model computes with are on the meta device.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from flashnorm.trace.inputs.sizes import Sizes

Arguments = dict[str, Any]

# Two sequences of seven tokens: sizes that no model dimension is likely to share.
_BATCH, _TOKENS = 2, 7
# Sizes that the config may leave out: rows and columns of merged patches, images of a sequence, frames of a video, mel
# frames, audio samples (a multiple of the usual hops), regions of an image.
_GRID, _CROPS, _FRAMES, _MEL_FRAMES, _SAMPLES, _REGIONS = (2, 4), 10, 4, 400, 9600, 5

_META = torch.device("meta")


@dataclass(frozen=True)
class Layout:
    """Tensors that go together, by parameter name.

    Attributes:
        tensors: a method gets those for which it has a parameter.
        spare: tensors for optional parameters: a method gets them if it requires them, or if it fails without them.
        marks: a method must have one of these parameters to get this layout; empty means one of `tensors`.
    """

    tensors: Arguments
    spare: Arguments = field(default_factory=dict)
    marks: tuple[str, ...] = ()


def layouts_of(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, list[Layout]]:
    """Kind of input -> the layouts in which models take it; pixels and audio have the given dtype."""

    def converted(layout: Layout) -> Layout:
        tensors = {
            name: tensor.to(dtype) if tensor.dtype.is_floating_point else tensor
            for name, tensor in layout.tensors.items()
        }
        return replace(layout, tensors=tensors)

    makers = {"text": _texts, "image": _images, "video": _videos, "audio": _audios, "series": _series}
    return {kind: [converted(layout) for layout in maker(config)] for kind, maker in makers.items()}


def _meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device=_META)


def _ones(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="cpu")


def _each(*numbers: int) -> Tensor:
    """The same numbers for every element of the batch."""
    return torch.tensor([numbers] * _BATCH, device="cpu")


def _texts(config: PretrainedConfig) -> list[Layout]:
    ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.long, device=_META)
    mask = torch.ones_like(ids)
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    spare = {"attention_mask": mask, "qformer_input_ids": ids, "qformer_attention_mask": mask}
    spare["bbox"] = torch.zeros(_BATCH, _TOKENS, 4, dtype=torch.long, device=_META)
    texts = [Layout({"input_ids": ids, **decoder}, spare)]
    if getattr(config, "pad_token_id", None) is None:  # classifiers refuse several texts then
        texts.append(Layout({name: value[:1] for name, value in texts[0].tensors.items()}))
    if codes := getattr(config, "num_codebooks", None) or Sizes(config, ("decoder",)).number("num_codebooks", 0):
        several = torch.zeros(_BATCH, _TOKENS, codes + 1, dtype=torch.long, device=_META)
        texts.append(Layout({"input_ids": several}))
    if channels := getattr(getattr(config, "decoder_config", None), "num_channels", 0):  # of audio tokens
        texts.append(Layout({"input_ids": ids, "decoder_input_ids": ids[..., None].expand(-1, -1, channels)}))
    sizes = Sizes(config, ("qformer",))
    hidden = sizes.number("hidden_size", 64)
    queries = _meta(_BATCH, sizes.number("num_query_tokens", 8), hidden)
    images = _meta(_BATCH, _TOKENS, sizes.number("encoder_hidden_size", hidden))
    texts.append(Layout({"query_embeds": queries, "encoder_hidden_states": images}, marks=("query_embeds",)))
    # What a model is given in the place of tokens: embeddings, or what the model has computed whose tokens it drafts.
    hidden = Sizes(config, ("text",)).number("hidden_size", 64)
    embeds = _meta(_BATCH, _TOKENS, hidden)
    context = _meta(_BATCH, _TOKENS, hidden * len(getattr(config, "target_layer_ids", None) or [0]))
    seen = {"attention_mask": _ones(_BATCH, 2 * _TOKENS)}
    texts.append(Layout({"noise_embeds": embeds, "context_hidden_states": context, **seen}, marks=("noise_embeds",)))
    texts.append(Layout({"inputs_embeds": embeds}))
    return texts


def _images(config: PretrainedConfig) -> list[Layout]:
    sizes = Sizes(config, ("vision", "image", "visual"))
    channels, patch, merge = sizes.channels, sizes.patch, sizes.merge
    height, width = sizes.image
    rows, columns = (merge * count for count in _GRID)
    count = rows * columns
    grid = {"image_grid_thw": _each(1, rows, columns), "grid_thw": _each(1, rows, columns)}
    merging = {"merge_sizes": _each(merge)[:, 0]}
    spare = {"image_merge_sizes": merging["merge_sizes"]}
    layouts = []
    for pixels in (  # the patches of all images, one after the other
        _meta(_BATCH * count, channels * sizes.patch_frames * patch * patch),
        _meta(_BATCH * count, channels * patch * patch),
        _meta(_BATCH * count, channels, patch, patch),
        _meta(_BATCH * count, merge * patch, merge * patch, channels),  # merged patches
    ):
        layouts.append(Layout({"pixel_values": pixels, "hidden_states": pixels, **grid, **merging}, spare, tuple(grid)))
    # The patches of all images in one row; the patches of each image, with their places.
    strip = _meta(1, channels, patch, _BATCH * count * patch)
    layouts.append(Layout({"pixel_values": strip, "target_sizes": _each(rows, columns)}, marks=("target_sizes",)))
    flat = _meta(_BATCH, count, channels * patch * patch)
    places = torch.cartesian_prod(torch.arange(columns), torch.arange(rows)).expand(_BATCH, count, 2)
    masks = {"pixel_attention_mask": _ones(_BATCH, count), "spatial_shapes": _each(rows, columns)}
    layouts.append(Layout({"pixel_values": flat, **masks}, marks=("spatial_shapes",)))
    positions = {"image_position_ids": places, "pixel_position_ids": places}
    layouts.append(Layout({"pixel_values": flat, **positions}, marks=tuple(positions)))
    # The images of one sequence, each in tiles.
    tiles = sizes.number("max_num_tiles", 4)
    ratios = {"aspect_ratio_ids": _ones(_BATCH, 1), "aspect_ratio_mask": _ones(_BATCH, 1, tiles)}
    layouts.append(
        Layout({"pixel_values": _meta(_BATCH, 1, tiles, channels, height, width), **ratios}, marks=tuple(ratios))
    )
    # Several images, with a mask of which tokens attend to which image.
    several = _meta(_BATCH, _FRAMES, channels, height, width)
    attended = {"image_attention_mask": _ones(_BATCH, _TOKENS, _FRAMES)}
    layouts.append(Layout({"pixel_values": several, **attended}, marks=tuple(attended)))
    # One image, whose embeddings take the place of some tokens.
    one = _meta(_BATCH, channels, height, width)
    inserted = sizes.number("latent_query_num", 4)
    places = {"image_embeds_position_mask": _each(0, *[1] * inserted, 0)}
    ids = {"input_ids": torch.zeros(_BATCH, inserted + 2, dtype=torch.long, device=_META)}
    layouts.append(Layout({"pixel_values": one, **ids, **places}, marks=tuple(places)))
    regions = {
        "visual_feats": _meta(_BATCH, _REGIONS, sizes.number("visual_feat_dim", 2048)),
        "visual_pos": _meta(_BATCH, _REGIONS, sizes.number("visual_pos_dim", 4)),
    }
    layouts.append(Layout(regions))
    half = _meta(_BATCH, channels, height // 2, width)  # the model puts it and its prompt one above the other
    prompts = {"prompt_pixel_values": half, "prompt_masks": half}
    layouts.append(Layout({"pixel_values": half, **prompts}, marks=tuple(prompts)))
    # An image for each sequence; several for each; pairs.
    shape = {"image_sizes": _each(height, width), "target_sizes": _each(height // patch, width // patch)}
    tasks = torch.zeros(_BATCH, sizes.number("task_seq_len", _TOKENS), dtype=torch.long, device=_META)
    besides = {"task_inputs": tasks, "state": _meta(_BATCH, sizes.number("max_state_dim", 32))}
    layouts.append(Layout({"pixel_values": one}, shape | besides))
    there = {"pixel_attention_mask": _ones(_BATCH, _FRAMES, dtype=torch.bool)}
    layouts.append(Layout({"pixel_values": several, **there}, besides, marks=("state", "action_embeds")))
    mask = {"pixel_attention_mask": _ones(_BATCH, _CROPS, height, width, dtype=torch.bool)}
    layouts.append(Layout({"pixel_values": _meta(_BATCH, _CROPS, channels, height, width)}, shape | mask))
    frames = sizes.number("num_frames", _FRAMES)
    layouts.append(Layout({"pixel_values": _meta(_BATCH, frames, channels, height, width)}))
    layouts.append(Layout({"pixel_values": _meta(_BATCH, 2, channels, height, width)}))
    # One row for each patch: its two coordinates, then its pixels.
    layouts.append(Layout({"flattened_patches": _meta(_BATCH, count, 2 + channels * patch * patch)}))
    return layouts


def _videos(config: PretrainedConfig) -> list[Layout]:
    sizes = Sizes(config, ("video", "vision", "image", "visual"))
    channels, patch, merge = sizes.channels, sizes.patch, sizes.merge
    height, width = sizes.image
    rows, columns = (merge * count for count in _GRID)
    grid = {"video_grid_thw": _each(2, rows, columns)}
    spare = {"video_merge_sizes": _each(merge)[:, 0]}
    layouts = []
    count = _BATCH * 2 * rows * columns
    for pixels in (
        _meta(count, channels * sizes.patch_frames * patch * patch),
        _meta(count, channels * patch * patch),
        _meta(count, channels, patch, patch),
    ):
        layouts.append(Layout({"pixel_values_videos": pixels, **grid}, spare, tuple(grid)))
    strip = _meta(1, channels, patch, count * patch)
    framed = _each(rows, columns, rows, columns).view(-1, 2)
    layouts.append(
        Layout({"pixel_values_videos": strip, "target_sizes_videos": framed}, marks=("target_sizes_videos",))
    )
    frames = sizes.number("num_frames frames_per_clip", _FRAMES)
    places = torch.cartesian_prod(torch.arange(columns), torch.arange(rows)).expand(_BATCH, frames, -1, 2)
    flat = _meta(_BATCH, frames, rows * columns, channels * patch * patch)
    layouts.append(Layout({"pixel_values_videos": flat, "video_position_ids": places}, marks=("video_position_ids",)))
    plain = _meta(_BATCH, frames, channels, height, width)
    layouts.append(Layout({"pixel_values_videos": plain}, {"image_sizes": _each(height, width)}))
    return layouts


def _audios(config: PretrainedConfig) -> list[Layout]:
    sizes = Sizes(config, ("audio", "speech", "encoder"))
    mels = sizes.number(
        "num_mel_bins input_feat_per_channel feature_size n_mels mel_bins input_feat_size feature_projection_input_dim "
        "num_mels",
        sizes.pair("subsampling_conv_channels", 80)[0],  # some code takes as many
    )
    mels *= sizes.number("num_stacked_frames", 1)
    frames = 2 * sizes.number("max_source_positions", 0) or _MEL_FRAMES
    names = ("input_features_mask", "feature_attention_mask", "padding_mask", "attention_mask")
    masks = {name: _ones(_BATCH, frames, dtype=torch.bool) for name in names}
    lengths = {"audio_feature_lengths": _each(frames)[:, 0]}
    lengths["chunk_sample_lengths"] = lengths["audio_feature_lengths"] * sizes.number("hop_length", 160)
    by_channel, by_frame = _meta(_BATCH, mels, frames), _meta(_BATCH, frames, mels)
    layouts = [Layout({"input_features": features}, masks | lengths) for features in (by_channel, by_frame)]
    layouts.append(Layout({"input_features": _meta(_BATCH, frames // 4, 4 * mels)}))  # four frames each
    layouts.append(Layout({"audio_mel": by_frame, "audio_mel_mask": ~masks["padding_mask"]}))
    samples = {name: _ones(_BATCH, _SAMPLES, dtype=torch.bool) for name in names}
    layouts.append(Layout({"input_values": _meta(_BATCH, _SAMPLES)}, samples))
    layouts.append(Layout({"input_values": _meta(_BATCH, 1, _SAMPLES)}, samples))
    layouts.append(Layout({"input_values": _meta(_BATCH, sizes.number("max_length", frames), mels)}))
    layouts.append(Layout({"input_features": _meta(_BATCH, 1, frames, mels)}))
    # Both the recording and its features; a codec has one frame of features for each code.
    coded = _meta(_BATCH, _SAMPLES // sizes.number("encoder_hop_length hop_length", 320), mels)
    for features in (by_frame, coded):
        layouts.append(Layout({"input_values": _meta(_BATCH, 1, _SAMPLES), "input_features": features}))
    # Features that are added to the embeddings of tokens.
    added = _meta(_BATCH, mels, 2 * sizes.number("downsample_factor", 4) * _TOKENS)
    layouts.append(Layout({"input_features": added}, marks=("encoder_inputs_embeds",)))
    # A piece of a stream: the convolutions keep their padding in a cache.
    for streamed in (_meta(_BATCH, 1, _SAMPLES), _meta(_BATCH, sizes.number("hidden_size", 64), _TOKENS)):
        layouts.append(Layout({"hidden_states": streamed}, marks=("padding_cache",)))
    hidden = sizes.number("hidden_size", 64)
    for latents in (_meta(_BATCH, hidden, _TOKENS), _meta(_BATCH, _TOKENS, hidden)):
        layouts.append(Layout({"latents": latents}))
    return layouts


def _series(config: PretrainedConfig) -> list[Layout]:
    """Time series to be forecast, and what an agent has seen, done and gained."""
    sizes = Sizes(config, ())
    length = sizes.number("context_length", 32)
    future = sizes.number("prediction_length", 4)
    past = length + max(getattr(config, "lags_sequence", None) or [0])
    known = sum(getattr(config, name, 0) for name in ("num_time_features", "num_dynamic_real_features"))
    features = {"past_time_features": _meta(_BATCH, past, known), "future_time_features": _meta(_BATCH, future, known)}
    layouts = []
    for channels in ((), (sizes.number("num_input_channels input_size", 1),)):
        values = {"past_values": _meta(_BATCH, past, *channels), "future_values": _meta(_BATCH, future, *channels)}
        observed = {"past_observed_mask": _ones(_BATCH, past, *channels)}
        padding = {"past_values_padding": 1 - _ones(_BATCH, past), "freq": _ones(_BATCH, 1)}
        layouts.append(Layout(values | observed | features, padding))
    states, actions = sizes.number("state_dim", 17), sizes.number("act_dim", 4)
    layouts.append(
        Layout(
            {
                "states": _meta(_BATCH, _TOKENS, states),
                "actions": _meta(_BATCH, _TOKENS, actions),
                "rewards": _meta(_BATCH, _TOKENS, 1),
                "returns_to_go": _meta(_BATCH, _TOKENS, 1),
                "timesteps": torch.zeros(_BATCH, _TOKENS, dtype=torch.long, device=_META),
            },
            marks=("states",),
        )
    )
    return layouts
