"""A tiny config of every model type that transformers knows: one table of sizes, one of what single types need besides.

* A size is set wherever the type's config has a field of that name, in nested configs as well.
* Of the layer kinds that a type lists (sliding and full attention, linear attention, ...), each gets a layer.
"""

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, INNER, EXPERT_INNER, VOCABULARY, POSITIONS = 64, 96, 32, 128, 48
HEAD_SIZE, ROTATED, QUERY_RANK, HEADS, LAYERS = 16, 8, 24, 4, 2

# Size -> the fields that take it.
FIELDS: dict[int, str] = {
    HIDDEN: "hidden_size n_embd d_model",
    INNER: "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim",
    EXPERT_INNER: "moe_intermediate_size shared_expert_intermediate_size",
    VOCABULARY: "vocab_size",
    POSITIONS: "max_position_embeddings n_positions",
    HEAD_SIZE: "head_dim v_head_dim kv_lora_rank linear_key_head_dim linear_value_head_dim",
    ROTATED: "qk_rope_head_dim qk_nope_head_dim state_size time_step_rank",
    HEADS: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
    "linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    LAYERS: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_key_value_heads "
    "linear_num_key_heads expand num_experts_per_tok moe_topk moe_k top_k pad_token_id",
    QUERY_RANK: "q_lora_rank",
    1: "n_group topk_group eos_token_id",
    0: "bos_token_id",
}
SIZES = {field: size for size, fields in FIELDS.items() for field in fields.split()}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Fields that are set even where the type's default is None.
_ALWAYS = ("num_key_value_heads", "pad_token_id")

BESIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The type's own default config, made small. Raises whatever the type's config class raises."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**(_shrink(config_class().to_dict()) | BESIDES.get(model_type, {})))


def _shrink(config: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    latent = "qk_rope_head_dim" in config  # MLA: head_dim is that of the rotated part, and heads are not grouped
    for field, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            small[field] = value | _shrink(value)
        elif field in SIZES and (value is not None or field in _ALWAYS) and not (latent and field == "head_dim"):
            small[field] = SIZES[field]
    if latent and "num_key_value_heads" in config:
        small["num_key_value_heads"] = HEADS
    if kinds := list(dict.fromkeys(config.get("layer_types") or ())):
        small["layer_types"] = (kinds * 2)[: max(LAYERS, len(kinds))]
        small |= {field: len(small["layer_types"]) for field in _LAYER_COUNTS if field in config}
    return small
