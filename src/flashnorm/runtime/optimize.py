"""`flashnorm.optimize`: a Transformers model that runs on the fused kernels.

* Its decoder layers use the kernels inside Transformers' own forward (`layers.py`), whatever is asked of them.
* `generate`, where it is one token after the other, is a loop over `FusedDecoder` with a cache of its own.
  Transformers' `generate` does the rest as always (options, logits processors, stopping criteria, streamers), and runs
  its own loop where ours does not apply: beams, assistants, caches that the caller holds, hidden states as outputs.
"""

import copy
import functools
import mmap
import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from flashnorm.runtime.fused import FusedDecoder, check_supported
from flashnorm.runtime.layers import FusedForward, Structure
from flashnorm.runtime.structure import UnsupportedError, find_decoder, read_decoder

_LOOPS = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What Transformers may hand to the loop besides, and the loop knows what it means.
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def optimize(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model run on the fused kernels, where they apply; otherwise it stays as it is, with a warning.

    A layer of each kind is first run next to the formula that the kernels implement, and must agree. Weights stay the
    model's parameters, and are moved once into memory of large pages. Folded and unfolded models are equally fast: the
    kernels apply a gain that is left while they read the activations.

    Args:
        model: in memory, on the CPU, with float32, bfloat16 or float16 weights. It is put into evaluation mode.

    Returns:
        The same model.
    """
    if reason := optimize_if_supported(model):
        warnings.warn(f"flashnorm.optimize leaves {type(model).__name__} as it is: {reason}", stacklevel=2)
    return model


def optimize_if_supported(model: PreTrainedModel) -> str | None:
    """`optimize` without a warning: why the model is left as it is, or None if it is not."""
    model.eval()
    try:
        decoder = read_decoder(model)
        check_supported(decoder)
    except UnsupportedError as reason:
        return str(reason)
    _move_to_large_pages(model)
    layers: Any = model.base_model.layers
    for index, layer in enumerate(layers):
        vars(layer)["forward"] = FusedForward(layer, model.config, index, decoder.settings)
    vars(model)["generate"] = Generate(model)
    return None


def _move_to_large_pages(model: PreTrainedModel) -> None:
    """Reading all weights once a token is faster by an eighth where one page of memory holds 2 MB of them.

    All of them move, as each may be a view of a mapped file, which would stay in memory for it.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return
    weights = [weight for weight in model.parameters() if not weight.is_inference()]
    sizes = [-(-weight.numel() * weight.element_size() // 64) * 64 for weight in weights]
    memory = mmap.mmap(-1, max(sum(sizes), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    at = 0
    for weight, size in zip(weights, sizes, strict=True):
        place = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=at).view(weight.shape)
        weight.data = place.copy_(weight.data)
        at += size


class Generate:
    """A model's `generate`, with our loop where it is one over single tokens."""

    def __init__(self, model: PreTrainedModel):
        self._model: Any = model
        self._structure = Structure(model)
        self._decoder: FusedDecoder | None = None
        self._busy = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has a cache of its own."""
        return vars(self) | {"_decoder": None, "_busy": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _busy=threading.Lock())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same arguments and result as Transformers' `generate`."""
        model = self._model
        if len(args) > 1 or any(kwargs.get(name) is not None for name in ("tokenizer", "past_key_values")):
            # Transformers does not hand the tokenizer for stop strings on to a custom loop;
            # and the cache of a caller is to be filled.
            return type(model).generate(model, *args, **kwargs)
        config = copy.deepcopy(kwargs.get("generation_config") or model.generation_config)
        config.update(**kwargs)
        if config.get_generation_mode(kwargs.get("assistant_model")) in _LOOPS:
            # Nor does it hand on a streamer.
            kwargs.setdefault("custom_generate", functools.partial(self._sample, streamer=kwargs.get("streamer")))
        return type(model).generate(model, *args, **kwargs)

    def _sample(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Token by token; the same arguments and result as Transformers' own loop."""
        lengths = _lengths(input_ids, **model_kwargs)
        ours = not (synced_gpus or generation_config.return_dict_in_generate)
        if lengths is not None and ours and self._structure.holds() and self._busy.acquire(blocking=False):
            try:
                if (decoder := self._read()) is not None:
                    return _loop(
                        decoder, input_ids, lengths, logits_processor, stopping_criteria, generation_config, streamer
                    )
            finally:
                self._busy.release()
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

    def _read(self) -> FusedDecoder | None:
        """The decoder with the weights that the model has now; None if they are elsewhere or of another kind."""
        try:
            found = find_decoder(self._model)
            check_supported(found)
        except UnsupportedError:
            return None
        if self._decoder is None:
            self._decoder = FusedDecoder(found)
        else:
            self._decoder.read(found)
        return self._decoder


def _lengths(
    input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **others: Any
) -> list[int] | None:
    """Tokens of each text without the padding on its left; None if there is anything else to be known about them."""
    if any(name not in _KNOWN and value is not None for name, value in others.items()) or input_ids.shape[1] == 0:
        return None
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    mask = mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        return None
    if position_ids is not None:
        expected = mask.long().cumsum(-1) - 1
        if position_ids.shape[-1] != expected.shape[-1] or not bool((~mask | (position_ids == expected)).all()):
            return None
    return mask.sum(-1).tolist()


def _loop(
    decoder: FusedDecoder,
    input_ids: Tensor,
    lengths: list[int],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
) -> Tensor:
    """What Transformers' loop does, with the decoder's logits."""
    decoder.start(len(lengths))
    logits = torch.cat(
        [decoder.extend(ids[-n:], text=i) for i, (ids, n) in enumerate(zip(input_ids, lengths, strict=True))]
    )
    may_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    running = torch.ones(len(lengths), dtype=torch.bool)
    while True:
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if may_end:
            tokens = torch.where(running, tokens, generation_config._pad_token_tensor)
        input_ids = torch.cat([input_ids, tokens[:, None]], -1)
        if streamer is not None:
            streamer.put(tokens)
        running &= ~stopping_criteria(input_ids, scores)
        if not running.any():
            break
        logits = decoder.step(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids
