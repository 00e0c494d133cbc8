"""The compiled kernels, as Python calls them; the structures mirror `api.h`."""

import ctypes
import functools
import threading
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p

import torch

from flashnorm.runtime.kernels.build import LIBRARY

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
BLOCK = 16  # outputs that are computed together
MOST_HEAD_DIM = 256
LINEARS = ("q", "k", "v", "output", "gate", "up", "down")
GAINS = ("attention_gain", "mlp_gain", "q_gain", "k_gain")
# Parts of a model.
ALL, ATTENTION_INPUTS, AFTER_ATTENTION = range(3)
_LINE = 64  # bytes of a line of the cache


class Linear(Structure):
    """Weights `[outputs, inputs]`, as they lie in a model."""

    _fields_ = (("weights", c_void_p), ("bias", c_void_p), ("inputs", c_int32), ("outputs", c_int32))


class Layer(Structure):
    """One decoder layer."""

    _fields_ = (
        *((name, Linear) for name in LINEARS),
        *((name, c_void_p) for name in (*GAINS, "keys", "values")),
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
                *("activation", "capacity", "final_norm"),
            )
        ),
        *((name, c_float) for name in ("eps", "qk_eps", "attention_scale", "residual_scale")),
    )


class Call(Structure):
    """What is to be computed."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "cos", "sin", "past")),
        *((name, c_int32) for name in ("texts", "tokens", "first_text")),
        *((name, c_void_p) for name in ("projected", "logits")),
        *((name, c_int32) for name in ("logit_rows", "threads")),
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
    return loaded


_scratch = threading.local()


def run(model: Model, call: Call, part: int = ALL) -> None:
    """Compute a part of a model, or all of it, with as many threads as torch uses unless the call says how many."""
    kernels = library()
    assert kernels is not None
    call.threads = call.threads or torch.get_num_threads()
    call.memory = None
    needed = kernels.flashnorm_run(model, call, part)
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
