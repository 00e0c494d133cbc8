"""A decoder on a GPU: one token of all layers in one CUDA graph, over a static cache.

* The prompt runs in the model's own forward, which fills a cache of Transformers; it is copied once into ours.
* A step reads the model's own weights. The residual stream and everything between the kernels is float32.
"""

from collections import defaultdict
from itertools import chain
from typing import Any

import torch
import triton
from torch import Tensor
from transformers import PreTrainedModel
from triton import knobs

from flashnorm.compat import generation
from flashnorm.decoding.decoder import Decoder, UnsupportedError
from flashnorm.decoding.generate import Kernels
from flashnorm.gpu import launch
from flashnorm.gpu.choice import fastest
from flashnorm.gpu.tiling import Tiling, candidates

# Positions by which the cache grows, at least.
_GROWTH = 512
_MOST_PARTS = 32
_LONGEST_HEAD = 256
# The parts of a layer that the kernels have; all others must be absent.
_PARTS = frozenset(
    {
        *("q", "k", "v", "output", "gate", "up", "down", "q_gain", "k_gain", "attention_gain", "mlp_gain"),
        *(f"{name}_bias" for name in ("q", "k", "v", "output", "gate", "up", "down")),
    }
)


def check_supported(decoder: Decoder) -> None:
    """Raise `UnsupportedError` if the kernels cannot run this decoder."""
    settings, device, dtype = decoder.settings, decoder.head.device, decoder.head.dtype
    if device.type != "cuda" and not knobs.runtime.interpret:
        raise UnsupportedError(f"expected weights on a GPU, found them on {device}")
    if dtype not in launch.DTYPES:
        raise UnsupportedError(f"expected float32, bfloat16 or float16 weights, found {dtype}")
    if settings.activation != "silu":
        raise UnsupportedError(f"on a GPU: expected the activation silu, found {settings.activation}")
    if not settings.norm_before or settings.norm_all_heads or settings.score_cap is not None:
        raise UnsupportedError("on a GPU: expected norms before attention and MLP and plain scores, found others")
    if len(decoder.kinds) > 1:
        raise UnsupportedError(f"on a GPU: expected one RoPE table for all layers, found {', '.join(decoder.kinds)}")
    if settings.head_dim > _LONGEST_HEAD or settings.heads % settings.kv_heads:
        raise UnsupportedError(f"on a GPU: expected a head size up to {_LONGEST_HEAD}, found {settings.head_dim}")
    for index, layer in enumerate(decoder.layers):
        present = {name for name, part in vars(layer).items() if isinstance(part, Tensor)}
        if others := sorted(present - _PARTS):
            raise UnsupportedError(f"on a GPU: expected no {', '.join(others)}, found them in layer {index}")
        if (
            layer.gate is None
            or layer.window is not None
            or not layer.rotates
            or (layer.q_gain is None) != (layer.k_gain is None)
        ):
            raise UnsupportedError(f"on a GPU: expected an MLP, RoPE and no window, found others in layer {index}")
        if any(part.stride(-1) != 1 for part in vars(layer).values() if isinstance(part, Tensor)):
            raise UnsupportedError(f"on a GPU: expected weights with contiguous rows, found others in layer {index}")
    if decoder.head.stride(-1) != 1 or decoder.embedding.stride(-1) != 1:
        raise UnsupportedError("on a GPU: expected an embedding and a head with contiguous rows, found others")


