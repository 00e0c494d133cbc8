"""A Hugging Face folder -> a GGUF file, for the Llama and Qwen architectures, as llama.cpp's own converter lays it out.

There is no tokenizer in it, as the benchmark passes token ids.
"""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import deserialize

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
STORED = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection (heads * d, hidden), in the order of llama.cpp's Llama.

    Transformers rotates rows i and i + d/2 together, llama.cpp rows 2i and 2i + 1.
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def convert(folder: Path, dtype: str, file: Path) -> Path:
    """Write all matrices in one dtype, and vectors in float32, which is what llama.cpp wants.

    Raises:
        ValueError: the architecture, its rotary embedding, or a tensor is none of those above.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"{config['model_type']}: the GGUF writer knows {', '.join(ARCHITECTURES)}")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']}: the GGUF writer knows only the default")
    architecture, layers = ARCHITECTURES[config["model_type"]], config["num_hidden_layers"]
    query_heads = config["num_attention_heads"]
    heads = {"q": query_heads, "k": config.get("num_key_value_heads") or query_heads}
    head_size = config.get("head_dim") or config["hidden_size"] // query_heads

    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(query_heads)
    writer.add_head_count_kv(heads["k"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    names = gguf.get_tensor_name_map(architecture, layers)
    for shard in sorted(folder.glob("*.safetensors")):
        for name, stored in deserialize(shard.read_bytes()):
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ValueError(f"{shard.name}: {name} has no place in the GGUF architecture {config['model_type']}")
            tensor = gguf.quants.dequantize(
                np.frombuffer(stored["data"], np.uint8).reshape(*stored["shape"][:-1], -1), STORED[stored["dtype"]]
            )
            projection = re.search(r"\.([qk])_proj\.", name)
            if architecture is gguf.MODEL_ARCH.LLAMA and projection:
                tensor = interleaved(tensor, heads[projection[1]])
            kind = TYPES[dtype] if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(target, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
