"""Decoder layers inside Transformers' own forward: everything but attention is done by the fused kernels.

* Masks, caches and attention stay Transformers' own, so batches, padding, beams, static caches and assisted decoding
  work as ever.
* A layer's weights are looked up in each call, so what is done to them counts.
* Where a layer is no longer what was proven (a hook, an adapter, another module, gradients), its own code runs.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from flashnorm.runtime import ops
from flashnorm.runtime.deferred import LayerSettings, LayerWeights
from flashnorm.runtime.kernels import native
from flashnorm.runtime.structure import read_layer


class Structure:
    """A module's submodules as they were proven; whether they still are the same ones, doing what they did."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._parts = [
            (parent, name, child, type(child))
            for parent in module.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]

    def holds(self) -> bool:
        """Whether nothing below the module was replaced, hooked, patched or put into training mode."""
        return not self._module.training and all(
            parent._modules.get(name) is child and type(child) is kind and not _interferes(child)
            for parent, name, child, kind in self._parts
        )


def _interferes(module: nn.Module) -> bool:
    """Whether someone wants to see or change what a module computes."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or module.training:
        return True
    if module._forward_hooks and not all(map(_idle, module._forward_hooks.values())):
        return True
    forward = vars(module).get("forward")
    return forward is not None and not isinstance(forward, FusedForward)


def _idle(hook: Any) -> bool:
    """Transformers leaves its hooks for `output_attentions` where they are, when attentions are no longer wanted."""
    if getattr(hook, "__module__", None) != output_capturing.__name__:
        return False
    return not set(output_capturing._active_collector.get() or ()) - {"hidden_states"}


class FusedForward:
    """A decoder layer's `forward`.

    Args:
        layer: as it is in the model.
        config: the model's.
        index: of the layer.
        settings: as `structure.read_decoder` found them.
    """

    def __init__(self, layer: Any, config: Any, index: int, settings: LayerSettings):
        self._layer, self._config, self._index, self._settings = layer, config, index, settings
        self._structure, self._attention = Structure(layer), layer.self_attn

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same arguments and result as the layer's own."""
        weights, attention = self._weights(hidden_states), self._attention_function()
        if args or weights is None or attention is None:
            return type(self._layer).forward(self._layer, hidden_states, *args, **kwargs)  # type: ignore[operator]
        return self._forward(hidden_states, weights, attention, **kwargs)

    def _weights(self, x: Tensor) -> LayerWeights | None:
        """None where the kernels are not to be used."""
        if not self._structure.holds() or x.device.type != "cpu":
            return None
        weights = read_layer(self._layer, self._config, self._index)
        if weights.q.dtype != x.dtype or x.dtype not in native.DTYPES or weights.q.device != x.device:
            return None
        wanted = torch.is_grad_enabled() and (
            x.requires_grad or any(parameter.requires_grad for parameter in self._layer.parameters())
        )
        return None if wanted else weights

    def _attention_function(self) -> Callable[..., Any] | None:
        """Transformers' own, as configured; an eager one is written where the layer is."""
        module = sys.modules[type(self._attention).__module__]
        eager: Any = getattr(module, "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self._config._attn_implementation, eager)

    def _forward(
        self,
        x: Tensor,
        weights: LayerWeights,
        attention: Callable[..., Any],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        settings, (batch, tokens, hidden) = self._settings, x.shape
        assert position_embeddings is not None
        half = position_embeddings[0].shape[-1] // 2
        cos, sin = (table[..., :half].expand(batch, tokens, half).reshape(-1, half) for table in position_embeddings)
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
        )
        heads = projected.view(batch, tokens, -1, settings.head_dim).transpose(1, 2)
        q, k, v = heads.split([settings.heads, settings.kv_heads, settings.kv_heads], 1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self._attention.layer_idx)
        attended, _ = attention(
            self._attention,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=settings.attention_scale,
            sliding_window=weights.window,
            **kwargs,
        )
        return ops.after_attention(
            rows,
            attended.reshape(batch * tokens, -1),
            [getattr(weights, name) for name in ops.AFTER_ATTENTION],
            settings.activation,
            settings.eps,
            settings.residual_scale,
        ).view(x.shape)