class GraphDecoder:
    """A decoder that runs on the GPU's kernels, and the cache of its sequence.

    Args:
        model: the model, for the prompt.
        decoder: the model's decoder, which `check_supported` accepts.
    """

    def __init__(self, model: PreTrainedModel, decoder: Decoder):
        self._model: Any = model
        self._device, settings = decoder.head.device, decoder.settings
        head_dim = settings.head_dim
        self._token = torch.zeros(1, dtype=torch.long, device=self._device)
        self._position = torch.zeros(1, dtype=torch.long, device=self._device)
        self._x = self._empty(decoder.hidden)
        self._projected = self._empty((settings.heads + 2 * settings.kv_heads) * head_dim)
        self._attended = self._empty(settings.heads * head_dim)
        self._logits = self._empty(len(decoder.head))
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._capacity = self._length = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        # Programmatic dependent launch: since Hopper.
        self._dependent = self._device.type == "cuda" and torch.cuda.get_device_capability(self._device)[0] >= 9
        self._use(decoder)

    def fits(self, decoder: Decoder) -> bool:
        """Whether `read` can replace the decoder by this one: all sizes are the same, and the dtype."""
        return _sizes(decoder) == _sizes(self._decoder)

    def read(self, decoder: Decoder) -> None:
        """Use the weights of this decoder from now on. Weights that were changed in place need nothing."""
        if _places(decoder) != _places(self._decoder):
            self._use(decoder)

    def start(self, sequences: int = 1) -> None:
        """Forget the sequence and begin a new one; `ValueError` if there is to be more than one at a time."""
        if sequences != 1:
            raise ValueError(f"expected one sequence, found {sequences}")
        self._length = 0

    def extend(self, ids: Tensor, rows: int = 1, sequence: int = 0) -> Tensor:
        """Run the prompt `[tokens]` with the model's own code; returns the logits of the last `rows`, in float32.

        Raises:
            ValueError: the prompt is not the beginning of the only sequence.
        """
        if self._length or sequence:
            raise ValueError("expected the beginning of one sequence, found more")
        cache = generation.empty_cache(self._model)
        given = {"use_cache": True, "logits_to_keep": rows, generation.cache_argument(self._model): cache}
        logits = self._model(input_ids=ids[None], **given).logits[0].float()
        self._length = len(ids)
        self._grow(self._length)
        for index, (keys, values) in enumerate(generation.cached(cache)):
            self._keys[index][:, : self._length] = keys[0]
            self._values[index][:, : self._length] = values[0]
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token: `[1]` -> logits `[1, vocabulary]`, in float32."""
        self._grow(self._length + 1)
        self._token.copy_(ids)
        self._position.fill_(self._length - 1)
        if self._device.type != "cuda":
            self._run()
        else:
            self._graph = self._graph or self._captured()
            self._graph.replay()
        self._length += 1
        launch.runs["step"] += 1
        logits = self._logits * 1.0
        cap = self._decoder.logit_cap
        return (logits if cap is None else cap * (logits / cap).tanh())[None]

    def logits_of(self, x: Tensor) -> Tensor:
        """The final norm and the head alone: residual stream `[hidden]` -> logits `[vocabulary]`, without their cap."""
        self._x.copy_(x)
        self._head()
        return self._logits.clone()

    def _use(self, decoder: Decoder) -> None:
        self._decoder, self._graph = decoder, None
        self._inner = self._empty(max(len(layer.gate) for layer in decoder.layers if layer.gate is not None))
        self._tilings = {key: self._tiling(*key, layers) for key, layers in self._products().items()}
        if self._capacity:
            self._cos, self._sin = (table[0].contiguous() for table in decoder.tables(0, self._capacity))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self._device)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A step as a CUDA graph. It runs once before, so that all kernels are compiled; the cache does not notice."""
        beside = torch.cuda.Stream(self._device)
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(beside):
            before = self._position.clone()
            self._run()
            self._position.copy_(before)
        torch.cuda.current_stream(self._device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph

    def _run(self) -> None:
        decoder, x, dependent = self._decoder, self._x, self._dependent
        settings = decoder.settings
        normed = {"gain_offset": settings.gain_offset, "eps": settings.eps, "dependent": dependent}
        launch.embed(decoder.embedding, self._token, self._position, x, decoder.embedding_scale)
        for index, layer in enumerate(decoder.layers):
            gate, up, down = layer.gate, layer.up, layer.down
            assert gate is not None
            assert up is not None
            assert down is not None
            launch.three_matvecs(
                x, (layer.q, layer.k, layer.v), (layer.q_bias, layer.k_bias, layer.v_bias), self._projected,
                self._tilings["three", layer.q.shape], gain=layer.attention_gain, **normed,
            )  # fmt: skip
            self._attention(
                self._projected,
                None if layer.q_gain is None or layer.k_gain is None else (layer.q_gain, layer.k_gain),
                (self._cos, self._sin), self._position, self._keys[index], self._values[index], self._attended,
                gain_offset=settings.gain_offset, qk_eps=settings.qk_eps, scale=settings.attention_scale,
                dependent=dependent,
            )  # fmt: skip
            self._add(self._attended, layer.output, layer.output_bias)
            inner = self._inner[: len(gate)]
            launch.gated_matvec(
                x, gate, up, layer.gate_bias, layer.up_bias, inner, self._tilings["gated", gate.shape],
                gain=layer.mlp_gain, **normed,
            )  # fmt: skip
            self._add(inner, down, layer.down_bias)
        self._head()

    def _head(self) -> None:
        decoder, settings = self._decoder, self._decoder.settings
        launch.matvec(
            self._x, decoder.head, self._logits, self._tilings["one", decoder.head.shape], gain=decoder.final_gain,
            gain_offset=settings.gain_offset, eps=settings.eps, factor=decoder.logit_scale, dependent=self._dependent,
        )  # fmt: skip

    def _add(self, read: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Add a linear layer's output to the residual stream."""
        launch.matvec(
            read, weight, self._x, self._tilings["one", weight.shape], bias=bias, residual=self._x,
            factor=self._decoder.settings.residual_scale, dependent=self._dependent,
        )  # fmt: skip

    def _products(self) -> dict[tuple[str, torch.Size], list[tuple[Tensor, ...]]]:
        """The products of a step: kind and shape of the first matrix -> the matrices of each layer that has it."""
        found: dict[tuple[str, torch.Size], list[tuple[Tensor, ...]]] = defaultdict(list)
        found["one", self._decoder.head.shape].append((self._decoder.head,))
        for layer in self._decoder.layers:
            assert layer.gate is not None
            assert layer.up is not None
            assert layer.down is not None
            found["three", layer.q.shape].append((layer.q, layer.k, layer.v))
            found["gated", layer.gate.shape].append((layer.gate, layer.up))
            found["one", layer.output.shape].append((layer.output,))
            found["one", layer.down.shape].append((layer.down,))
        return found

    def _tiling(self, kind: str, shape: torch.Size, layers: list[tuple[Tensor, ...]]) -> Tiling:
        """The fastest tiling of a product, measured on all layers in turn: then none is in the L2 cache."""
        eps, dtype = self._decoder.settings.eps, self._decoder.head.dtype
        x, y = torch.ones(shape[1], device=self._device), self._empty(3 * shape[0])

        def run(way: Tiling | None) -> None:
            assert way is not None
            for first, *others in layers:
                if kind == "three":
                    k, v = others
                    launch.three_matvecs(
                        x, (first, k, v), (None, None, None), y, way, gain=None, gain_offset=0.0, eps=eps
                    )
                elif kind == "gated":
                    launch.gated_matvec(x, first, others[0], None, None, y, way, gain=None, gain_offset=0.0, eps=eps)
                else:
                    launch.matvec(x, first, y, way, eps=eps)

        way = fastest(f"{kind} {tuple(shape)} {dtype}", candidates(1, dtype), lambda: run, self._device)
        assert way is not None
        return way

    def _grow(self, length: int) -> None:
        """Make room for `length` positions in the cache."""
        old = self._capacity
        if length <= old:
            return
        self._capacity = max(-(-length // _GROWTH) * _GROWTH, 2 * old)
        decoder, settings = self._decoder, self._decoder.settings
        shape = settings.kv_heads, self._capacity, settings.head_dim
        for kept in (self._keys, self._values):
            for index in range(len(decoder.layers)):
                made = torch.zeros(shape, dtype=decoder.head.dtype, device=self._device)
                if old:
                    made[:, :old] = kept[index]
                    kept[index] = made
                else:
                    kept.append(made)
        self._cos, self._sin = (table[0].contiguous() for table in decoder.tables(0, self._capacity))
        blocks = triton.cdiv(self._capacity, launch.Attention.BLOCK)
        parts = max(1, min(_MOST_PARTS, blocks, 2 * _multiprocessors(self._device) // settings.kv_heads))
        self._attention = launch.Attention(settings.heads, settings.kv_heads, settings.head_dim, self._device, parts)
        self._graph = None


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # in the interpreter: enough to have several parts
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tensors(decoder: Decoder) -> list[Tensor]:
    parts = chain(*(vars(layer).values() for layer in decoder.layers), vars(decoder).values())
    return [part for part in parts if isinstance(part, Tensor)]


def _sizes(decoder: Decoder) -> tuple[object, ...]:
    return decoder.settings, [(part.shape, part.dtype, part.device) for part in _tensors(decoder)]


def _places(decoder: Decoder) -> tuple[object, ...]:
    """What a captured graph has read once and for all."""
    scales = decoder.embedding_scale, decoder.logit_scale
    return scales, [(part.data_ptr(), part.stride()) for part in _tensors(decoder)]


KERNELS = Kernels(check_supported, GraphDecoder, sequences=1)
