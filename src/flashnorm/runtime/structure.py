"""Reads a decoder's weights out of a Transformers model, and proves that its layers compute what `deferred.py` says.

* Names only propose what a layer's parts are. A layer of each kind (its modules' types and settings) then runs, in
  float32, on random numbers, next to `deferred.decoder_layer` with the weights found: one that computes anything else
  is refused, with the difference.
* What a layer is given is the model's affair, so it is looked at as well: which positions it may see, and whether the
  rotation of a position is the same in every text.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from flashnorm.compat.generation import attention_implementation
from flashnorm.runtime.deferred import LayerSettings, LayerWeights, decoder_layer, inverse_rms

_TOKENS = 8
# float32 sums in another order: of the layer's output, relative to its largest element.
_SAME = 1e-4
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


class UnsupportedError(ValueError):
    """The model is no decoder that the kernels can run; the message says why."""


@dataclass(frozen=True)
class LayerSizes:
    """What all layers of a decoder have in common, besides their settings.

    Attributes:
        shapes: of each matrix, and of each vector where there is one: fields of `LayerWeights`.
        rotary: how many channels of a head are rotated.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rotary: int

    @property
    def hidden(self) -> int:
        """Channels of the residual stream."""
        return self.shapes["output"][0]

    @staticmethod
    def of(settings: LayerSettings, hidden: int, inner: int, rotary: int) -> "LayerSizes":
        """Those of layers that the kernels compute."""
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
        gains = dict.fromkeys(("attention_gain", "mlp_gain"), (hidden,))
        gains |= dict.fromkeys(("q_gain", "k_gain"), (settings.head_dim,))
        return LayerSizes({**matrices, **biases, **gains}, rotary)


