"""Decoder layers inside Transformers' own forward: the fused kernels compute everything but attention.

* Masks, caches and attention are Transformers' own, so batches, padding, beams, static caches and assisted decoding
  work as usual.
* A layer's weights are looked up in each call, so changes of the weights count.
* A layer's arguments are read by name. If an argument is unknown, or the layer is no longer what was proven (a hook, an
  adapter, another module, gradients), the layer's own code runs, and a remark says so.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashnorm.compat import generation
from flashnorm.cpu import ops
from flashnorm.cpu.kernels import native
from flashnorm.decoding.decoder import LayerSizes, UnsupportedError, layer_problem
from flashnorm.decoding.deferred import LayerSettings, LayerWeights
from flashnorm.decoding.guard import Guard, Substitute, remark
from flashnorm.decoding.structure import read_layer

_KNOWN = frozenset({"attention_mask", "position_embeddings", *generation.FOR_ATTENTION, *generation.CACHES})


class Rotation:
    """The RoPE tables of the current forward, in the form that the kernels read; all layers share this object."""

    def __init__(self) -> None:
        # One tuple, so that it is replaced at once: several threads may run the same model.
        self._last: tuple[Any, tuple[int, ...], tuple[Tensor, Tensor] | None] = None, (), None

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": (None, (), None)}

    def halves(self, tables: Any, batch: int, tokens: int, rotary: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of each token, `[batch tokens, rotary / 2]` each, in float32.

        Args:
            tables: the layer's position embeddings: cosines and sines, `[1 or batch, tokens, rotary]` each.
            batch, tokens: sizes of the layer's input.
            rotary: how many channels of a head RoPE rotates.

        Returns:
            Both tables; None if `tables` is anything else, or the two halves of a table differ.
        """
        sizes = batch, tokens, rotary
        last = self._last
        if last[0] is tables and last[1] == sizes:
            return last[2]
        halves = _halves(tables, *sizes)
        self._last = tables, sizes, halves
        return halves


def _halves(tables: Any, batch: int, tokens: int, rotary: int) -> tuple[Tensor, Tensor] | None:
    if not isinstance(tables, tuple) or len(tables) != 2:
        return None
    halves = []
    for table in tables:
        if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1:] != (tokens, rotary):
            return None
        first, second = table.chunk(2, -1)
        if not torch.equal(first, second):
            return None
        halves.append(first.expand(batch, -1, -1).reshape(batch * tokens, -1).float())
    return halves[0], halves[1]


class _Ready(NamedTuple):
    """A layer's weights, the cosines and sines of each token, and the name of the argument that is the cache."""

    weights: LayerWeights
    cos: Tensor
    sin: Tensor
    cache: str | None


class FusedForward(Substitute):
    """The replacement of a decoder layer's `forward`.

    Args:
        layer: the model's layer, which was proven.
        config: the model's config.
        index: the number of the layer.
        settings: those of the decoder that `structure.find_decoder` found.
        sizes: those of the layer.
        rotation: the RoPE tables that the layers of the model share.
    """

    def __init__(
        self, layer: Any, config: Any, index: int, settings: LayerSettings, sizes: LayerSizes, rotation: Rotation
    ):
        self._layer, self._config, self._index = layer, config, index
        self._settings, self._sizes, self._rotation = settings, sizes, rotation
        self._guard = Guard(layer, calls_root=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, with the arguments and the result of its own `forward`."""
        if torch.compiler.is_compiling():  # the compiler does its own fusion
            return type(self._layer).forward(self._layer, *args, **kwargs)
        ready = self._ready(args, kwargs)
        if not isinstance(ready, str):
            return self._forward(args[0], ready, kwargs)
        remark("a decoder layer runs its own code", ready)
        return type(self._layer).forward(self._layer, *args, **kwargs)

    def problem(self) -> str | None:
        """Why the layer's own code would run whatever the arguments are; None if the kernels can run."""
        found = self._weights()
        return found if isinstance(found, str) else None

    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Ready | str":
        """What the kernels need for these arguments, or the reason why the layer's own code must run."""
        if len(args) != 1 or not isinstance(args[0], Tensor):
            return f"expected one positional argument, found {len(args)}"
        if unknown := kwargs.keys() - _KNOWN:
            return f"it was handed {', '.join(sorted(unknown))}, which this version of flashnorm does not know"
        x, caches = args[0], [name for name in generation.CACHES if kwargs.get(name) is not None]
        if len(caches) > 1:
            return f"it was handed two caches, {' and '.join(caches)}"
        weights = self._weights()
        if isinstance(weights, str):
            return weights
        if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != weights.q.dtype:
            return f"expected activations of the weights' dtype on the CPU, found {x.dtype} on {x.device}"
        if x.dtype not in native.DTYPES:
            return f"expected float32, bfloat16 or float16, found {x.dtype}"
        if x.dim() != 3 or x.shape[-1] != self._sizes.hidden:
            return f"expected activations of three dimensions, found {tuple(x.shape)}"
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self._layer.parameters())):
            return "gradients are wanted"
        tables = self._rotation.halves(kwargs.get("position_embeddings"), len(x), x.shape[1], self._sizes.rotary)
        if tables is None:
            return "expected RoPE tables of two equal halves, found others"
        return _Ready(weights, *tables, caches[0] if caches else None)

    def _weights(self) -> LayerWeights | str:
        """The layer's current weights, or the reason why the kernels cannot use them."""
        if (reason := self._guard.change()) is not None:
            return reason
        try:
            weights = read_layer(self._layer, self._config, self._index)
        except UnsupportedError as error:
            return str(error)
        return layer_problem(weights, self._sizes, "cpu") or weights

    def _forward(self, x: Tensor, ready: "_Ready", given: dict[str, Any]) -> Tensor:
        weights, cos, sin, cache = ready
        settings, (batch, tokens, hidden), attention = self._settings, x.shape, self._layer.self_attn
        handed = {name: value for name, value in given.items() if name in generation.FOR_ATTENTION}
        rows = x.reshape(-1, hidden)
        projected = ops.attention_inputs(
            rows,
            cos,
            sin,
            [getattr(weights, name) for name in ops.ATTENTION_INPUTS],
            settings.heads,
            settings.kv_heads,
            settings.eps,
            settings.qk_eps,
            weights.rotates,
            settings.norm_before,
            settings.norm_all_heads,
            settings.gain_offset,
        )
        heads = projected.view(batch, tokens, -1, settings.head_dim).transpose(1, 2)
        q, k, v = heads.split([settings.heads, settings.kv_heads, settings.kv_heads], 1)
        if cache is not None:
            k, v = generation.update_cache(cache, given[cache], k, v, attention.layer_idx, handed)
        own: dict[str, Any] = {} if weights.window is None else {"sliding_window": weights.window}
        own |= {} if settings.score_cap is None else {"softcap": settings.score_cap}
        attended, _ = generation.attention_function(attention, self._config)(
            attention,
            q,
            k,
            v,
            given.get("attention_mask"),
            dropout=0.0,
            scaling=settings.attention_scale,
            **own,
            **handed,
        )
        return ops.after_attention(
            rows,
            attended.reshape(batch * tokens, -1),
            [getattr(weights, name) for name in ops.AFTER_ATTENTION],
            settings.activation,
            settings.eps,
            settings.residual_scale,
            settings.norm_before,
            settings.gain_offset,
            weights.experts_per_token,
            weights.renormalises,
        ).view(x.shape)
