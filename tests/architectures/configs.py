"""A tiny config of every model type that transformers knows: one table of sizes, one of what single types need besides.

* A size is set wherever the type's config has a field of that name, in nested configs as well.
* Of the layers that a type has by default, the first of each kind stay: (sliding, dense), (full, sparse), ...
* Windows, chunks and indexers are smaller than the test's sequences, so that they leave something out.
* Widths that are in no table can be divided by a number: those that were equal stay equal.
"""

import re
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, INNER, EXPERT_INNER, VOCABULARY, POSITIONS = 64, 96, 32, 128, 48
HEAD_SIZE, ROTATED, QUERY_RANK, HEADS, LAYERS = 16, 8, 24, 4, 2

# Size -> the fields that take it.
FIELDS: dict[int, str] = {
    HIDDEN: "hidden_size n_embd d_model emb_dim hidden_size_global out_hidden_size downsample_hidden_size "
    "adapter_in_dim adapter_out_dim adapter_input_size output_channels vision_output_dim projector_input_dim "
    "projector_output_dim ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels projector_hidden_size "
    "text_hidden_size audio_hidden_size vit_hidden_size condition_dim dim hidden_dim d_latents upsample_groups",
    INNER: "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff "
    "feed_forward_size dense_intermediate_size intermediate_size_mlp mlp_dim alignment_intermediate_size "
    "speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim",
    EXPERT_INNER: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size embedding_size "
    "intra_bottleneck_size entity_emb_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size entity_vocab_size "
    "src_vocab_size tgt_vocab_size",
    POSITIONS: "max_position_embeddings n_positions max_seq_len rel_extent num_position_embeddings image_size",
    HEAD_SIZE: "head_dim v_head_dim kv_lora_rank o_lora_rank linear_key_head_dim linear_value_head_dim linear_head_dim "
    "index_head_dim swa_head_dim dim_head d_head attention_head_size mamba_head_dim mamba_d_head patch_size",
    ROTATED: "qk_rope_head_dim qk_nope_head_dim state_size time_step_rank rotary_dim ssm_state_size mamba_d_state "
    "mamba_n_heads mamba_num_heads hidden_size_per_layer_input laurel_rank",
    HEADS: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads index_n_heads "
    "linear_num_heads linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "zero_expert_num sliding_window sliding_window_size window_size attention_window_size attention_chunk_size "
    "local_attention_window_len index_topk chunk_size mamba_chunk_size attention_window context_size n_filters "
    "num_filters num_queries two_stage_num_proposals latent_query_num "
    "speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads",
    LAYERS: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers depth num_blocks num_key_value_heads swa_num_key_value_heads linear_num_key_heads n_groups "
    "o_groups expand num_experts_per_tok num_experts_per_token moe_topk moe_k top_k pad_token_id layers index_kpool "
    "num_self_attends_per_block speech_encoder_layers t2u_encoder_layers t2u_decoder_layers",
    QUERY_RANK: "q_lora_rank hc_lowrank",
    1: "n_group topk_group num_expert_group eos_token_id first_k_dense_replace num_dense_layers",
    0: "bos_token_id",
}
SIZES: dict[str, Any] = {field: size for size, fields in FIELDS.items() for field in fields.split()}
SIZES |= {"mlp_only_layers": [0], "per_layer_config": {}}
# Lists of sizes, one for each stage, which keep their lengths.
STAGES = {"depths": 1, "conv_dim": 32, "moe_intermediate_size": 32, "num_block_repeats": 1, "blocks_per_stage": 1}
# Fields that are widths, or numbers of entries, and may be divided; a list has one for each stage.
_WIDTH = re.compile(
    r"(\w+_)?(channels?|channel_size|channel_list|dims?|embed_dim_per_stage|hidden_sizes?|units|num_embeddings|queries"
    r"|codebook_size|vocab_size|tdnn_dim|embeddings?_dim|\w*intermediate_size|mlp_hidden_size)"
)
_NARROWEST = 8
# Fields that are set even where the type's default is nothing: None, 0 or an empty list.
ALWAYS = (
    *("num_key_value_heads", "head_dim", "q_lora_rank", "mlp_only_layers", "first_k_dense_replace"),
    *("num_experts_per_tok", "n_routed_experts", "pad_token_id"),
)
# With multi-head latent attention, heads are not grouped, and head_dim is that of the rotated part.
LATENT = {"num_key_value_heads": HEADS, "head_dim": ROTATED}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "no_rope_layers")

