"""`flashnorm.optimize`: a Transformers model whose `generate` runs on the fused kernels wherever its options allow.

* Transformers' `generate` does all that it always does (options, logits processors, stopping criteria, streamers). Only
  the loop over tokens is ours, passed to it as `custom_generate`.
* The loop is Transformers' own for everything that the fused decoder does not do: several texts, padding, beams,
  assistants, caches that the caller holds, hidden states or attentions as outputs, hooks, training.
"""

import copy
import functools
import types
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from flashnorm.runtime.fused import FusedDecoder
from flashnorm.runtime.structure import UnsupportedError, read_decoder

_LOOPS = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_ATTRIBUTE = "_flashnorm_decoder"
# What Transformers may hand to the loop besides, and the loop knows what it means.
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
# Elements of each weight that are looked at to see whether it has changed.
_SAMPLES = 64


def optimize(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model generate with the fused kernels, where they apply; otherwise it stays as it is, with a warning.

    Each layer is first run next to the formula that the kernels implement, and must agree. The weights are packed into
    a copy in the kernels' order, so memory for them doubles. Folded and unfolded models are equally fast: the kernels
    apply a gain that is left while they read the activations.

    Args:
        model: in memory, on the CPU, with float32, bfloat16 or float16 weights. It is put into evaluation mode.

    Returns:
        The same model.
    """
    model.eval()
    try:
        decoder = FusedDecoder(read_decoder(model))
    except UnsupportedError as reason:
        warnings.warn(f"flashnorm.optimize leaves {type(model).__name__} as it is: {reason}", stacklevel=2)
        return model
    vars(model)[_ATTRIBUTE] = decoder, _state(model)
    vars(model)["generate"] = types.MethodType(_generate, model)
    return model


def _state(model: PreTrainedModel) -> list[tuple[int, int, bytes]]:
    """Changes when a weight does: where it is, how often it was written to, and, as writes through `.data` and in
    inference mode are not counted, some of its elements."""
    return [
        (
            weight.data_ptr(),
            0 if weight.is_inference() else weight._version,
            weight.detach()
            .flatten()[:: max(1, weight.numel() // _SAMPLES)]
            .contiguous()
            .view(torch.uint8)
            .numpy()
            .tobytes(),
        )
        for weight in model.parameters()
    ]


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' `generate`, with our loop where it is one over single tokens."""
    if len(args) > 1 or any(kwargs.get(name) is not None for name in ("tokenizer", "past_key_values")):
        # Transformers does not hand the tokenizer for stop strings on to a custom loop;
        # and the cache of a caller is to be filled.
        return type(model).generate(model, *args, **kwargs)
    config = copy.deepcopy(kwargs.get("generation_config") or model.generation_config)
    config.update(**kwargs)
    if config.get_generation_mode(kwargs.get("assistant_model")) in _LOOPS:
        # Nor does it hand on a streamer.
        kwargs.setdefault("custom_generate", functools.partial(_sample, streamer=kwargs.get("streamer")))
    return type(model).generate(model, *args, **kwargs)


def _sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """One text, token by token; the same arguments and result as Transformers' own loop."""
    decoder, state = getattr(model, _ATTRIBUTE)
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    applies = (
        len(input_ids) == 1
        and not (synced_gpus or model.training or generation_config.return_dict_in_generate)
        and all(name in _KNOWN or value is None for name, value in model_kwargs.items())
        and (mask is None or bool((mask == 1).all()))
        and (positions is None or torch.equal(positions[0], torch.arange(input_ids.shape[1])))
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and state == _state(model)
    )
    if not applies:
        return type(model)._sample(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    decoder.start()
    logits = decoder.extend(input_ids[0])
    while True:
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            token = scores.argmax(-1)
        input_ids = torch.cat([input_ids, token[:, None]], -1)
        if streamer is not None:
            streamer.put(token)
        if stopping_criteria(input_ids, None).all():
            break
        logits = decoder.step(token)
    if streamer is not None:
        streamer.end()
    return input_ids
