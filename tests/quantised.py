"""Tiny checkpoints with some weights quantised, in the forms in which models are published.

The layouts are those that the quantisers of Transformers read. Packed integers of GPTQ and compressed-tensors are
random: no test unpacks them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny

BLOCK = 32
CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

Tensors = dict[str, Tensor]


def gpt_oss(folder: Path) -> Path:
    """GPT-OSS as it is published: its experts in MXFP4, everything else in bfloat16."""
    config = tiny.config("gpt_oss", **tiny.EXPERTS, intermediate_size=64, layer_types=["full_attention"] * 2)
    tiny.save(folder, tiny.model(config, torch.bfloat16))
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}

    def quantise(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensors.pop(name))

    return changed(folder, quantise, declared)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of `[experts, in, out]`: two codes a byte, `[experts, out, in / 32, 16]`, and exponents without the last axis."""
    experts, inputs, outputs = weight.shape
    blocks = weight.float().transpose(1, 2).reshape(experts, outputs, inputs // BLOCK, BLOCK)
    exponent = blocks.abs().amax(-1).clamp(min=1e-9).log2().floor() - 2
    codes = (blocks / exponent.exp2()[..., None])[..., None].sub(CODES).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def fp8(folder: Path, but: tuple[str, ...] = ("lm_head",), model_type: str = "llama", **overrides: Any) -> Path:
    """A model with its linear layers in blocks of float8, but those whose names contain one of `but`."""
    tiny.save(folder, tiny.model(tiny.config(model_type, **overrides), torch.bfloat16))
    declared = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": list(but)}

    def quantise(tensors: Tensors) -> None:
        for name in linears(tensors, but):
            rows, columns = tensors[name].shape
            blocks = tensors[name].float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
            tensors[f"{name}_scale_inv"] = scale

    return changed(folder, quantise, declared)


def fp8_experts(folder: Path) -> Path:
    """Qwen3-MoE, which stores each expert by itself, with its experts in float8."""
    return fp8(folder, ("lm_head", "self_attn"), "qwen3_moe", **tiny.EXPERTS)


def gptq(folder: Path) -> Path:
    """Llama by GPTQ's names: the output head and the embedding are plain."""
    tiny.save(folder, tiny.model(tiny.config("llama"), torch.float16))

    def quantise(tensors: Tensors) -> None:
        for name in linears(tensors, ("lm_head",)):
            rows, columns = tensors.pop(name).shape
            module = name.removesuffix("weight")
            tensors[f"{module}qweight"] = torch.randint(1 << 30, (columns // 8, rows), dtype=torch.int32)
            tensors[f"{module}qzeros"] = torch.randint(1 << 30, (columns // BLOCK, rows // 8), dtype=torch.int32)
            tensors[f"{module}scales"] = torch.rand(columns // BLOCK, rows).half()
            tensors[f"{module}g_idx"] = torch.arange(columns, dtype=torch.int32) // BLOCK

    return changed(folder, quantise, {"quant_method": "gptq", "bits": 4, "group_size": BLOCK})


def compressed_tensors(folder: Path) -> Path:
    """Llama by the names of compressed-tensors: the output head and the first layer's attention are plain."""
    tiny.save(folder, tiny.model(tiny.config("llama"), torch.bfloat16))
    ignored = ("lm_head", "layers.0.self_attn")

    def quantise(tensors: Tensors) -> None:
        for name in linears(tensors, ignored):
            rows, columns = tensors.pop(name).shape
            tensors[f"{name}_packed"] = torch.randint(1 << 30, (rows, columns // 8), dtype=torch.int32)
            tensors[f"{name}_scale"] = torch.rand(rows, columns // BLOCK).bfloat16()
            tensors[f"{name}_shape"] = torch.tensor([rows, columns])

    declared = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": list(ignored)}
    return changed(folder, quantise, declared)


def linears(tensors: Tensors, but: tuple[str, ...]) -> list[str]:
    """The weights of linear layers, but those whose names contain one of `but`."""
    return [name for name in tensors if name.endswith(("proj.weight", "lm_head.weight")) and not named(name, but)]


def named(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a name contains one of these parts."""
    return any(part in name for part in parts)


def changed(folder: Path, change: Callable[[Tensors], None], declared: dict[str, Any]) -> Path:
    """Change a checkpoint's tensors in place, and declare a quantisation in its config."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    return folder
