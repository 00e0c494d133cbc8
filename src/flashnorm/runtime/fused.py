"""Runs a decoder with the fused kernels: all layers of one step in one call, over a cache of its own.

Weights are packed once, into memory that the system may back with huge pages. The cache grows in place.
"""

import ctypes
import mmap
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.runtime.deferred import LayerWeights
from flashnorm.runtime.kernels import native
from flashnorm.runtime.structure import Decoder, UnsupportedError

# Positions by which the cache grows.
_GROWTH = 512
# Tokens of a prompt that are run at a time.
_CHUNK = 512


class FusedDecoder:
    """A decoder on packed weights, and the cache of one text.

    Args:
        decoder: as `structure.read_decoder` found it. Its weights stay the model's; packed copies are made.
        threads: 0 means as many as torch uses.

    Raises:
        UnsupportedError: sizes or dtypes that the kernels do not have, or no kernels.
    """

    def __init__(self, decoder: Decoder, threads: int = 0):
        kernels = native.library()
        if kernels is None:
            raise UnsupportedError(
                "expected compiled kernels, found none: install flashnorm from source where there is a C++ compiler"
            )
        self._kernels = kernels
        settings = decoder.settings
        dtype = decoder.head.dtype
        if dtype not in native.DTYPES:
            raise UnsupportedError(f"expected float32, bfloat16 or float16 weights, found {dtype}")
        if settings.head_dim % native.BLOCK or settings.head_dim > native.MOST_HEAD_DIM or decoder.hidden % 16:
            raise UnsupportedError(f"expected a head size in steps of 16, up to {native.MOST_HEAD_DIM}, found others")
        self._decoder, self.dtype = replace(decoder, layers=()), dtype  # what is packed is not held here as well
        self._threads = threads or torch.get_num_threads()
        self._keep: list[Tensor] = []
        shapes = [shape for layer in decoder.layers for shape in _shapes(layer)]
        self._arena = _Arena(sum(_padded_size(shape) for shape in [decoder.head.shape, *shapes]) * dtype.itemsize)
        self._layers = (native.Layer * len(decoder.layers))()
        for at, layer in enumerate(decoder.layers):
            biases = {
                "qkv": layer.qkv_bias,
                "output": layer.output_bias,
                "gate_up": _interleaved_biases(layer),
                "down": layer.down_bias,
            }
            for name, weight in _layer_matrices(layer).items():
                setattr(self._layers[at], name, self._linear(weight, biases[name]))
            for name in ("attention_gain", "mlp_gain", "q_gain", "k_gain"):
                setattr(self._layers[at], name, self._vector(getattr(layer, name)))
            self._layers[at].window = layer.window or 0
            self._layers[at].rotate = layer.rotates
        rotary = 2 * decoder.tables(0, 1)[0].shape[1]
        self._model = native.Model(
            layers=self._layers,
            head=self._linear(decoder.head, None),
            final_gain=self._vector(decoder.final_gain),
            dtype=native.DTYPES[dtype],
            layer_count=len(decoder.layers),
            hidden=decoder.hidden,
            inner=decoder.layers[0].gate.shape[0],
            heads=settings.heads,
            kv_heads=settings.kv_heads,
            head_dim=settings.head_dim,
            rotary=rotary,
            activation=native.ACTIVATIONS[settings.activation],
            capacity=0,
            eps=settings.eps,
            qk_eps=settings.qk_eps,
            attention_scale=settings.attention_scale,
            residual_scale=settings.residual_scale,
        )
        self._vocabulary = decoder.head.shape[0]
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._cos, self._sin = decoder.tables(0, 0)
        self.length = 0

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a model, also one in a file, has no packed weights: it generates as Transformers does."""
        return type(None), ()

    @property
    def packed_bytes(self) -> int:
        """Size of the packed weights."""
        return self._arena.size

    def reset(self, length: int = 0) -> None:
        """Forget what comes after the first `length` tokens."""
        self.length = min(self.length, length)

    def step(self, ids: Tensor, rows: int = 1) -> Tensor:
        """Run more tokens of the text.

        Args:
            ids: `[tokens]`.
            rows: for how many of the last tokens logits are wanted.

        Returns:
            `[rows, vocabulary]`, float32.
        """
        logits: list[Tensor] = []
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            wanted = max(0, min(len(chunk), start + len(chunk) - (len(ids) - rows)))
            logits.append(self._run(chunk, wanted))
        return torch.cat(logits)

    def _run(self, ids: Tensor, rows: int) -> Tensor:
        count, past = len(ids), self.length
        self._grow(past + count)
        x = F.embedding(ids, self._decoder.embedding).float()
        if self._decoder.embedding_scale != 1:
            x *= self._decoder.embedding_scale
        logits = torch.empty(rows, -(-self._vocabulary // native.BLOCK) * native.BLOCK)
        model = ctypes.byref(self._model)
        needed = self._kernels.flashnorm_decode_memory(model, count, past, self._threads)
        if len(self._memory) < needed + 64:
            self._memory = torch.empty(needed + 64, dtype=torch.uint8)
        memory = -(-self._memory.data_ptr() // 64) * 64
        half = self._cos.shape[1] * 4
        self._kernels.flashnorm_decode(
            *(model, x.data_ptr(), count, past),
            *(self._cos.data_ptr() + past * half, self._sin.data_ptr() + past * half),
            *(logits.data_ptr(), rows, memory, self._threads),
        )
        self.length += count
        logits = logits[:, : self._vocabulary]
        return logits if self._decoder.logit_scale == 1 else logits * self._decoder.logit_scale

    def _grow(self, length: int) -> None:
        """Room for so many positions."""
        old = self._model.capacity
        if length <= old:
            return
        capacity = max(-(-length // _GROWTH) * _GROWTH, 2 * old)
        settings, block = self._decoder.settings, native.BLOCK
        kv, d = settings.kv_heads, settings.head_dim
        for at in range(len(self._layers)):
            keys = torch.zeros(kv, capacity // block, d, block, dtype=self.dtype)
            values = torch.zeros(kv, d // block, capacity, block, dtype=self.dtype)
            if old:
                keys[:, : old // block] = self._cache[at][0]
                values[:, :, :old] = self._cache[at][1]
                self._cache[at] = keys, values
            else:
                self._cache.append((keys, values))
            self._layers[at].keys, self._layers[at].values = keys.data_ptr(), values.data_ptr()
        self._model.capacity = capacity
        self._cos, self._sin = self._decoder.tables(0, capacity)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> native.Linear:
        packed = self._arena.put(native.pack(weight))
        outputs = -(-weight.shape[0] // native.BLOCK) * native.BLOCK
        inputs = weight.shape[1] + weight.shape[1] % 2
        return native.Linear(packed.data_ptr(), self._vector(bias, outputs), inputs, weight.shape[0])

    def _vector(self, values: Tensor | None, size: int = 0) -> int | None:
        if values is None:
            return None
        vector = torch.zeros(max(size, len(values)))
        vector[: len(values)] = values.float()
        self._keep.append(vector)
        return vector.data_ptr()


class _Arena:
    """One piece of memory for all weights, in huge pages where the system has them."""

    def __init__(self, size: int):
        self.size = size
        self._memory = mmap.mmap(-1, max(size, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._used = 0

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in the arena."""
        count = tensor.numel() * tensor.element_size()
        place = self._bytes[self._used : self._used + count].view(tensor.dtype).view(tensor.shape)
        self._used += -(-count // 64) * 64
        return place.copy_(tensor)


def _padded_size(shape: tuple[int, ...]) -> int:
    """Elements of a packed matrix, at most: both sizes padded to a multiple of sixteen."""
    outputs, inputs = (-(-size // native.BLOCK) * native.BLOCK for size in shape)
    return outputs * inputs


def _shapes(layer: LayerWeights) -> list[tuple[int, ...]]:
    """Of the matrices of `_layer_matrices`; those of gate and up projection are apart here."""
    return [tuple(one.shape) for one in (layer.qkv, layer.output, layer.gate, layer.up, layer.down)]


def _layer_matrices(layer: LayerWeights) -> dict[str, Tensor]:
    """Gate and up projection take turns, sixteen outputs each; the down projection has as many inputs."""
    inner = layer.gate.shape[0]
    more = -inner % native.BLOCK
    gate, up = (F.pad(one, (0, 0, 0, more)).unflatten(0, (-1, native.BLOCK)) for one in (layer.gate, layer.up))
    return {
        "qkv": layer.qkv,
        "output": layer.output,
        "gate_up": torch.stack([gate, up], 1).flatten(0, 2),
        "down": F.pad(layer.down, (0, more)),
    }


def _interleaved_biases(layer: LayerWeights) -> Tensor | None:
    if layer.gate_bias is None and layer.up_bias is None:
        return None
    inner = layer.gate.shape[0]
    parts = [
        F.pad(torch.zeros(inner) if bias is None else bias.float(), (0, -inner % native.BLOCK))
        for bias in (layer.gate_bias, layer.up_bias)
    ]
    return torch.stack([part.unflatten(0, (-1, native.BLOCK)) for part in parts], 1).flatten()
