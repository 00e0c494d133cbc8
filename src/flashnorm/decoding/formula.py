"""Proves that a model's decoder layers compute the formula in `deferred.py`.

* One layer of each kind (same types and settings of its modules) runs in float32 on random numbers, and so does
  `deferred.decoder_layer` with the layer's weights. If the results differ, the model is refused. Both run once more
  with large weights: a limit that clips large numbers would not show otherwise.
* What the model passes to its layers is checked as well: the mask of each layer, and that the RoPE tables of a position
  are the same in every sequence.
* All of this runs on a copy that shares the model's weights, as another thread may use the model meanwhile.
"""

import copy
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from flashnorm.compat.torch import copy_with
from flashnorm.decoding.decoder import Decoder, UnsupportedError
from flashnorm.decoding.deferred import LayerWeights, decoder_layer, inverse_rms
from flashnorm.decoding.structure import find_decoder, read_layer

_TOKENS = 8
# Tolerance for float32 sums in another order, relative to the largest element of the layer's output.
_SAME = 1e-4
# The weights whose outputs a layer may clip, and by what they are enlarged to show it. Those of q and k are not among
# them: with so large scores of attention, float32 sums in another order would differ as well.
_CLIPPED, _LARGE = ("v", "gate", "up", "router", "experts_in"), 256.0


@torch.inference_mode()
def read_decoder(model: PreTrainedModel) -> Decoder:
    """Find a model's decoder and prove its layers, one of each kind. The model itself is not changed.

    Args:
        model: the model, in memory, on one device, in evaluation mode.

    Raises:
        UnsupportedError: a part of the model is not what the kernels compute.
    """
    decoder = find_decoder(model)
    _check_room(model, decoder)
    shared: Any = copy_with(model, {tensor: tensor for tensor in (*model.parameters(), *model.buffers())})
    shared.set_attn_implementation("eager")
    shared_decoder = find_decoder(shared)
    _check_rotation(shared_decoder, shared.config.max_position_embeddings)
    _prove_layers(shared, shared_decoder)
    _check_windows(shared, shared_decoder)
    _prove_surroundings(shared, shared_decoder)
    return decoder


def _check_room(model: Any, decoder: Decoder) -> None:
    """Check that there is memory for the copies that the proofs make: a layer of each kind in float32 and its dtype."""
    layers = [model.base_model.layers[index] for index in kinds_of_layers(model, decoder).values()]
    bytes_of_each = 4 + decoder.head.element_size()
    needed = bytes_of_each * sum(weight.numel() for layer in layers for weight in layer.parameters())
    if needed > (available := _free_memory(decoder.head.device)):
        raise UnsupportedError(
            f"expected {needed / 1e9:.1f} GB of free memory for a copy of a layer of each kind, on which the kernels "
            f"are proven, found {available / 1e9:.1f} GB"
        )


def _free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, for this process."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _prove_layers(model: Any, decoder: Decoder) -> None:
    x = torch.randn(1, _TOKENS, decoder.hidden, generator=torch.Generator().manual_seed(0)).to(decoder.head.device)
    tables = decoder.tables(0, _TOKENS)
    for index in kinds_of_layers(model, decoder).values():
        layer, weights = model.base_model.layers[index], decoder.layers[index]
        cos, sin = (table[weights.table] for table in tables)
        own = _as_float(layer)
        copied = read_layer(own, model.config, index)
        for factor in (1.0, _LARGE):
            for name in _CLIPPED:
                if (weight := getattr(copied, name)) is not None:
                    weight.mul_(factor)
            expected = _run(own, x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), weights.window)
            found = decoder_layer(x, cos, sin, copied, decoder.settings)
            _compare(f"layer {index}", found - x, expected - x)


