"""The Python side of the compiled kernels; the structures mirror `api.h`."""

import ctypes
import functools
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.cpu.kernels.build import LIBRARY
from flashnorm.decoding.deferred import LayerSettings, LayerWeights

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
BLOCK = 16  # number of outputs that are computed together
MOST_HEAD_DIM = 256
EXPERTS = ("experts_in", "experts_out")  # each a matrix of all experts, one below the other
LINEARS = ("q", "k", "v", "output", "gate", "up", "down", "router", *EXPERTS, "shared_gate")
GAINS = ("attention_gain", "mlp_gain", "attention_after", "mlp_after", "q_gain", "k_gain")
# Parts of a model, as `FlashnormPart` numbers them.
ALL, ATTENTION_INPUTS, AFTER_ATTENTION, NORM_LINEAR = range(4)
_LINE = 64  # bytes of a line of the processor's cache

_log = logging.getLogger("flashnorm")


class Linear(Structure):
    """A linear layer: weights `[outputs, inputs]`, the model's own memory."""

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
        ("table", c_int32),
        ("experts_per_token", c_int32),
        ("renormalise", c_int32),
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
                *("dtype", "layer_count", "hidden", "heads", "kv_heads", "head_dim", "rotary"),
                *("activation", "capacity", "norm_before", "norm_all_heads", "final_norm", "cache_sequences"),
            )
        ),
        *((name, c_float) for name in ("eps", "qk_eps", "attention_scale", "residual_scale", "score_cap")),
    )


class Step(Structure):
    """What to compute, and the memory for inputs and outputs."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "cos", "sin", "past")),
        *((name, c_int32) for name in ("sequences", "tokens", "positions", "tables", "first_sequence")),
        *((name, c_void_p) for name in ("projected", "logits")),
        ("logit_rows", c_int32),
        *((name, c_void_p) for name in ("input", "output")),
        ("threads", c_int32),
        ("memory", c_void_p),
    )


# The number of the interface in `api.h`, and the sizes of its structures.
LAYOUT = (2, *map(ctypes.sizeof, (Linear, Layer, Model, Step)))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None if they were not compiled, or if they are of another layout and would misread their input."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    if (found := _layout(loaded)) != LAYOUT:
        _log.warning(
            "%s: expected kernels of layout %s, found %s, and uses none; install flashnorm again, which compiles them",
            LIBRARY,
            LAYOUT,
            found,
        )
        return None
    loaded.flashnorm_isa_name.restype = c_char_p
    loaded.flashnorm_run.restype = c_int64
    loaded.flashnorm_run.argtypes = (POINTER(Model), POINTER(Step), c_int32)
    loaded.flashnorm_problem.restype = c_char_p
    loaded.flashnorm_problem.argtypes = loaded.flashnorm_run.argtypes
    return loaded


def _layout(loaded: ctypes.CDLL) -> tuple[int, ...] | None:
    """The layout that a library reports; None if the library is too old to report one."""
    try:
        layout = loaded.flashnorm_layout
    except AttributeError:
        return None
    layout.restype = POINTER(c_int64)
    return tuple(layout()[: len(LAYOUT)])


_scratch = threading.local()

# How often each part has run in this process. Proofs and tests read it to see whether the kernels ran.
runs: Counter[int] = Counter()


def run(model: Model, step: Step, part: int = ALL) -> None:
    """Compute a part of a model, or all of it. Unless the step sets `threads`, as many are used as torch uses.

    Raises:
        ValueError: sizes do not fit each other or their memory. Nothing was computed.
    """
    kernels = library()
    assert kernels is not None
    step.threads = step.threads or torch.get_num_threads()
    step.memory = None
    needed = kernels.flashnorm_run(model, step, part)
    if needed < 0:
        problem = kernels.flashnorm_problem(model, step, part).decode()
        raise ValueError(f"expected sizes that fit each other and their memory, found that {problem}")
    runs[part] += 1
    memory = getattr(_scratch, "memory", None)
    if memory is None or len(memory) < needed + _LINE:
        memory = _scratch.memory = torch.empty(needed + _LINE, dtype=torch.uint8)
    step.memory = -(-memory.data_ptr() // _LINE) * _LINE
    kernels.flashnorm_run(model, step, part)


def instruction_sets() -> list[str]:
    """The instruction sets that there are kernels for and that this machine has, the most capable one last."""
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
        "heads": settings.heads,
        "kv_heads": settings.kv_heads,
        "head_dim": settings.head_dim,
        "rotary": rotary,
        "activation": ACTIVATIONS[settings.activation],
        "eps": settings.eps,
        "qk_eps": settings.qk_eps,
        "attention_scale": settings.attention_scale,
        "residual_scale": settings.residual_scale,
        "score_cap": settings.score_cap or 0.0,
        "norm_before": settings.norm_before,
        "norm_all_heads": settings.norm_all_heads,
    }


def fill(layer: Layer, weights: Mapping[str, Any], gain_offset: float, keep: list[Tensor]) -> None:
    """Set the pointers of `layer` to those of a layer's weights (fields of `LayerWeights`) that are not None.

    A gain is `gain_offset` plus the norm's weight. Tensors that the pointers need are put into `keep`, which must live
    as long as `layer`.
    """
    for name in LINEARS:
        if weights.get(name) is not None:
            setattr(layer, name, linear(weights[name], weights.get(f"{name}_bias"), keep))
    for name in GAINS:
        setattr(layer, name, address(weights.get(name), keep, gain_offset))


def linear(weight: Tensor, bias: Tensor | None, keep: list[Tensor]) -> Linear:
    """A `Linear` that points to weights `[..., outputs, inputs]` and to a float32 copy of the bias."""
    weight = weight.contiguous().flatten(0, -2)
    keep.append(weight)
    return Linear(weight.data_ptr(), address(bias, keep), weight.shape[1], weight.shape[0], bytes_from(weight))


def address(values: Tensor | None, keep: list[Tensor], offset: float = 0.0) -> int | None:
    """The address of a float32 copy of a vector plus `offset`, padded with zeros to a whole block; None for None."""
    if values is None:
        return None
    keep.append(F.pad(values.float() + offset, (0, -len(values) % BLOCK)).contiguous())
    return keep[-1].data_ptr()


def bytes_from(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its storage, which may have been resized."""
    return int(tensor.untyped_storage().nbytes()) - int(tensor.storage_offset()) * tensor.element_size()


def padded(count: int) -> int:
    """`count` rounded up to whole blocks."""
    return -(-count // BLOCK) * BLOCK
