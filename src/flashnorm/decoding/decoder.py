"""A decoder as the kernels read it: its weights, the sizes that its layers share, and its RoPE tables."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashnorm.decoding.deferred import LayerSettings, LayerWeights


class UnsupportedError(ValueError):
    """The model is no decoder that the kernels can run; the message says why."""


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a decoder layer. Those of attention are the same for all layers.

    Attributes:
        shapes: field of `LayerWeights` -> the shape of that tensor, if the layer has it.
        rotary: how many channels of a head RoPE rotates.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rotary: int

    @property
    def hidden(self) -> int:
        """The hidden size: channels of the residual stream."""
        return self.shapes["output"][0]

    @staticmethod
    def of(settings: LayerSettings, hidden: int, layer: LayerWeights, rotary: int) -> "LayerSizes":
        """The sizes of a layer of a decoder with these settings and this hidden size."""
        inner = 0 if layer.gate is None else len(layer.gate)
        experts = 0 if layer.router is None else len(layer.router)
        of_expert = 0 if layer.experts_out is None else layer.experts_out.shape[-1]
        q_size, kv_size = settings.heads * settings.head_dim, settings.kv_heads * settings.head_dim
        matrices = {
            "q": (q_size, hidden),
            "k": (kv_size, hidden),
            "v": (kv_size, hidden),
            "output": (hidden, q_size),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        biases = {f"{name}_bias": shape[:1] for name, shape in matrices.items()}
        gains = dict.fromkeys(("attention_gain", "mlp_gain", "attention_after", "mlp_after"), (hidden,))
        together = settings.norm_all_heads
        gains |= {"q_gain": (q_size if together else settings.head_dim,)}
        gains |= {"k_gain": (kv_size if together else settings.head_dim,)}
        experts_have = {
            "router": (experts, hidden),
            "experts_in": (experts, 2 * of_expert, hidden),
            "experts_out": (experts, hidden, of_expert),
            "shared_gate": (1, hidden),
        }
        return LayerSizes({**matrices, **biases, **gains, **experts_have}, rotary)


@dataclass(frozen=True)
class Decoder:
    """A decoder's weights, which are the model's own tensors and no copies.

    Attributes:
        layers: the weights of each layer.
        settings: the numbers that all layers share.
        head: `[vocabulary, hidden]`.
        final_gain: `[hidden]`, or None if it is folded.
        rotary: the model's module that makes the RoPE tables.
        kinds: the kinds of layers for which it makes different tables, as it names them; none: the tables are the same
            for all layers.
        embedding: `[vocabulary, hidden]`.
        embedding_scale, logit_scale: constant factors.
        logit_cap: logits `s` become `cap tanh(s / cap)`; None: there is no cap.
    """

    layers: tuple[LayerWeights, ...]
    settings: LayerSettings
    head: Tensor
    final_gain: Tensor | None
    rotary: nn.Module
    kinds: tuple[str, ...]
    embedding: Tensor
    embedding_scale: float
    logit_scale: float
    logit_cap: float | None = None

    @property
    def hidden(self) -> int:
        """The hidden size: channels of the residual stream."""
        return self.embedding.shape[1]

    @property
    def rotated(self) -> int:
        """How many channels of a head RoPE rotates."""
        return 2 * self.tables(0, 1)[0].shape[-1]

    @property
    def sizes(self) -> tuple[LayerSizes, ...]:
        """The sizes that each layer must have."""
        rotary = self.rotated
        return tuple(LayerSizes.of(self.settings, self.hidden, layer, rotary) for layer in self.layers)

    def tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """`tables_of` positions `start` to `stop - 1`."""
        return self.tables_of(torch.arange(start, stop, device=self.embedding.device))

    def tables_of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The RoPE tables (cosines, sines) of some positions, `[kinds, positions, half]` each, in float32.

        Raises:
            UnsupportedError: the two halves of a table differ, or those of different kinds have other sizes.
        """
        x = torch.zeros(1, 1, self.hidden, device=positions.device)
        given = [(x, positions[None], kind) for kind in self.kinds] or [(x, positions[None])]
        made = [tuple(map(_half, self.rotary(*arguments))) for arguments in given]
        if len({table.shape for tables in made for table in tables}) != 1:
            raise UnsupportedError("expected RoPE tables of the same size for all layers, found others")
        cos, sin = (torch.stack(tables) for tables in zip(*made, strict=True))
        return cos, sin


def _half(table: Tensor) -> Tensor:
    """A table `[1, positions, 2 half]` whose halves are equal -> `[positions, half]`."""
    if table.shape[-1] % 2 or not torch.equal(*table.chunk(2, -1)):
        raise UnsupportedError("expected RoPE tables of two equal halves, found others")
    return table[0, :, : table.shape[-1] // 2].float()


def layer_problem(layer: LayerWeights, sizes: LayerSizes, device: str) -> str | None:
    """Why kernels for a type of device ("cpu", "cuda") cannot read a layer's current weights; None if they can."""
    for name, shape in sizes.shapes.items():
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        if type(tensor) is not Tensor or tensor.device.type != device or tensor.layout != torch.strided:
            return f"expected {name} as a plain tensor on {device}, found {type(tensor).__name__} on {tensor.device}"
        if tensor.dtype != layer.q.dtype:
            return f"expected {name} in {layer.q.dtype}, found {tensor.dtype}"
        if tensor.shape != shape:
            return f"expected {name} to have the shape {shape}, found {tuple(tensor.shape)}"
        if tensor.dim() == 3 and not tensor.is_contiguous():  # to copy all experts for each token would be slow
            return f"expected {name} in one piece of memory, found strides {tensor.stride()}"
    if layer.router is not None and not 0 < layer.experts_per_token <= len(layer.router):
        return f"expected some of {len(layer.router)} experts for each token, found {layer.experts_per_token}"
    return None
