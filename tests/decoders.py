"""Small random decoders of the kinds that the kernels run."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY, PROMPT, TEXT = 200, 130, 140  # longer than a span of attention, and no multiple of anything

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 100,  # no multiple of a block
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# An intermediate size that is no multiple of a block, and fits the grouped kernels of Transformers' own experts.
MIXTURE = {"intermediate_size": 104, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama with tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral with a window": ("Mistral", {"sliding_window": 16}),
    "phi3": ("Phi3", {}),
    "granite": (
        "Granite",
        {
            "residual_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3, every other layer rotated": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3, rotated by the kind of layer": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", MIXTURE | {"num_local_experts": 5}),
    "mixtral, all experts chosen": ("Mixtral", MIXTURE | {"num_local_experts": 2}),
    "mixtral with a window": ("Mixtral", MIXTURE | {"num_local_experts": 4, "sliding_window": 16}),
    "qwen3_moe, one layer dense": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe, one layer dense": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 56,
            "shared_expert_intermediate_size": 72,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
        },
    ),
    "olmoe": ("Olmoe", MIXTURE | {"num_experts": 8, "num_experts_per_tok": 4}),
    "flex_olmo": ("FlexOlmo", MIXTURE | {"num_experts": 5}),
    "olmo3": (
        "Olmo3",
        {"sliding_window": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    kind, besides = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | besides | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.7 + 0.5 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.to(dtype)


def text(length: int = TEXT) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in float64."""
    model = copy.deepcopy(model).double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=text()[None]).logits[0].double()


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def generate(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    ids = options.pop("ids", text(20)[None])
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    found = model.generate(ids, **options)
    return found if isinstance(found, Tensor) else found.sequences


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "a penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "an early end": {"eos_token_id": list(range(3, 60))},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "a dictionary": {"return_dict_in_generate": True, "output_hidden_states": True},
    "a static cache": {"cache_implementation": "static"},
    "four beams of a padded batch": {
        "ids": torch.stack([text(20), torch.cat([torch.zeros(4, dtype=torch.long), text(16)])]),
        "attention_mask": torch.stack([torch.ones(20), (torch.arange(20) >= 4).float()]).long(),
        "num_beams": 4,
    },
    "seven texts": {"ids": torch.arange(3, 143).view(7, 20), "eos_token_id": list(range(3, 60))},
    "two texts, one padded": {
        "ids": torch.stack([text(20), torch.cat([torch.zeros(4, dtype=torch.long), text(16)])]),
        "attention_mask": torch.stack([torch.ones(20), (torch.arange(20) >= 4).float()]).long(),
    },
}