def _prove_surroundings(model: Any, decoder: Decoder) -> None:
    """Compare embedding, final norm and head with the formula: the model's own code runs, without any layer."""
    model.base_model.layers = nn.ModuleList()
    model.config.output_router_logits = False  # they are a loss over the routers, and no router is left
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.embedding.shape[0], (1, _TOKENS), generator=generator).to(decoder.head.device)
    embedded: list[Tensor] = []
    model.base_model.norm.register_forward_pre_hook(lambda _, args: embedded.append(args[0].float()))
    expected = model(input_ids=ids, use_cache=False).logits.float()
    settings, cap = decoder.settings, decoder.logit_cap
    x = decoder.embedding[ids].float() * decoder.embedding_scale
    read = x * inverse_rms(x, settings.eps)
    read = read if decoder.final_gain is None else read * (decoder.final_gain.float() + settings.gain_offset)
    found = F.linear(read.to(decoder.head.dtype), decoder.head).float() * decoder.logit_scale
    found = found if cap is None else cap * (found / cap).tanh()
    few_bits = 8 * torch.finfo(decoder.head.dtype).eps  # the model rounds intermediate results to its dtype
    _compare("the embedding", x, embedded[0], max(_SAME, few_bits))
    _compare("what surrounds the layers", found, expected, max(_SAME, few_bits))


def kinds_of_layers(model: Any, decoder: Decoder) -> dict[Any, int]:
    """Each kind of layer that a model has -> the index of the first layer of that kind."""
    kinds: dict[Any, int] = {}
    for index, (layer, weights) in enumerate(zip(model.base_model.layers, decoder.layers, strict=True)):
        kinds.setdefault(_kind(layer, weights), index)
    return kinds


def _kind(layer: nn.Module, weights: LayerWeights) -> Any:
    """A key that is equal for layers with the same modules, settings and parts, which therefore compute the same."""
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
    """Check that the RoPE tables of a position do not depend on the length of the sequence."""
    positions = torch.arange(_TOKENS, device=decoder.head.device)
    alone = decoder.tables_of(positions)
    among = decoder.tables_of(torch.cat([positions, positions.new_tensor([4 * longest])]))
    again = decoder.tables_of(positions)
    for table, longer, after in zip(alone, among, again, strict=True):
        if not (torch.equal(table, longer[:, :_TOKENS]) and torch.equal(table, after)):
            raise UnsupportedError("expected the rotation of a position to be always the same, found it to change")


def _check_windows(model: Any, decoder: Decoder) -> None:
    """Check that the model gives each layer the mask of its window, here with a window of three positions."""
    masks: list[Tensor | None] = []
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 3
    model(input_ids=torch.ones(1, _TOKENS, dtype=torch.long, device=decoder.head.device), use_cache=False)
    for index, (mask, layer) in enumerate(zip(masks, decoder.layers, strict=True)):
        expected = _seen(3 if layer.window else None, decoder.head.device)
        if mask is None or not torch.equal((mask if mask.dtype == torch.bool else mask == 0)[0, 0], expected):
            raise UnsupportedError(f"expected layer {index} to see the positions of its window, found another mask")


def _seen(window: int | None, device: torch.device) -> Tensor:
    """Which positions each token sees, `[token, position]`."""
    at = torch.arange(_TOKENS, device=device)
    seen = at[None] <= at[:, None]
    return seen if window is None else seen & (at[None] > at[:, None] - window)


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float = _SAME) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:
        raise UnsupportedError(f"{what} computes something else than the kernels would, by {difference:.2g}")


def _run(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, window: int | None) -> Tensor:
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS, device=x.device)
    mask = mask.masked_fill(~_seen(window, x.device), torch.finfo(torch.float32).min)
    try:
        output = layer(
            x,
            attention_mask=mask,
            position_ids=torch.arange(_TOKENS, device=x.device)[None],
            position_embeddings=(cos[None], sin[None]),
            use_cache=False,
        )
    except Exception as error:
        raise UnsupportedError(f"expected a decoder layer, found one that does not run like one: {error}") from error
    return output[0] if isinstance(output, tuple) else output


def _as_float(layer: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(layer).float()
    except Exception as error:
        raise UnsupportedError(f"expected a decoder layer, found one that cannot be copied: {error}") from error