@dataclass(frozen=True)
class Decoder:
    """A decoder's weights, which are the model's own.

    Attributes:
        layers: one entry a layer.
        settings: what they share.
        head: `[vocabulary, hidden]`.
        final_gain: `[hidden]`, or None if it is folded.
        rotary: the model's module that makes the cosines and sines.
        embedding: `[vocabulary, hidden]`.
        embedding_scale, logit_scale: constant factors.
    """

    layers: tuple[LayerWeights, ...]
    settings: LayerSettings
    head: Tensor
    final_gain: Tensor | None
    rotary: nn.Module
    embedding: Tensor
    embedding_scale: float
    logit_scale: float

    @property
    def hidden(self) -> int:
        """Channels of the residual stream."""
        return self.embedding.shape[1]

    @property
    def sizes(self) -> LayerSizes:
        """Those that each layer must have."""
        rotary = 2 * self.tables(0, 1)[0].shape[1]
        return LayerSizes.of(self.settings, self.hidden, len(self.layers[0].gate), rotary)

    def tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for these positions, `[positions, half]` in float32."""
        return _tables(self.rotary, self.hidden, torch.arange(start, stop))


def _tables(rotary: nn.Module, hidden: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Raises `UnsupportedError` if the rotary module makes tables whose two halves differ."""
    tables = []
    for table in rotary(torch.zeros(1, 1, hidden), positions[None]):
        if table.shape[-1] % 2 or not torch.equal(*table.chunk(2, -1)):
            raise UnsupportedError("expected rotary tables of two equal halves, found others")
        tables.append(table[0, :, : table.shape[-1] // 2].float().contiguous())
    return tables[0], tables[1]


@torch.inference_mode()
def read_decoder(model: PreTrainedModel) -> Decoder:
    """Find a model's decoder and prove its layers, one of each kind.

    Args:
        model: in memory, on the CPU, in evaluation mode.

    Raises:
        UnsupportedError: some part is not what the kernels compute.
    """
    decoder = find_decoder(model)
    _prove(model, decoder)
    return decoder


def find_decoder(model: PreTrainedModel) -> Decoder:
    """The weights, where they lie now, of a decoder that is proven already; see `read_decoder`.

    Raises:
        UnsupportedError: they are not what the kernels can read.
    """
    base: Any = model.base_model
    config: Any = model.config
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    if len(kinds) != 1 or next(iter(kinds))[0] != "cpu":
        raise UnsupportedError(f"expected weights of one dtype on the CPU, found {kinds}")
    layers = _attribute(base, "layers")
    first = _attribute(layers[0], "self_attn")
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UnsupportedError("expected an output head without a bias, found another")
    embedding: Any = model.get_input_embeddings()
    weights = tuple(_checked_layer(layer, config, i) for i, layer in enumerate(layers))
    if (activation := getattr(config, "hidden_act", None)) not in _ACTIVATIONS:
        raise UnsupportedError(f"expected one of {', '.join(_ACTIVATIONS)} as hidden_act, found {activation}")
    head_dim = int(_attribute(first, "head_dim"))
    norm = _attribute(base, "norm")
    settings = LayerSettings(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        activation=_ACTIVATIONS[activation],
        eps=_eps(norm),
        qk_eps=_eps(first.q_norm) if hasattr(first, "q_norm") else 0.0,
        attention_scale=float(getattr(first, "scaling", head_dim**-0.5)),
        residual_scale=float(getattr(layers[0], "residual_multiplier", 1.0)),
    )
    decoder = Decoder(
        layers=weights,
        settings=settings,
        head=head.weight.detach(),
        final_gain=_gain(norm),
        rotary=_attribute(base, "rotary_emb"),
        embedding=embedding.weight.detach(),
        embedding_scale=float(getattr(config, "embedding_multiplier", 1.0)),
        logit_scale=1 / float(getattr(config, "logits_scaling", 1.0)),
    )
    _check_sizes(decoder)
    return decoder


def _check_sizes(decoder: Decoder) -> None:
    """The kernels have the same sizes in all layers."""
    sizes = decoder.sizes
    for index, layer in enumerate(decoder.layers):
        if (problem := layer_problem(layer, sizes)) is not None:
            raise UnsupportedError(f"in layer {index}: {problem}")
    for name in ("head", "embedding"):
        matrix = getattr(decoder, name)
        if type(matrix) is not Tensor or matrix.dim() != 2 or matrix.shape[1] != decoder.hidden:
            raise UnsupportedError(f"expected the {name} as a matrix of {decoder.hidden} columns, found another")
    if decoder.final_gain is not None and decoder.final_gain.shape != (decoder.hidden,):
        raise UnsupportedError(f"expected {decoder.hidden} gains of the final norm, found {decoder.final_gain.shape}")


def _attribute(module: Any, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise UnsupportedError(f"expected {type(module).__name__} to have {name}, found none")
    return found


def _eps(norm: Any) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(eps := getattr(norm, name, None), float):
            return eps
    raise UnsupportedError(f"expected an RMSNorm with its eps, found {type(norm).__name__}")


def _gain(norm: Any) -> Tensor | None:
    weight = getattr(norm, "weight", None)
    return None if weight is None else weight.detach()


def _checked_layer(layer: Any, config: Any, index: int) -> LayerWeights:
    """Raises `UnsupportedError` if the layer has other weights than those found."""
    found = read_layer(layer, config, index)
    # A fused linear begins where the first of its parts does.
    known = {tensor.data_ptr() for tensor in vars(found).values() if isinstance(tensor, Tensor)}
    others = [name for name, weight in layer.named_parameters() if weight.data_ptr() not in known]
    if others:
        raise UnsupportedError(f"expected a layer without other weights, found {', '.join(others)} in layer {index}")
    return found


def read_layer(layer: Any, config: Any, index: int) -> LayerWeights:
    """The weights of a decoder layer, as they are now; raises `UnsupportedError` if there is none of that name."""
    attention, mlp = _attribute(layer, "self_attn"), _attribute(layer, "mlp")
    heads, kv_heads, head_dim = (
        int(_attribute(config, "num_attention_heads")),
        int(_attribute(config, "num_key_value_heads")),
        int(_attribute(attention, "head_dim")),
    )
    parts = {
        **_parts(attention, ("q", "k", "v"), "qkv_proj", (heads, kv_heads, kv_heads), head_dim),
        **_parts(mlp, ("gate", "up"), "gate_up_proj", (1, 1)),
        **_part("output", _attribute(attention, "o_proj")),
        **_part("down", _attribute(mlp, "down_proj")),
    }
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) and (kinds is None or kinds[index] == "sliding_attention")
    return LayerWeights(
        **parts,
        attention_gain=_gain(_attribute(layer, "input_layernorm")),
        mlp_gain=_gain(_attribute(layer, "post_attention_layernorm")),
        q_gain=_gain(getattr(attention, "q_norm", None)),
        k_gain=_gain(getattr(attention, "k_norm", None)),
        window=int(config.sliding_window) if slides else None,
        rotates=bool(getattr(attention, "use_rope", True)),
    )


def _parts(
    module: Any, names: tuple[str, ...], fused: str, shares: tuple[int, ...], size: int | None = None
) -> dict[str, Any]:
    """Weights and biases of linears that are alone, `<name>_proj`, or parts of a fused one, of so many shares each."""
    together = getattr(module, fused, None)
    if together is None:
        return {key: part for name in names for key, part in _part(name, _attribute(module, f"{name}_proj")).items()}
    whole = _part(fused, together)
    outputs = len(whole[fused])
    size = outputs // sum(shares) if size is None else size
    if outputs != size * sum(shares):
        raise UnsupportedError(f"expected {fused} to have {size * sum(shares)} outputs, found {outputs}")
    sizes, bias = [size * share for share in shares], whole[f"{fused}_bias"]
    weights = whole[fused].split(sizes)
    biases = [None] * len(names) if bias is None else bias.split(sizes)
    return dict(zip(names, weights, strict=True)) | {f"{n}_bias": b for n, b in zip(names, biases, strict=True)}


def _part(name: str, linear: Any) -> dict[str, Any]:
    weight, bias = _attribute(linear, "weight"), getattr(linear, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise UnsupportedError(f"expected {type(linear).__name__} to have a matrix as weight, found none")
    return {name: weight.detach(), f"{name}_bias": None if bias is None else bias.detach()}


def layer_problem(layer: LayerWeights, sizes: LayerSizes) -> str | None:
    """Why the kernels cannot read a layer's weights as they are now; None if they can."""
    for name, shape in sizes.shapes.items():
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return f"expected {name} as a plain tensor on the CPU, found {type(tensor).__name__} on {tensor.device}"
        if tensor.dtype != layer.q.dtype:
            return f"expected {name} in {layer.q.dtype}, found {tensor.dtype}"
        if tensor.shape != shape:
            return f"expected {name} to have the shape {shape}, found {tuple(tensor.shape)}"
    return None


# --- the proof


def _prove(model: Any, decoder: Decoder) -> None:
    _check_rotation(decoder, model.config.max_position_embeddings)
    _check_windows(model, decoder)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, decoder.hidden, generator=generator)
    cos, sin = decoder.tables(0, _TOKENS)
    with _eager(model):
        for index in kinds_of_layers(model, decoder).values():
            layer, weights = model.base_model.layers[index], decoder.layers[index]
            expected = _run(layer, x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), weights.window)
            found = decoder_layer(x, cos, sin, _as_float(weights), decoder.settings)
            _compare(f"layer {index}", found - x, expected - x)
    # What comes before and after the layers: with the model's own code, and none of the layers.
    ids = torch.randint(0, decoder.embedding.shape[0], (1, _TOKENS), generator=generator)
    with _without_layers(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
    x = decoder.embedding[ids].float() * decoder.embedding_scale
    read = x * inverse_rms(x, decoder.settings.eps)
    read = read if decoder.final_gain is None else read * decoder.final_gain.float()
    found = F.linear(read.to(decoder.head.dtype), decoder.head).float() * decoder.logit_scale
    few_bits = 8 * torch.finfo(decoder.head.dtype).eps  # the model rounds to its dtype on the way
    _compare("what surrounds the layers", found, expected, max(_SAME, few_bits))


def kinds_of_layers(model: Any, decoder: Decoder) -> dict[Any, int]:
    """Each kind of layer that a model has -> the first layer of that kind."""
    kinds: dict[Any, int] = {}
    for index, (layer, weights) in enumerate(zip(model.base_model.layers, decoder.layers, strict=True)):
        kinds.setdefault(_kind(layer, weights), index)
    return kinds


def _kind(layer: nn.Module, weights: LayerWeights) -> Any:
    """Equal for layers that do the same with their weights: same modules with the same settings, same parts."""
    plain = (bool, int, float, str)
    modules = tuple(
        (
            name,
            type(module),
            vars(module).get("forward"),
            tuple(
                (key, value) for key, value in vars(module).items() if isinstance(value, plain) and key != "layer_idx"
            ),
        )
        for name, module in layer.named_modules()
    )
    return (
        modules,
        tuple((name, None if value is None else name) for name, value in vars(weights).items()),
        weights.window,
    )


def _check_rotation(decoder: Decoder, longest: int) -> None:
    """The tables of a position are the same in a short text and in one of any length."""
    positions = torch.arange(_TOKENS)
    alone = _tables(decoder.rotary, decoder.hidden, positions)
    among = _tables(decoder.rotary, decoder.hidden, torch.cat([positions, torch.tensor([4 * longest])]))
    again = _tables(decoder.rotary, decoder.hidden, positions)
    for table, longer, after in zip(alone, among, again, strict=True):
        if not (torch.equal(table, longer[:_TOKENS]) and torch.equal(table, after)):
            raise UnsupportedError("expected the rotation of a position to be always the same, found it to change")


def _check_windows(model: Any, decoder: Decoder) -> None:
    """Each layer is given the mask of its window, here with a window of three."""
    masks: list[Tensor | None] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
        for layer in model.base_model.layers
    ]
    configured = getattr(model.config, "sliding_window", None)
    try:
        if configured:
            model.config.sliding_window = 3
        with _eager(model):
            model(input_ids=torch.ones(1, _TOKENS, dtype=torch.long), use_cache=False)
    finally:
        if configured:
            model.config.sliding_window = configured
        for hook in hooks:
            hook.remove()
    for index, (mask, layer) in enumerate(zip(masks, decoder.layers, strict=True)):
        expected = _seen(3 if layer.window else None)
        if mask is None or not torch.equal((mask if mask.dtype == torch.bool else mask == 0)[0, 0], expected):
            raise UnsupportedError(f"expected layer {index} to see the positions of its window, found another mask")


def _seen(window: int | None) -> Tensor:
    """`[token, position]`."""
    at = torch.arange(_TOKENS)
    seen = at[None] <= at[:, None]
    return seen if window is None else seen & (at[None] > at[:, None] - window)


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float = _SAME) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:
        raise UnsupportedError(f"{what} computes something else than the kernels would, by {difference:.2g}")


def _run(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, window: int | None) -> Tensor:
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS).masked_fill(~_seen(window), torch.finfo(torch.float32).min)
    try:
        output = copy.deepcopy(layer).float()(
            x,
            attention_mask=mask,
            position_ids=torch.arange(_TOKENS)[None],
            position_embeddings=(cos[None], sin[None]),
            use_cache=False,
        )
    except Exception as error:
        raise UnsupportedError(f"expected a decoder layer, found one that does not run like one: {error}") from error
    return output[0] if isinstance(output, tuple) else output


def _as_float(weights: LayerWeights) -> LayerWeights:
    tensors = {name: value.float() for name, value in vars(weights).items() if isinstance(value, Tensor)}
    return replace(weights, **tensors)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    before = attention_implementation(model)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _without_layers(model: PreTrainedModel) -> Iterator[None]:
    base: Any = model.base_model
    layers = base.layers
    base.layers = nn.ModuleList()
    try:
        yield
    finally:
        base.layers = layers
