"""A model's `generate` with a fused loop, for greedy decoding and sampling one token at a time.

* Transformers' `generate` still does everything around the loop: options, logits processors, stopping criteria,
  streamers.
* The arguments of `generate`, and the options that Transformers makes of them, decide whether the fused loop runs. If
  anything in them is unknown, Transformers' own loop runs, and a remark says so. Its layers are fused all the same
  (`cpu/layers.py`).
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from flashnorm.compat import generation
from flashnorm.decoding.decoder import Decoder, UnsupportedError
from flashnorm.decoding.guard import Guard, Substitute, remark
from flashnorm.decoding.structure import find_decoder

_ELSEWHERE = "generate runs Transformers' own loop"
_LOOPS = (generation.GenerationMode.GREEDY_SEARCH, generation.GenerationMode.SAMPLE)

# Arguments of `generate` that Transformers handles before and around the loop.
_AROUND = frozenset(
    {
        *("inputs", "input_ids", "attention_mask", "generation_config", "logits_processor", "stopping_criteria"),
        *("prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask", "streamer"),
    }
)

# Options that Transformers handles before and around the loop, or that only its other modes read.
_OPTIONS_AROUND = frozenset(
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "do_sample"),
        *(
            "num_beams",
            "num_beam_groups",
            "num_return_sequences",
            "use_cache",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
        ),
        *("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty"),
        *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
        *("renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "guidance_scale"),
        *("watermarking_config", "token_healing", "pad_token_id", "bos_token_id", "eos_token_id", "low_memory"),
        *("decoder_start_token_id", "transformers_version", "diversity_penalty", "max_cache_len", "cache_config"),
        *("compile_config", "disable_compile", "penalty_alpha", "dola_layers", "constraints", "force_words_ids"),
        *(
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
            "speculation_type",
        ),
        *("assistant_lookbehind", "target_lookbehind", "assistant_early_exit", "assistant_ensemble_weight"),
        *("max_matching_ngram_size", "continuous_batching_config", "output_scores", "output_logits"),
        "cache_implementation",
    }
)

# Option that the fused loop does not have -> what it asks for, in words.
_OPTIONS_ELSEWHERE = {
    "return_dict_in_generate": "a dictionary is wanted",
    "output_attentions": "attentions are wanted",
    "output_hidden_states": "hidden states are wanted",
    "prefill_chunk_size": "the prompt is to be run in chunks",
    "stop_strings": "stop strings need the tokenizer",
    "is_assistant": "it assists another model",
    "use_mtp": "it drafts for itself",
}

# The caches in which Transformers keeps exact keys and values in memory (None is its default).
_EXACT_CACHES = (None, "dynamic", "dynamic_full", "static", "sliding_window", "hybrid", "hybrid_chunked")


class Steps(Protocol):
    """A decoder on the kernels, and the cache of its sequences."""

    def fits(self, decoder: Decoder) -> bool:
        """Whether `read` can replace the decoder by this one."""
        ...

    def read(self, decoder: Decoder) -> None:
        """Use the weights of this decoder from now on."""
        ...

    def start(self, sequences: int = 1) -> None:
        """Forget all sequences and begin new ones."""
        ...

    def extend(self, ids: Tensor, rows: int = 1, sequence: int = 0) -> Tensor:
        """Run more tokens `[tokens]` of one sequence; returns the logits of the last `rows`, in float32."""
        ...

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token of every sequence: `[sequences]` -> logits `[sequences, vocabulary]`, float32."""
        ...


@dataclass(frozen=True)
class Kernels:
    """The kernels of one kind of device, as the loop needs them; functions of a module, so that models can be pickled.

    Attributes:
        check: raises `UnsupportedError` if there are no kernels for a decoder.
        start: a model and its decoder -> the decoder on the kernels.
        sequences: how many sequences they run at a time; None: any number.
    """

    check: Callable[[Decoder], None]
    start: Callable[[PreTrainedModel, Decoder], Steps]
    sequences: int | None = None


class Generate(Substitute):
    """The replacement of a model's `generate`.

    Args:
        model: the model that was proven.
        kernels: those that it runs on.
        refusal: why Transformers' own loop must always run; None if the fused loop may run.
    """

    __name__ = "generate"

    def __init__(self, model: PreTrainedModel, kernels: Kernels, refusal: str | None = None):
        self._model: Any = model
        self._kernels = kernels
        self._refusal = refusal
        self._guard = Guard(model, calls_root=False, config=model.config)
        self._decoder: Steps | None = None
        self._busy = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """The state without the cache, so that a copy of the model makes its own."""
        return vars(self) | {"_decoder": None, "_busy": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _busy=threading.Lock())

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._own.__doc__

    @property
    def _own(self) -> Any:
        """Transformers' own `generate`, bound to the model."""
        return types.MethodType(type(self._model).generate, self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same arguments and result as Transformers' `generate`."""
        signature = inspect.signature(type(self._model).generate)
        try:
            bound = signature.bind(self._model, *args, **kwargs)
        except TypeError:
            return self._own(*args, **kwargs)  # raises its own error
        given = _by_name(bound)
        reason = self._refusal or self._guard.change() or _reason_against(self._model, given)
        if reason is not None:
            remark(_ELSEWHERE, reason)
            return self._own(*args, **kwargs)
        # Transformers does not pass the streamer to a custom loop, so it is bound here.
        bound.arguments["custom_generate"] = functools.partial(self._sample, streamer=given.get("streamer"))
        return type(self._model).generate(*bound.args, **bound.kwargs)

    def problem(self) -> str | None:
        """Why Transformers' own loop would run whatever the arguments are; None if the fused loop can run."""
        if (reason := self._refusal or self._guard.change()) is not None:
            return reason
        found = self._find()
        return found if isinstance(found, str) else None

    def _sample(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The loop over tokens, with the arguments and the result of Transformers' own loop."""
        reason, lengths = None, None
        if synced_gpus:
            reason = "it is synchronised with other processes"
        elif generation_config.get_generation_mode() not in _LOOPS:
            raise RuntimeError(f"expected a loop over single tokens, found {generation_config.get_generation_mode()}")
        elif isinstance(lengths := _lengths(input_ids, model_kwargs, model.device), str):
            reason = lengths
        elif len(lengths) > (self._kernels.sequences or len(lengths)):
            reason = f"there are {len(lengths)} sequences, and the kernels run {self._kernels.sequences} at a time"
        elif not self._busy.acquire(blocking=False):
            reason = "another thread generates with the same model"
        else:
            try:
                if isinstance(found := self._find(), Decoder):
                    generation.forget_unfilled_cache(model)
                    decoder = self._read(found)
                    return _loop(
                        decoder, input_ids, lengths, logits_processor, stopping_criteria, generation_config, streamer
                    )
                reason = found
            finally:
                self._busy.release()
        remark(_ELSEWHERE, reason)
        return generation.own_loop(model)(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def _find(self) -> Decoder | str:
        """The decoder with the model's current weights, or the reason why they cannot be used."""
        try:
            found = find_decoder(self._model)
            self._kernels.check(found)
        except UnsupportedError as error:
            return str(error)
        return found

    def _read(self, found: Decoder) -> Steps:
        if self._decoder is None or not self._decoder.fits(found):
            self._decoder = self._kernels.start(self._model, found)
        else:
            self._decoder.read(found)
        return self._decoder


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a method's call by name, without `self` and those that are None."""
    given: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        is_rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if is_rest else {name: value}
    return {name: value for name, value in given.items() if value is not None}


def _reason_against(model: Any, given: Mapping[str, Any]) -> str | None:
    """Why the fused loop does not support these arguments of `generate`; None if it does."""
    options = {name: value for name, value in given.items() if name in vars(GenerationConfig())}
    unknown = sorted(given.keys() - options.keys() - _AROUND)
    if unknown and (unknown != ["synced_gpus"] or given["synced_gpus"]):
        return f"it was called with {', '.join(unknown)}"
    try:
        config = generation.prepared_config(model, given.get("generation_config"), options)
    except Exception as error:  # Transformers' own loop then raises its own error
        return f"its options cannot be read ({error})"
    if (mode := config.get_generation_mode()) not in _LOOPS:
        return f"the mode is {mode.value}"
    if config.cache_implementation not in _EXACT_CACHES:
        return f"the cache is {config.cache_implementation}"
    for name, value in vars(config).items():
        if name.startswith("_") or name in _OPTIONS_AROUND or value is None or value is False:
            continue
        return _OPTIONS_ELSEWHERE.get(name, f"the option {name} is set")
    return None


def _lengths(input_ids: Tensor, handed: Mapping[str, Any], device: torch.device) -> list[int] | str:
    """The length of each sequence without its padding on the left, or why the fused loop cannot start with them."""
    if "attention_mask" not in handed:
        return "this version of Transformers hands no attention_mask on"
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.device != device:
        return f"there are no tokens to start with on the model's device, {device}"
    mask = torch.ones_like(input_ids) if handed["attention_mask"] is None else handed["attention_mask"]
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return "the attention mask is not one flag for each token"
    mask = mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        return "tokens are masked elsewhere than on the left"
    return mask.sum(-1).tolist()


@torch.no_grad()
def _loop(
    decoder: Steps,
    input_ids: Tensor,
    lengths: list[int],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
) -> Tensor:
    """The fused loop: the steps of Transformers' loop, with the decoder's logits."""
    decoder.start(len(lengths))
    logits = torch.cat(
        [decoder.extend(ids[-n:], sequence=i) for i, (ids, n) in enumerate(zip(input_ids, lengths, strict=True))]
    )
    may_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    length, ends = generation.undecided(stopping_criteria)
    running = torch.ones(len(lengths), dtype=torch.bool, device=input_ids.device)
    while True:
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if may_end:
            tokens = torch.where(running, tokens, generation.padding(generation_config))
        input_ids = torch.cat([input_ids, tokens[:, None]], -1)
        if streamer is not None:
            streamer.put(tokens)
        if input_ids.shape[1] >= length or not ends.isdisjoint(tokens.tolist()):
            running &= ~stopping_criteria(input_ids, None)
            if not running.any():
                break
        logits = decoder.step(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids
