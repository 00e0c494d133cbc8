"""The compiled kernels, as Python calls them; the structures mirror `api.h`."""

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.runtime.kernels.build import LIBRARY

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
BLOCK = 16  # outputs of a linear whose weights lie next to each other
MOST_HEAD_DIM = 256


class Linear(Structure):
    """Packed weights; see `pack`."""

    _fields_ = (("weights", c_void_p), ("bias", c_void_p), ("inputs", c_int32), ("outputs", c_int32))


class Layer(Structure):
    """One decoder layer."""

    _fields_ = (
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_gain", "mlp_gain", "q_gain", "k_gain", "keys", "values")),
        ("window", c_int32),
        ("rotate", c_int32),
    )


class Model(Structure):
    """All layers and the output head."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("head", Linear),
        ("final_gain", c_void_p),
        *(
            (name, c_int32)
            for name in (
                *("dtype", "layer_count", "hidden", "inner", "heads", "kv_heads", "head_dim", "rotary"),
                *("activation", "capacity"),
            )
        ),
        *((name, c_float) for name in ("eps", "qk_eps", "attention_scale", "residual_scale")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they were not compiled."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    loaded.flashnorm_isa_name.restype = c_char_p
    loaded.flashnorm_decode_memory.restype = c_int64
    loaded.flashnorm_decode_memory.argtypes = (POINTER(Model), c_int32, c_int32, c_int32)
    loaded.flashnorm_decode.restype = None
    loaded.flashnorm_decode.argtypes = (
        *(POINTER(Model), c_void_p, c_int32, c_int32, c_void_p, c_void_p),
        *(c_void_p, c_int32, c_void_p, c_int32),
    )
    return loaded


def instruction_sets() -> list[str]:
    """What the compiled kernels and this machine have in common, from the least to the most capable."""
    kernels = library()
    return [kernels.flashnorm_isa_name(i).decode() for i in range(kernels.flashnorm_isa_count())] if kernels else []


def choose(instruction_set: str) -> None:
    """Use the kernels for this instruction set from now on."""
    kernels = library()
    assert kernels is not None
    kernels.flashnorm_isa_choose(instruction_sets().index(instruction_set))


def pack(weight: Tensor) -> Tensor:
    """A linear's weights in the order in which the kernels read them, as a view of them where nothing is padded.

    Outputs are padded with zeros to a multiple of sixteen, inputs to an even number.

    Args:
        weight: `[outputs, inputs]`, float32, bfloat16 or float16.

    Returns:
        `[outputs / 16, inputs, 16]`; bfloat16: `[outputs / 16, inputs / 2, 16, 2]`.
    """
    outputs, inputs = weight.shape
    if inputs % 2 or outputs % BLOCK:
        weight = F.pad(weight, (0, inputs % 2, 0, -outputs % BLOCK))
    rows = weight.unflatten(0, (-1, BLOCK))
    if weight.dtype == torch.bfloat16:
        return rows.unflatten(2, (-1, 2)).permute(0, 2, 1, 3)
    return rows.permute(0, 2, 1)