_SLIDING, _FULL, _LINEAR, _INDEXED = "sliding_attention", "full_attention", "linear_attention", "indexed_attention"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}

# Types that are not examined.
LEFT_OUT = {
    "encodec": "an LSTM, whose steps are traced one by one, takes minutes; it has no norms by default",
    "gemma3n": "its proof takes more than a quarter of an hour",
    "vibevoice": "its proof takes more than 10 GB",
}
# Types whose own config holds more than the language model -> the type of that part.
PARTS = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}
# Type, also of a nested config -> fields that the rules above do not know or get wrong. Lists of layers come together.
BESIDES: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 80},  # the channels of its last block
    "align_vision_model": _EFFICIENTNET,
    "apertus1p5": {  # its codes are tokens
        "image_token_offset": 64,
        "vision_config": {"codebook_size": 16},
        "audio_token_offset": 80,
        "audio_config": {"codebook_size": 16},
    },
    "autoformer": {"prediction_length": 4, "label_length": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "use_cache": False},  # its cache wants a num_hidden_layers
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "clap_audio_model": {"patch_embeds_hidden_size": 24, "hidden_size": 192},
    "clvp_encoder": {"projection_dim": HIDDEN, "num_attention_heads": 2},  # 32 dimensions of each are rotated
    "cohere2_moe": {"layer_types": [_SLIDING, _FULL], "mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {"layer_types": [_SLIDING, _FULL], "rope_parameters": {_SLIDING: _ROPE, _FULL: None}},
    "convnext": {"hidden_sizes": [16] * 4},
    "convnextv2": {"hidden_sizes": [16] * 4},
    "cosmos3_edge_text": {"rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [HIDDEN // 2, HIDDEN]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dia_decoder": {
        "cross_hidden_size": HIDDEN,
        "cross_num_attention_heads": 4,
        "cross_num_key_value_heads": 2,
        "cross_head_dim": 16,
    },
    "diffusion_gemma_text": {
        "layer_types": [_SLIDING, _FULL],
        "per_layer_config": {1: {"head_dim": 32}},
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "dinov3_convnext": {"hidden_sizes": [16] * 4},
    "donut-swin": {"embed_dim": 24, "window_size": 2},
    "dory": {  # its own dictionary has two blocks a layer
        "layer_types": [_SLIDING, _FULL, _SLIDING],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {"layer_types": [_FULL, _SLIDING], "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"conv_output_size": 16 * HIDDEN},  # of 128 channels, halved three times
    "dots3_note_text": {"per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}}},
    "dots3_note_vision_encoder": {"per_layer_config": {1: {"num_local_experts": 2}}},
    "edgetam_vision_model": {
        "backbone_config": {"architecture": "test_efficientnet"},
        "backbone_channel_list": [48, 32, 24, 16],
    },
    "efficientloftr": {
        "out_features": [16, 16, 32, HIDDEN],
        "stage_num_blocks": [1] * 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "efficientnet": _EFFICIENTNET,
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1], "attn_resolutions": [0], "codebook_size": 64},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": HEADS},
    "exaone4_5_vision": {"window_size": 64},
    "falcon_h1": {"mamba_d_ssm": 128},
    "fast_vlm": {"vision_config": {"architecture": "test_convnext", "model_args": None}},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 80},
    "focalnet": {"embed_dim": 16},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HEAD_SIZE}},
    "fun_asr_nano_encoder": {"max_position_embeddings": 512},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        "layer_types": [_SLIDING, _FULL] * 2,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma3n_vision": {"architecture": "test_convnext"},
    "gemma3n": {"vision_soft_tokens_per_image": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2}},
    "gemma4": {
        "text_config": {
            "layer_types": [_SLIDING, _FULL] * 2,
            "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
            "num_kv_shared_layers": 2,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    },
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 32}}},
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 40,
        "text_config": {
            "layer_types": [_SLIDING, _FULL] * 2,
            "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
            "num_kv_shared_layers": 2,
        },
    },
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 32}}},
    "glmasr_encoder": {"intermediate_size": 4 * HIDDEN},  # four frames are merged
    "glm_moe_dsa": {
        "layer_types": [_INDEXED] * 2,
        "mlp_layer_types": ["dense", "sparse"],
        "indexer_types": ["full", "shared"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_docling_vision": {"deepstack_visual_indexes": [0, 1]},
    "granite_speech5_encoder": {"num_key_value_heads": HEADS},
    "granitemoe_swa": {"shared_intermediate_size": 32},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL]},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1] * 2,
    },
    "hifigan": {"model_in_dim": 80},
    "hiera": {"embed_dim": 24},
    "hy_v4_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
    "idefics_vision": {"embed_dim": HIDDEN},
    "informer": {"prediction_length": 4},
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
        "unpadded_vocab_size": VOCABULARY - 8,
    },
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY - 8},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"], "mlp_layer_types": ["dense", "sparse"]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_offset": 2},
    "kimi_k25": {"projection_hidden_size": HIDDEN},
    "kosmos_2_text_model": {"embed_dim": HIDDEN},
    "kosmos_2_5_text_model": {"embed_dim": HIDDEN},
    "laguna": {"layer_types": [_SLIDING, _FULL], "mlp_layer_types": ["dense", "sparse"]},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "input_size": 64},
    "lfm2": {"layer_types": ["conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv"]},
    "lilt": {"hidden_size": 48},  # it has six coordinates
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1]},
    "mamba2": {"num_heads": 8},
    "lw_detr": {"projector_scale_factors": [1.0], "backbone_config": {"window_block_indices": [0]}},
    "lw_detr_vit": {"num_windows": 4},
    "maskformer-swin": {"embed_dim": 24},
    "mellum": {"layer_types": [_SLIDING, _FULL], "mlp_layer_types": ["dense", "sparse"]},
    "ministral": {"layer_types": [_SLIDING, _FULL]},
    "minimax_m3_vl_text": {"layer_types": [_FULL, "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]},
    "mgp-str": {"num_bpe_labels": VOCABULARY, "num_wordpiece_labels": VOCABULARY},
    "mistral4": {"head_dim": 2 * ROTATED},  # of which half is rotated
    "mistral_large4_text": {"kv_source_layers": None},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    **{name: {"out_hidden_size": 4 * HIDDEN} for name in ("muse_glimmer", "muse_spark")},  # of merged patches
    "muse_spark_audio": {"num_hidden_layers": 4},
    "moonshine_streaming": {"num_key_value_heads": HEADS},  # its own default lacks it
    "musicgen_decoder": {"architectures": ["MusicgenForCausalLM"], "num_codebooks": 2},
    "musicgen_melody_decoder": {"architectures": ["MusicgenMelodyForCausalLM"], "num_codebooks": 2},
    **{  # their code gives values as many heads as queries
        name: {"num_key_value_heads": HEADS}
        for name in ("nemotron3_diarization_audio", "nemotron3_5_transcribe_asr_audio")
    },
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": VOCABULARY - 1, "num_key_value_heads": HEADS},
    **{name: {"quantization_dim": 2 * HIDDEN, "num_key_value_heads": HEADS} for name in ("neucodec", "xcodec2")},
    "nemotron_asr_streaming_encoder": {"max_position_embeddings": 64},
    "nemotron3_5_asr_encoder": {"max_position_embeddings": 64},
    "oneformer": {"conv_dim": HIDDEN, "mask_dim": HIDDEN},  # projections between other sizes are in no list of modules
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 64}}},
    "pi0": {"vlm_config": {"projection_dim": HIDDEN}},
    **{name: {"d_kv": HEAD_SIZE} for name in ("pix2struct_text_model", "pix2struct_vision_model")},
    "pp_formulanet_vision": {"post_conv_in_channels": HIDDEN, "decoder_hidden_size": HIDDEN},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "number_of_conv_states": 3,  # with those
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "eos_token_id": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 6],
        "axial_pos_embds_dim": [24, 40],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "sam_vision_model": {"num_pos_feats": 32},
    "sam_hq_vision_model": {"num_pos_feats": 32},
    "sam2_hiera_det_model": {"hidden_size": 24},
    "squeezebert": {"embedding_size": HIDDEN},
    "step3p5": {
        "layer_types": [_FULL, _SLIDING],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 4,
    },
    "swin": {"embed_dim": 24, "window_size": 2},
    "swinv2": {"embed_dim": 24},
    "time_series_transformer": {"prediction_length": 4},
    "unlimited_ocr_text": {"num_key_value_heads": HEADS},  # its eager attention has no groups
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [HIDDEN // 2, HIDDEN]},
    "timm_backbone": {"backbone": "test_resnet"},
    "timm_wrapper": {"architecture": "test_vit"},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "uvdoc_backbone": {"out_indices": [1, 2, 3, 4, 5, 6], "out_features": None},
    "vision-text-dual-encoder": {"vision_config": {"pooler_output_size": HIDDEN}},
    **{name: {"codebook_dim": HIDDEN} for name in ("wavtokenizer", "wavtokenizer_encoder")},
    "xcodec": {"codebook_dim": 2 * HIDDEN},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": [_LINEAR, "hybrid"] * 2},  # the hybrid layers share their weights
    "zamba2": {"layers_block_type": [_LINEAR, "hybrid"] * 2},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 4, "num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The type's own default config, made small. Raises whatever the type's config class raises."""
    config_class = CONFIG_MAPPING[PARTS.get(model_type, model_type)]
    return config_class(**shrunk(config_class().to_dict()))


def shrunk(config: dict[str, Any], divisor: int = 1, besides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The fields to change.

    Args:
        config: all fields with their defaults.
        divisor: of the widths that are in no table.
        besides: what the config around this one wants besides.
    """
    besides = BESIDES.get(config["model_type"], {}) | (besides or {})
    small: dict[str, Any] = {}
    if divisor > 1:
        small |= {field: _narrowed(value, divisor) for field, value in config.items() if _WIDTH.fullmatch(field)}
    small |= {field: SIZES[field] for field, value in config.items() if field in SIZES and (value or field in ALWAYS)}
    if "depths" in config:
        small.pop("patch_size", None)  # each stage merges patches, so that they begin small
    small |= {
        field: [size] * len(config[field])
        for field, size in STAGES.items()
        if isinstance(config.get(field), (list, tuple))
    }
    if "qk_rope_head_dim" in config:
        small |= {field: size for field, size in LATENT.items() if field in config}
    layers = {field: besides[field] for field in PER_LAYER if field in besides}
    if not layers:
        layers = _first_of_each_kind({field: config[field] for field in PER_LAYER if config.get(field)})
    for of_layers in layers.values():
        small |= {field: len(of_layers) for field in LAYER_COUNTS if field in config}
    if stages := config.get("out_indices") and "depths" not in config and small.keys() & {*LAYER_COUNTS}:
        last = max(LAYERS, len(config["out_indices"]))  # each layer is a stage, and those behind it are no longer there
        small |= dict.fromkeys(stages, last)
        small |= {"out_features": None, "out_indices": [*range(last + 1)][-len(config["out_indices"]) :]}
    small |= layers | besides
    nested = {field: value for field, value in config.items() if isinstance(value, dict) and "model_type" in value}
    return small | {field: value | shrunk(value, divisor, besides.get(field, {})) for field, value in nested.items()}


def _narrowed(value: Any, divisor: int) -> Any:
    """A width, or a list of widths, divided. Small numbers stay: they count colours, or groups."""
    if isinstance(value, (list, tuple)):
        return [_narrowed(one, divisor) for one in value]
    narrow = isinstance(value, bool) or not isinstance(value, int) or value < 2 * _NARROWEST
    return value if narrow else max(_NARROWEST, value // divisor)


def _first_of_each_kind(layers: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same lists with one layer for each combination of what they say of a layer, but at least two layers."""
    kinds = list(dict.fromkeys(zip(*layers.values(), strict=True)))
    if len(kinds) == 1:
        kinds *= LAYERS
    return {field: [kind[i] for kind in kinds] for i, field in enumerate(layers)}
