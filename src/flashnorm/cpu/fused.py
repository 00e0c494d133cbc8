"""Runs a decoder with the fused kernels: all layers of one step in one call, with its own cache of keys and values.

The kernels read the model's own weights. The cache grows as needed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from flashnorm.cpu.kernels import native
from flashnorm.decoding.decoder import Decoder, UnsupportedError
from flashnorm.decoding.generate import Kernels


class NoKernelsError(UnsupportedError):
    """The kernels were not compiled when flashnorm was installed, or were compiled from another release."""


# Positions by which the cache grows.
_GROWTH = 512
# Tokens of a prompt that are run at once.
_CHUNK = 512


class FusedDecoder:
    """A decoder that runs on the kernels, and the cache of its sequences.

    Args:
        decoder: the decoder that `structure.find_decoder` found. Its weights are not copied.
        threads: how many threads to use; 0: as many as torch.

    Raises:
        UnsupportedError: the kernels do not support the sizes or dtypes, or there are no kernels.
    """

    def __init__(self, decoder: Decoder, threads: int = 0):
        check_supported(decoder)
        self._threads = threads
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._lengths = torch.zeros(1, dtype=torch.int32)
        self._capacity = 0
        self.read(decoder)

    def fits(self, decoder: Decoder) -> bool:
        """Whether `decoder` can replace the current one: its cache has the same number of layers, sizes and dtype."""
        return _cached(decoder) == _cached(self._decoder)

    def read(self, decoder: Decoder) -> None:
        """Use the weights of this decoder from now on; it must fit (see `fits`). The cache is kept."""
        self._decoder, self._keep = decoder, []
        self._layers = (native.Layer * len(decoder.layers))()
        for layer, weights in zip(self._layers, decoder.layers, strict=True):
            native.fill(layer, vars(weights), decoder.settings.gain_offset, self._keep)
            layer.window, layer.rotate, layer.table = weights.window or 0, weights.rotates, weights.table
            layer.experts_per_token, layer.renormalise = weights.experts_per_token, weights.renormalises
        for layer, (keys, values) in zip(self._layers, self._cache, strict=False):
            _point_to(layer, keys, values)
        self._model = native.Model(
            layers=self._layers,
            layer_count=len(self._layers),
            head=native.linear(decoder.head, None, self._keep),
            final_gain=native.address(decoder.final_gain, self._keep, decoder.settings.gain_offset),
            final_norm=1,
            capacity=self._capacity,
            cache_sequences=len(self._lengths),
            **native.sizes(decoder.layers[0], decoder.settings, decoder.rotated),
        )
        self._cos, self._sin = decoder.tables(0, self._capacity)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence so far."""
        return self._lengths.tolist()

    def start(self, sequences: int = 1) -> None:
        """Forget all sequences and begin `sequences` new ones, which are empty."""
        if sequences != len(self._lengths):
            self._cache, self._capacity = [], 0
        self._lengths = torch.zeros(sequences, dtype=torch.int32)
        self._model.cache_sequences = sequences

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of each sequence."""
        self._lengths.clamp_(max=length)

    def extend(self, ids: Tensor, rows: int = 1, sequence: int = 0) -> Tensor:
        """Run more tokens of one sequence.

        Args:
            ids: `[tokens]`, the token ids.
            rows: the number of last tokens to return logits for.
            sequence: the number of the sequence.

        Returns:
            `[rows, vocabulary]`, float32.
        """
        logits: list[Tensor] = []
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            wanted = max(0, min(len(chunk), start + len(chunk) - (len(ids) - rows)))
            logits.append(self._run(chunk[None], wanted, sequence))
        return torch.cat(logits)

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token of every sequence: `[sequences]` -> `[sequences, vocabulary]`, float32."""
        return self._run(ids[:, None], len(ids), 0)

    def _run(self, ids: Tensor, rows: int, first_sequence: int) -> Tensor:
        sequences, tokens = ids.shape
        past = self._lengths[first_sequence : first_sequence + sequences]
        self._grow(int(past.max()) + tokens)
        decoder = self._decoder
        x = F.embedding(ids.flatten(), decoder.embedding).float()
        if decoder.embedding_scale != 1:
            x *= decoder.embedding_scale
        logits = torch.empty(rows, native.padded(len(decoder.head)))
        step = native.Step(
            x=x.data_ptr(),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            past=past.data_ptr(),
            sequences=sequences,
            tokens=tokens,
            positions=self._cos.shape[1],
            tables=len(self._cos),
            first_sequence=first_sequence,
            logits=logits.data_ptr(),
            logit_rows=rows,
            threads=self._threads,
        )
        native.run(self._model, step)
        past += tokens
        logits = logits[:, : len(decoder.head)]
        logits = logits if decoder.logit_scale == 1 else logits * decoder.logit_scale
        cap = decoder.logit_cap
        return logits if cap is None else cap * (logits / cap).tanh()

    def _grow(self, length: int) -> None:
        """Make room for `length` positions in the cache."""
        old = self._capacity
        if length <= old:
            return
        capacity = max(-(-length // _GROWTH) * _GROWTH, 2 * old)
        settings, block = self._decoder.settings, native.BLOCK
        sequences, kv, d, dtype = len(self._lengths), settings.kv_heads, settings.head_dim, self._decoder.head.dtype
        for at, layer in enumerate(self._layers):
            keys = torch.zeros(sequences, kv, capacity // block, d, block, dtype=dtype)
            values = torch.zeros(sequences, kv, d // block, capacity, block, dtype=dtype)
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
    layer.cache_bytes = min(native.bytes_from(keys), native.bytes_from(values))


def _cached(decoder: Decoder) -> tuple[object, ...]:
    """The properties of a decoder that its cache depends on."""
    settings = decoder.settings
    return len(decoder.layers), settings.kv_heads, settings.head_dim, decoder.head.dtype


def check_supported(decoder: Decoder) -> None:
    """Raise `UnsupportedError` if there are no kernels for this decoder."""
    if native.library() is None:
        raise NoKernelsError(
            "expected compiled kernels, found none: install flashnorm from source where there is a C++ compiler"
        )
    if decoder.head.device.type != "cpu":
        raise UnsupportedError(f"expected weights on the CPU, found them on {decoder.head.device}")
    if decoder.head.dtype not in native.DTYPES:
        raise UnsupportedError(f"expected float32, bfloat16 or float16 weights, found {decoder.head.dtype}")
    head_dim = decoder.settings.head_dim
    if head_dim % native.BLOCK or head_dim > native.MOST_HEAD_DIM or decoder.hidden % native.BLOCK:
        raise UnsupportedError(f"expected a head size in steps of 16, up to {native.MOST_HEAD_DIM}, found others")


def _start(_: PreTrainedModel, decoder: Decoder) -> FusedDecoder:
    return FusedDecoder(decoder)


KERNELS = Kernels(check_supported, _start)
