"""Finds a decoder's weights in a Transformers model.

The parts of a layer are found by their names, which prove nothing: `formula.py` proves that the layers compute the
formula in `deferred.py`.
"""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashnorm.decoding.decoder import Decoder, UnsupportedError, layer_problem
from flashnorm.decoding.deferred import LayerSettings, LayerWeights

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

# The names of a layer's norms: before attention, after it, before the MLP, after it.
_NORMS: tuple[tuple[str | None, ...], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
# The known settings of a mixture of experts, of its router and of its experts: they are read, or shapes or the proof
# show what they say. `jitter_noise` is for training.
_OF_MIXTURES = {"top_k", "num_experts", "hidden_dim", "jitter_noise", "norm_topk_prob"}
_OF_ROUTERS = {"top_k", "num_experts", "hidden_dim", "norm_topk_prob"}
_OF_EXPERTS = {
    *("num_experts", "hidden_dim", "intermediate_dim", "has_gate", "has_bias", "has_post_expert_norm"),
    *("is_transposed", "is_concatenated"),
}
_NORM_NAMES = {name for names in _NORMS for name in names if name}


def find_decoder(model: PreTrainedModel) -> Decoder:
    """A model's decoder with the current weights, without any proof; `formula.read_decoder` proves it as well.

    Raises:
        UnsupportedError: the kernels cannot read the model's parts.
    """
    base: Any = model.base_model
    config: Any = model.config
    kinds = {(str(parameter.device), parameter.dtype) for parameter in model.parameters()}
    if len(kinds) != 1:
        raise UnsupportedError(f"expected weights of one dtype on one device, found {kinds}")
    layers = _attribute(base, "layers")
    first = _attribute(layers[0], "self_attn")
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UnsupportedError("expected an output head without a bias, found another")
    embedding: Any = model.get_input_embeddings()
    rotary = _attribute(base, "rotary_emb")
    # Where RoPE depends on the kind of a layer, its module asks for the kind.
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    kinds = tuple(sorted(set(config.layer_types))) if by_kind else ()
    weights = tuple(_checked_layer(layer, config, i) for i, layer in enumerate(layers))
    if kinds:
        tables = [kinds.index(kind) for kind in config.layer_types]
        weights = tuple(replace(layer, table=table) for layer, table in zip(weights, tables, strict=False))
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"expected one of {', '.join(_ACTIVATIONS)} as hidden_act, found {activation}")
    head_dim = int(_attribute(first, "head_dim"))
    norm = _attribute(base, "norm")
    q_gain = weights[0].q_gain
    settings = LayerSettings(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        activation=_ACTIVATIONS[activation],
        eps=_eps(norm),
        qk_eps=_eps(first.q_norm) if hasattr(first, "q_norm") else 0.0,
        attention_scale=float(getattr(first, "scaling", head_dim**-0.5)),
        residual_scale=float(getattr(layers[0], "residual_multiplier", 1.0)),
        score_cap=getattr(first, "attn_logit_softcapping", None),
        norm_before=_norms_of(layers[0])[0] is not None,
        norm_all_heads=q_gain is not None and q_gain.shape != (head_dim,),
        gain_offset=_gain_offset([norm, *layers[0].modules()]),
    )
    for index, layer in enumerate(layers):
        _check_eps(layer, settings, index)
    decoder = Decoder(
        layers=weights,
        settings=settings,
        head=head.weight.detach(),
        final_gain=_gain(norm),
        rotary=rotary,
        kinds=kinds,
        embedding=embedding.weight.detach(),
        embedding_scale=_embedding_scale(embedding, config),
        logit_scale=1 / float(getattr(config, "logits_scaling", 1.0)),
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )
    _check_sizes(decoder)
    return decoder


def _check_sizes(decoder: Decoder) -> None:
    """Check that the sizes of each layer fit each other, and that attention has the same ones in all of them."""
    for index, (layer, sizes) in enumerate(zip(decoder.layers, decoder.sizes, strict=True)):
        if (problem := layer_problem(layer, sizes, decoder.head.device.type)) is not None:
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


def _check_eps(layer: Any, settings: LayerSettings, index: int) -> None:
    """Check that the norms of all layers have the same eps, which numbers of ordinary size would not show."""
    attention = layer.self_attn
    found = {_eps(norm): settings.eps for norm in _norms_of(layer) if norm is not None}
    found |= {_eps(norm): settings.qk_eps for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None))}
    for eps, expected in found.items():
        if eps != expected:
            raise UnsupportedError(f"expected the same eps in all norms, found {eps} and {expected} in layer {index}")


def _norms_of(layer: Any) -> tuple[Any, ...]:
    """A layer's norms before attention, after it, before the MLP, and after it; None where there is none.

    Raises:
        UnsupportedError: the norms have other names.
    """
    present = {name for name in _NORM_NAMES if getattr(layer, name, None) is not None}
    for names in _NORMS:
        if present == {name for name in names if name}:
            return tuple(None if name is None else getattr(layer, name) for name in names)
    raise UnsupportedError(f"expected a layer with norms of known names, found {', '.join(sorted(present)) or 'none'}")


@torch.no_grad()
def _gain_offset(modules: Iterable[nn.Module]) -> float:
    """What norms add to their weights to make their gains, 0 or 1: the first norm that has a weight is run."""
    for norm in modules:
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            made = copy.deepcopy(norm).float()(torch.ones(1, len(weight), device=weight.device))[0]
            return min((0.0, 1.0), key=lambda offset: (made - (weight.float() + offset)).abs().max().item())
    return 0.0


