"""The compiled kernels, as Python calls them; the structures mirror `api.h`."""

import ctypes
import functools
import threading
from collections import Counter
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.runtime.deferred import LayerSettings, LayerWeights
from flashnorm.runtime.kernels.build import LIBRARY

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
BLOCK = 16  # outputs that are computed together
MOST_HEAD_DIM = 256
LINEARS = ("q", "k", "v", "output", "gate", "up", "down")
GAINS = ("attention_gain", "mlp_gain", "q_gain", "k_gain")
# Parts of a model.
ALL, ATTENTION_INPUTS, AFTER_ATTENTION, NORM_LINEAR = range(4)
_LINE = 64  # bytes of a line of the cache


class Linear(Structure):
    """Weights `[outputs, inputs]`, as they lie in a model."""

    _fields_ = (
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("bytes", c_int64),
    )


class Layer(Structure):
    """One decoder layer."""

    _fields_ = (
        *((name, Linear) for name in LINEARS),
        *((name, c_void_p) for name in (*GAINS, "keys", "values")),
        ("window", c_int32),
        ("rotate", c_int32),
        ("cache_bytes", c_int64),
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
                *("activation", "capacity", "final_norm", "cache_texts"),
            )
        ),
        *((name, c_float) for name in ("eps", "qk_eps", "attention_scale", "residual_scale")),
    )


class Call(Structure):
    """What is to be computed."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "cos", "sin", "past")),
        *((name, c_int32) for name in ("texts", "tokens", "positions", "first_text")),
        *((name, c_void_p) for name in ("projected", "logits")),
        ("logit_rows", c_int32),
        *((name, c_void_p) for name in ("input", "output")),
        ("threads", c_int32),
        ("memory", c_void_p),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they were not compiled."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    loaded.flashnorm_isa_name.restype = c_char_p
    loaded.flashnorm_run.restype = c_int64
    loaded.flashnorm_run.argtypes = (POINTER(Model), POINTER(Call), c_int32)
    loaded.flashnorm_problem.restype = c_char_p
    loaded.flashnorm_problem.argtypes = loaded.flashnorm_run.argtypes
    return loaded


_scratch = threading.local()

# How often each part has run in this process: which way a model was run can be asked.
runs: Counter[int] = Counter()


def run(model: Model, call: Call, part: int = ALL) -> None:
    """Compute a part of a model, or all of it, with as many threads as torch uses unless the call says how many.

    Raises:
        ValueError: sizes do not fit each other, or the memory that they are of. Nothing was computed then.
    """
    kernels = library()
    assert kernels is not None
    call.threads = call.threads or torch.get_num_threads()
    call.memory = None
    needed = kernels.flashnorm_run(model, call, part)
    if needed < 0:
        problem = kernels.flashnorm_problem(model, call, part).decode()
        raise ValueError(f"expected sizes that fit each other and their memory, found that {problem}")
    runs[part] += 1
    memory = getattr(_scratch, "memory", None)
    if memory is None or len(memory) < needed + _LINE:
        memory = _scratch.memory = torch.empty(needed + _LINE, dtype=torch.uint8)
    call.memory = -(-memory.data_ptr() // _LINE) * _LINE
    kernels.flashnorm_run(model, call, part)


def instruction_sets() -> list[str]:
    """What the compiled kernels and this machine have in common, from the least to the most capable."""
    kernels = library()
    return [kernels.flashnorm_isa_name(i).decode() for i in range(kernels.flashnorm_isa_count())] if kernels else []


def choose(instruction_set: str) -> None:
    """Use the kernels for this instruction set from now on."""
    kernels = library()
    assert kernels is not None
    kernels.flashnorm_isa_choose(instruction_sets().index(instruction_set))


def sizes(weights: LayerWeights, settings: LayerSettings, rotary: int) -> dict[str, Any]:
    """The fields of `Model` that all layers share; `rotary` is how many channels of a head are rotated."""
    return {
        "dtype": DTYPES[weights.q.dtype],
        "hidden": weights.q.shape[1],
        "inner": len(weights.gate),
        "heads": settings.heads,
        "kv_heads": settings.kv_heads,
        "head_dim": settings.head_dim,
        "rotary": rotary,
        "activation": ACTIVATIONS[settings.activation],
        "eps": settings.eps,
        "qk_eps": settings.qk_eps,
        "attention_scale": settings.attention_scale,
        "residual_scale": settings.residual_scale,
    }


def fill(layer: Layer, weights: Mapping[str, Any], keep: list[Tensor]) -> None:
    """Point to those of a layer's weights that there are, fields of `LayerWeights`.

    What has to be copied for it is put into `keep`, and has to live as long as the layer.
    """
    for name in LINEARS:
        if weights.get(name) is not None:
            setattr(layer, name, linear(weights[name], weights.get(f"{name}_bias"), keep))
    for name in GAINS:
        setattr(layer, name, address(weights.get(name), keep))


def linear(weight: Tensor, bias: Tensor | None, keep: list[Tensor]) -> Linear:
    """Point to a linear's weights, `[outputs, inputs]`, and to its bias in float32."""
    weight = weight.contiguous()
    keep.append(weight)
    return Linear(weight.data_ptr(), address(bias, keep), weight.shape[1], weight.shape[0], memory_of(weight))


def address(values: Tensor | None, keep: list[Tensor]) -> int | None:
    """Of a vector in float32, as the kernels want it: with zeros up to a whole block."""
    if values is None:
        return None
    keep.append(F.pad(values.float(), (0, -len(values) % BLOCK)).contiguous())
    return keep[-1].data_ptr()


def memory_of(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its memory, which someone may have taken away."""
    return int(tensor.untyped_storage().nbytes()) - int(tensor.storage_offset()) * tensor.element_size()


def padded(count: int) -> int:
    """In whole blocks."""
    return -(-count // BLOCK) * BLOCK
