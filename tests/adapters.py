"""Kinds of adapters, trained for some steps on tiny models in float64, and runs of models with them."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashnorm
import tiny
from flashnorm.compat.transformers import use_experts_for_float64
from flashnorm.verify.float64 import float64_everywhere

QV = ["q_proj", "v_proj"]
Make = Callable[[], Any]

# Kinds that convert exactly: a name -> model, and config.
EXACT_KINDS: dict[str, tuple[str, Make]] = {
    "lora": ("llama", lambda: peft.LoraConfig(target_modules=QV)),
    "all linears": ("llama", lambda: peft.LoraConfig(target_modules="all-linear")),
    "rslora": ("llama", lambda: peft.LoraConfig(target_modules=QV, use_rslora=True, r=4, lora_alpha=7)),
    "patterns": (
        "llama",
        lambda: peft.LoraConfig(
            target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 3}, alpha_pattern={"layers.1.*up_proj": 5}
        ),
    ),
    "one layer": ("llama", lambda: peft.LoraConfig(target_modules=QV, layers_to_transform=[1])),
    "offset gains": ("gemma", lambda: peft.LoraConfig(target_modules="all-linear")),
    "trained biases": ("qwen2", lambda: peft.LoraConfig(target_modules=QV, bias="lora_only")),
    "all biases": ("qwen2", lambda: peft.LoraConfig(target_modules=QV, bias="all")),
    "lora_bias": ("qwen2", lambda: peft.LoraConfig(target_modules=QV, lora_bias=True)),
    # It works from such a token on.
    "alora": (
        "llama",
        lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=QV, alora_invocation_tokens=[int(tiny.ids()[0, 2])]
        ),
    ),
    "eva": ("llama", lambda: peft.LoraConfig(target_modules=QV, init_lora_weights="eva")),
    "orthogonal": ("llama", lambda: peft.LoraConfig(target_modules=QV, init_lora_weights="orthogonal")),
    "head": ("llama", lambda: peft.LoraConfig(target_modules=["lm_head", "q_proj"])),
    "embedding": ("llama", lambda: peft.LoraConfig(target_modules=["embed_tokens", "q_proj"])),
    "tied head": ("tied", lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"])),
    "fused": ("phi3", lambda: peft.LoraConfig(target_modules=["qkv_proj", "gate_up_proj"])),
    "mla": (
        "deepseek_v3",
        lambda: peft.LoraConfig(target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]),
    ),
    "experts": (
        "qwen3_moe",
        lambda: peft.LoraConfig(
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        ),
    ),
    "all layers of experts": ("qwen3_moe", lambda: peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")),
    "transposed experts": (
        "gpt_oss",
        lambda: peft.LoraConfig(
            target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    ),
    "saved layers": (
        "llama",
        lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "mlp", "embed_tokens"]),
    ),
    "trained tokens": ("llama", lambda: peft.LoraConfig(target_modules=QV, trainable_token_indices=[3, 5])),
    "tokens alone": ("tied", lambda: peft.TrainableTokensConfig(token_indices=[3, 5])),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(target_modules=QV, total_step=100)),
    "dora": ("llama", lambda: peft.LoraConfig(target_modules=["q_proj", "down_proj", "up_proj"], use_dora=True)),
    "dora with patterns": (
        "gemma",
        lambda: peft.LoraConfig(
            target_modules=QV, use_dora=True, use_rslora=True, lora_alpha=3, alpha_pattern={"v_proj": 9}
        ),
    ),
    "loha": ("llama", lambda: peft.LoHaConfig(target_modules=QV)),
    "lokr that fits": ("llama", lambda: peft.LoKrConfig(target_modules=QV, decompose_factor=1, r=4)),
    "lokr elsewhere": ("llama", lambda: peft.LoKrConfig(target_modules=["o_proj"])),
    "vera elsewhere": ("llama", lambda: peft.VeraConfig(target_modules=["o_proj"])),
    "ia3": (
        "llama",
        lambda: peft.IA3Config(target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=["up_proj"]),
    ),
    "prompts": ("llama", lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "encoded prompts": ("llama", lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefixes": ("llama", lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    # LayerNorms, whose biases go into those of the layers, or stay.
    "norm biases": ("gpt_neox", lambda: peft.LoraConfig(target_modules=["query_key_value", "dense"])),
    "norm biases, lora_bias": ("opt", lambda: peft.LoraConfig(target_modules=["q_proj", "out_proj"], lora_bias=True)),
    "norm biases, trained biases": (
        "gpt_neox",
        lambda: peft.LoraConfig(target_modules=["query_key_value"], bias="lora_only"),
    ),
    "norm biases, Conv1D": (
        "gpt2",
        lambda: peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="gaussian"),
    ),
    "norm biases, saved layers": (
        "gpt_neox",
        lambda: peft.LoraConfig(target_modules=["dense"], modules_to_save=["query_key_value"]),
    ),
    # With a vision tower, whose norms have biases.
    "images as well": ("gemma3", lambda: peft.LoraConfig(target_modules="all-linear")),
    "images as well, dora": (
        "gemma3",
        lambda: peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|up_proj|down_proj)", use_dora=True),
    ),
    "norm biases that stay": ("cohere_like", lambda: peft.LoraConfig(target_modules=["lm_head", "q_proj"])),
}

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "deepseek_v3": {
        **tiny.EXPERTS,
        "n_routed_experts": 4,
        "first_k_dense_replace": 2,  # its router computes in float32
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "qwen3_moe": tiny.EXPERTS,
    "gpt_oss": {**tiny.EXPERTS, "layer_types": ["full_attention", "full_attention"]},
    "gemma3": {
        "text_config": {**tiny.SIZES, "sliding_window": 8, "query_pre_attn_scalar": 16},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 120,
        "boi_token_index": 121,
        "eoi_token_index": 122,
    },
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 32},
}
TYPES = {"tied": "llama", "cohere_like": "gpt_neox"}


# What is refused -> its model, its config, and words of the reason.
REFUSED: dict[str, tuple[str, Make, str]] = {
    "saved norm": (
        "llama",
        lambda: peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["input_layernorm"]),
        "trained parameter of a norm that folds.*--keep 'model.layers.0.input_layernorm.weight'",
    ),
    "trained norms": ("llama", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), "a norm that folds"),
    "vera": ("llama", lambda: peft.VeraConfig(target_modules=["q_proj"]), "share their factors"),
    "lokr": ("llama", lambda: peft.LoKrConfig(target_modules=["q_proj"]), "Kronecker product"),
    "oft": ("llama", lambda: peft.OFTConfig(target_modules=["q_proj"]), "OFT: it rotates the inputs"),
    "pissa": (
        "llama",
        lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
        "changes the source's weights when the adapter is loaded.*path_initial_model_for_weight_conversion",
    ),
    "replicated layers": (
        "llama",
        lambda: peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]),
        "layer_replication makes another model",
    ),
    "dora after a norm's bias": (
        "gpt_neox",
        lambda: peft.LoraConfig(target_modules=["query_key_value"], use_dora=True),
        "cannot add a constant",
    ),
    "inputs after a norm's bias": (
        "gpt_neox",
        lambda: peft.IA3Config(target_modules=["query_key_value"], feedforward_modules=["query_key_value"]),
        "scales the inputs",
    ),
    "norm's bias trained": (
        "gpt_neox",
        lambda: peft.LoraConfig(target_modules=["query_key_value"], bias="all"),
        "trained parameter of a norm that folds",
    ),
}


# Row of the table in docs/adapters.md -> which of these show it.
ROWS: dict[str, list[str]] = {
    "LoRA, rsLoRA, LoRA-FA, rank and alpha patterns, aLoRA": [
        *("lora", "all linears", "rslora", "patterns", "one layer", "offset gains", "alora", "fused", "mla"),
        *("norm biases", "norm biases, Conv1D", "norm biases that stay", "images as well", "replicated layers"),
    ],
    "LoRA of experts and other parameters (`target_parameters`)": [
        "experts",
        "all layers of experts",
        "transposed experts",
    ],
    "LoRA of an embedding": ["embedding"],
    "LoRA of the output head": ["head", "tied head"],
    "LoRA initialised by EVA, MiCA, or orthogonally": ["eva", "orthogonal"],
    "LoRA initialised by PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ": ["pissa"],
    "trained biases (`bias`), `lora_bias`": [
        *("trained biases", "all biases", "lora_bias", "norm biases, lora_bias", "norm biases, trained biases"),
        "norm's bias trained",
    ],
    "`modules_to_save`: layers, head, embedding": ["saved layers", "norm biases, saved layers"],
    "`modules_to_save`: a norm that has folded; LN tuning": ["saved norm", "trained norms"],
    "trainable tokens": ["trained tokens", "tokens alone"],
    "DoRA": ["dora", "dora with patterns", "images as well, dora", "dora after a norm's bias"],
    "AdaLoRA": ["adalora"],
    "LoHa": ["loha"],
    "LoKr": ["lokr that fits", "lokr elsewhere", "lokr"],
    "IA3": ["ia3", "inputs after a norm's bias"],
    "VeRA": ["vera elsewhere", "vera"],
    "prompt tuning, p-tuning, prefix tuning": ["prompts", "encoded prompts", "prefixes"],
    "X-LoRA, OFT, adaption prompts, all others, and options of LoRA that are not named here": ["oft"],
}


def model(kind: str) -> PreTrainedModel:
    """The model of a name in `MODELS`, in float64."""
    return tiny.model(tiny.config(TYPES.get(kind, kind), **MODELS.get(kind, {})), torch.float64)


def source(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    use_experts_for_float64(model)
    return model


def folded(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = flashnorm.load(folder, dtype=dtype)
    use_experts_for_float64(model)
    return model


def train(model: PreTrainedModel, config: Any, folder: Path, steps: int = 4, **saving: Any) -> Any:
    """Train an adapter for some steps and save it. Returns the model with it."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "lokr_w1" in name or "hada_w2_a" in name):
                parameter.add_(0.05 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=0.03)
    adapted.train()
    with _exactly(model):
        for _ in range(steps):
            loss = adapted(input_ids=tiny.ids(), labels=tiny.ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    adapted.eval().save_pretrained(folder, **saving)
    return adapted


def _exactly(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Within the block, a float64 model computes all of it in float64."""
    return float64_everywhere() if model.dtype == torch.float64 else contextlib.nullcontext()


def with_adapter(model: PreTrainedModel, folder: Path, **loading: Any) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, **loading).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), _exactly(model):
        return model(input_ids=tiny.ids()).logits


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference of logits, over the tokens that both have (prompts come before the others)."""
    one, other = (logits[:, -min(one.shape[1], other.shape[1]) :] for logits in (one, other))
    return float((one.double() - other.double()).norm() / other.double().norm())