def _embedding_scale(embedding: Any, config: Any) -> float:
    """The constant by which embeddings are multiplied. As a buffer of the module it is rounded to the model's dtype."""
    for name in ("scalar_embed_scale", "embed_scale"):
        if (scale := getattr(embedding, name, None)) is not None:
            return float(scale)
    return float(getattr(config, "embedding_multiplier", 1.0))


def _gain(norm: Any) -> Tensor | None:
    weight = getattr(norm, "weight", None)
    return None if weight is None else weight.detach()


def _checked_layer(layer: Any, config: Any, index: int) -> LayerWeights:
    """`read_layer`; raises `UnsupportedError` if the layer has more weights than those that were read."""
    found = read_layer(layer, config, index)
    # A fused linear layer begins at the same address as its first part, so it counts as known.
    known = {tensor.data_ptr() for tensor in vars(found).values() if isinstance(tensor, Tensor)}
    others = [name for name, weight in layer.named_parameters() if weight.data_ptr() not in known]
    if others:
        raise UnsupportedError(f"expected a layer without other weights, found {', '.join(others)} in layer {index}")
    return found


def read_layer(layer: Any, config: Any, index: int) -> LayerWeights:
    """The current weights of a decoder layer; raises `UnsupportedError` if a part is missing."""
    attention, mlp = _attribute(layer, "self_attn"), _attribute(layer, "mlp")
    heads, kv_heads, head_dim = (
        int(_attribute(config, "num_attention_heads")),
        int(_attribute(config, "num_key_value_heads")),
        int(_attribute(attention, "head_dim")),
    )
    parts = {
        **_parts(attention, ("q", "k", "v"), "qkv_proj", (heads, kv_heads, kv_heads), head_dim),
        **_part("output", _attribute(attention, "o_proj")),
        **(_experts(mlp) if hasattr(mlp, "experts") else _mlp(mlp)),
    }
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) and (kinds is None or kinds[index] == "sliding_attention")
    if slides and config.sliding_window < 2:  # Transformers' cache would keep all positions
        raise UnsupportedError(f"expected a window of at least 2 positions, found {config.sliding_window}")
    attention_gain, attention_after, mlp_gain, mlp_after = map(_gain, _norms_of(layer))
    return LayerWeights(
        **parts,
        attention_gain=attention_gain,
        mlp_gain=mlp_gain,
        attention_after=attention_after,
        mlp_after=mlp_after,
        q_gain=_gain(getattr(attention, "q_norm", None)),
        k_gain=_gain(getattr(attention, "k_norm", None)),
        window=int(config.sliding_window) if slides else None,
        rotates=bool(getattr(attention, "use_rope", True)),
    )


def _mlp(mlp: Any) -> dict[str, Any]:
    return {**_parts(mlp, ("gate", "up"), "gate_up_proj", (1, 1)), **_part("down", _attribute(mlp, "down_proj"))}


def _experts(mlp: Any) -> dict[str, Any]:
    """The weights and settings of experts, and of the MLP beside them if there is one.

    Raises:
        UnsupportedError: there is more than was understood. What the proof compares is a few tokens, for which a group
            or a bias may happen to make no difference.
    """
    router, experts = _attribute(mlp, "gate"), _attribute(mlp, "experts")
    for module, known in ((mlp, _OF_MIXTURES), (router, _OF_ROUTERS), (experts, _OF_EXPERTS)):
        settings = {key for key, value in vars(module).items() if isinstance(value, int | float | str)} - {"training"}
        if unknown := [key for key in settings if not key.startswith("_") and key not in known]:
            names = ", ".join(sorted(unknown))
            raise UnsupportedError(f"expected {type(module).__name__} without other settings, found {names}")
    if buffers := [name for name, _ in mlp.named_buffers()]:
        raise UnsupportedError(f"expected {type(mlp).__name__} without buffers, found {', '.join(buffers)}")
    found = _part("router", router)
    if found.pop("router_bias") is not None:
        raise UnsupportedError(f"expected {type(router).__name__} without a bias, found one")
    for name, parameter in (("experts_in", "gate_up_proj"), ("experts_out", "down_proj")):
        weight = _attribute(experts, parameter)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            raise UnsupportedError(f"expected {parameter} of all experts as one tensor, found {type(weight).__name__}")
        found[name] = weight.detach()
    # Where there is no setting, weights are always divided by their sum, or never. The proof shows which.
    found |= {
        "experts_per_token": int(_attribute(router, "top_k")),
        "renormalises": bool(getattr(router, "norm_topk_prob", True)),
    }
    if (shared := getattr(mlp, "shared_expert", None)) is not None:
        gate = _part("shared_gate", _attribute(mlp, "shared_expert_gate"))
        if gate.pop("shared_gate_bias") is not None:
            raise UnsupportedError("expected the gate of the shared expert without a bias, found one")
        found |= _mlp(shared) | gate
    return found


def choose_all_experts(model: Any) -> bool:
    """Make all routers choose all experts, so that no rounding decides which; returns whether there are routers."""
    routers = [layer.mlp.gate for layer in model.base_model.layers if hasattr(layer.mlp, "experts")]
    for router in routers:
        router.top_k = len(router.weight)
    return bool(routers)


def _parts(
    module: Any, names: tuple[str, ...], fused: str, shares: tuple[int, ...], size: int | None = None
) -> dict[str, Any]:
    """Weights and biases of the linear layers `<name>_proj`, or of the parts of the fused linear layer `fused`.

    A part has `size` outputs for each of its `shares`; None as size divides all outputs evenly.
    """
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
