"""Runs a decoder with the fused kernels: all layers of one step in one call, over a cache of its own.

Weights are read where the model has them. The cache grows in place.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flashnorm.runtime.kernels import native
from flashnorm.runtime.structure import Decoder, UnsupportedError

NO_KERNELS = "expected compiled kernels, found none: install flashnorm from source where there is a C++ compiler"
# Positions by which the cache grows.
_GROWTH = 512
# Tokens of a prompt that are run at a time.
_CHUNK = 512


class FusedDecoder:
    """A decoder, and the cache of the texts that it is given.

    Args:
        decoder: as `structure.read_decoder` found it. Its weights stay the model's.
        threads: 0 means as many as torch uses.

    Raises:
        UnsupportedError: sizes or dtypes that the kernels do not have, or no kernels.
    """

    def __init__(self, decoder: Decoder, threads: int = 0):
        check_supported(decoder)
        self._threads = threads
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._lengths = torch.zeros(1, dtype=torch.int32)
        self._capacity = 0
        self.read(decoder)

    def fits(self, decoder: Decoder) -> bool:
        """Whether this decoder can take the other's place: what is cached is of the same layers, sizes and dtype."""
        return _cached(decoder) == _cached(self._decoder)

    def read(self, decoder: Decoder) -> None:
        """Use the weights of this decoder, which must fit, from now on. What is in the cache stays."""
        self._decoder, self._keep = decoder, []
        self._layers = (native.Layer * len(decoder.layers))()
        for layer, weights in zip(self._layers, decoder.layers, strict=True):
            native.fill(layer, vars(weights), self._keep)
            layer.window, layer.rotate = weights.window or 0, weights.rotates
        for layer, (keys, values) in zip(self._layers, self._cache, strict=False):
            _point_to(layer, keys, values)
        self._model = native.Model(
            layers=self._layers,
            layer_count=len(self._layers),
            head=native.linear(decoder.head, None, self._keep),
            final_gain=native.address(decoder.final_gain, self._keep),
            final_norm=1,
            capacity=self._capacity,
            cache_texts=len(self._lengths),
            **native.sizes(decoder.layers[0], decoder.settings, 2 * decoder.tables(0, 1)[0].shape[1]),
        )
        self._cos, self._sin = decoder.tables(0, self._capacity)

    @property
    def weight_bytes(self) -> int:
        """Size of all weights that a step reads."""
        matrices = [
            self._model.head,
            *(getattr(layer, name) for layer in self._layers for name in native.LINEARS),
        ]
        return sum(one.inputs * one.outputs for one in matrices) * self._decoder.head.dtype.itemsize

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text so far."""
        return self._lengths.tolist()

    def start(self, texts: int = 1) -> None:
        """Forget all texts; there are so many new ones, without any token."""
        if texts != len(self._lengths):
            self._cache, self._capacity = [], 0
        self._lengths = torch.zeros(texts, dtype=torch.int32)
        self._model.cache_texts = texts

    def truncate(self, length: int) -> None:
        """Forget what comes after the first `length` tokens of each text."""
        self._lengths.clamp_(max=length)

    def extend(self, ids: Tensor, rows: int = 1, text: int = 0) -> Tensor:
        """Run more tokens of one text.

        Args:
            ids: `[tokens]`.
            rows: for how many of the last tokens logits are wanted.
            text: which one.

        Returns:
            `[rows, vocabulary]`, float32.
        """
        logits: list[Tensor] = []
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            wanted = max(0, min(len(chunk), start + len(chunk) - (len(ids) - rows)))
            logits.append(self._run(chunk[None], wanted, text))
        return torch.cat(logits)

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token of every text: `[texts]` -> `[texts, vocabulary]`, float32."""
        return self._run(ids[:, None], len(ids), 0)

    def _run(self, ids: Tensor, rows: int, first_text: int) -> Tensor:
        texts, tokens = ids.shape
        past = self._lengths[first_text : first_text + texts]
        self._grow(int(past.max()) + tokens)
        decoder = self._decoder
        x = F.embedding(ids.flatten(), decoder.embedding).float()
        if decoder.embedding_scale != 1:
            x *= decoder.embedding_scale
        logits = torch.empty(rows, native.padded(len(decoder.head)))
        call = native.Call(
            x=x.data_ptr(),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            past=past.data_ptr(),
            texts=texts,
            tokens=tokens,
            positions=len(self._cos),
            first_text=first_text,
            logits=logits.data_ptr(),
            logit_rows=rows,
            threads=self._threads,
        )
        native.run(self._model, call)
        past += tokens
        logits = logits[:, : len(decoder.head)]
        return logits if decoder.logit_scale == 1 else logits * decoder.logit_scale

    def _grow(self, length: int) -> None:
        """Room for so many positions."""
        old = self._capacity
        if length <= old:
            return
        capacity = max(-(-length // _GROWTH) * _GROWTH, 2 * old)
        settings, block = self._decoder.settings, native.BLOCK
        texts, kv, d, dtype = len(self._lengths), settings.kv_heads, settings.head_dim, self._decoder.head.dtype
        for at, layer in enumerate(self._layers):
            keys = torch.zeros(texts, kv, capacity // block, d, block, dtype=dtype)
            values = torch.zeros(texts, kv, d // block, capacity, block, dtype=dtype)
            if old:
                keys[:, :, : old // block] = self._cache[at][0]
                values[:, :, :, :old] = self._cache[at][1]
                self._cache[at] = keys, values
            else:
                self._cache.append((keys, values))
            _point_to(layer, keys, values)
        self._model.capacity = self._capacity = capacity
        self._cos, self._sin = self._decoder.tables(0, capacity)


def _point_to(layer: native.Layer, keys: Tensor, values: Tensor) -> None:
    layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
    layer.cache_bytes = min(native.memory_of(keys), native.memory_of(values))


def _cached(decoder: Decoder) -> tuple[object, ...]:
    """What a cache is of."""
    settings = decoder.settings
    return len(decoder.layers), settings.kv_heads, settings.head_dim, decoder.head.dtype


def check_supported(decoder: Decoder) -> None:
    """Raises `UnsupportedError` if there are no kernels for this decoder."""
    if native.library() is None:
        raise UnsupportedError(NO_KERNELS)
    if decoder.head.dtype not in native.DTYPES:
        raise UnsupportedError(f"expected float32, bfloat16 or float16 weights, found {decoder.head.dtype}")
    head_dim = decoder.settings.head_dim
    if head_dim % native.BLOCK or head_dim > native.MOST_HEAD_DIM or decoder.hidden % native.BLOCK:
        raise UnsupportedError(f"expected a head size in steps of 16, up to {native.MOST_HEAD_DIM}, found others")
