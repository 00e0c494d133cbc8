"""What Transformers' decoder layers and its `generate` pass on internally, and what they expect in return.

None of this is a documented interface, so each name is here, with the versions that have it. `tests/contracts` checks
the installed version for all of it, and `cpu/proof.py` runs it before a model is optimised.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

__all__ = [
    "CACHES",
    "FOR_ATTENTION",
    "INDIFFERENT_ATTRIBUTES",
    "INDIFFERENT_SETTINGS",
    "GenerationMode",  # greedy search, sampling, beams, ...: the mode that `generate` derives from its options
    "attention_function",
    "cache_argument",
    "cached",
    "empty_cache",
    "forget_unfilled_cache",
    "is_recording",
    "only_wants_gradients",
    "own_loop",
    "padding",
    "prepared_config",
    "recorded",
    "undecided",
    "update_cache",
]

# Name of a layer's argument for the cache -> whether the cache's `update` also gets the arguments that attention gets.
# The comments say which versions use the name.
CACHES: dict[str, bool] = {
    "past_key_values": False,  # up to 5.23
    "cache": True,  # since 5.24
}

# Arguments that a layer passes on to attention without reading them. Hooks handle `output_*`, see `recorded`.
FOR_ATTENTION = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
)

# Attributes of a config that do not change what the model computes, only how attention runs and what is returned.
INDIFFERENT_SETTINGS = frozenset(
    {
        *("_attn_implementation_internal", "_experts_implementation_internal", "_name_or_path", "_commit_hash"),
        *("use_cache", "return_dict", "output_hidden_states", "_output_attentions", "transformers_version"),
        *("architectures", "dtype", "id2label", "label2id", "problem_type"),
        *("flash_norm", "flashnorm_folded", "flashnorm"),  # of a folded model; the same as in `format.py`
    }
)

# Attributes of a model that do not change what it computes.
INDIFFERENT_ATTRIBUTES = frozenset({"generation_config", "name_or_path", "warnings_issued", "model_tags"})


def attention_function(attention: Any, config: Any) -> Callable[..., Any]:
    """The attention function that the config chooses; the eager function is in the file of the attention module.

    Raises:
        KeyError: Transformers does not know the configured function.
    """
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)


def cache_argument(model: Any) -> str:
    """The name of a model's argument for the cache: one of `CACHES`.

    Raises:
        LookupError: the model has none of these arguments.
    """
    parameters = inspect.signature(type(model).forward).parameters
    name = next((name for name in reversed(CACHES) if name in parameters), None)
    if name is None:
        raise LookupError(f"expected {type(model).__name__} to take one of {', '.join(CACHES)}, found none")
    return name


def empty_cache(model: Any) -> DynamicCache:
    """A cache for one forward of a model, which grows."""
    return DynamicCache(config=model.config)


def cached(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer, `[sequences, key-value heads, tokens, head size]`, of a filled cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[attr-defined]


def update_cache(name: str, cache: Any, keys: Tensor, values: Tensor, index: int, handed: Mapping[str, Any]) -> Any:
    """Put a layer's keys and values into the cache as its own code does. Returns all keys and values so far."""
    if CACHES[name]:
        return cache.update(keys, values, index, kwargs=handed)
    return cache.update(keys, values, index)


def is_recording(hook: object) -> bool:
    """Whether a hook is one of Transformers' own for `output_hidden_states` and the like; they are never removed."""
    return getattr(hook, "__module__", None) == output_capturing.__name__


def only_wants_gradients(hook: object) -> bool:
    """Whether a hook is the one of gradient checkpointing, which makes the embedding's output require gradients."""
    return getattr(hook, "__qualname__", "").endswith("enable_input_require_grads.<locals>.make_inputs_require_grads")


def recorded() -> Collection[str]:
    """The keys of what Transformers' hooks record at the moment: "hidden_states", "attentions", ..."""
    return output_capturing._active_collector.get() or ()


def prepared_config(model: Any, config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
    """The configuration that `generate` uses: the caller's options, then the model's, then Transformers' defaults.

    Args:
        model: the model whose `generate` is called.
        config, options: what the caller passes to `generate`; neither is changed.
    """
    return model._prepare_generation_config(config, **options)[0]


def forget_unfilled_cache(model: Any) -> None:
    """Make the next `generate` create a new static cache, because the fused loop has left the model's cache empty.

    Transformers 5.4 keeps the cache for the next call and reads its sizes, which an empty cache does not have.
    """
    vars(model).pop("_cache", None)


def own_loop(model: Any) -> Callable[..., Any]:
    """Transformers' own loop over single tokens, as a function whose first argument is the model."""
    return type(model)._sample


def padding(config: GenerationConfig) -> Tensor:
    """The padding token after the end of a sequence, a tensor `[]`, in a config that `generate` has prepared."""
    return config._pad_token_tensor  # type: ignore[attr-defined]


# Stopping criterion -> its attributes: a length, or token ids as a tensor.
_SETTINGS: dict[type, set[str]] = {
    MaxLengthCriteria: {"max_length", "max_position_embeddings"},
    EosTokenCriteria: {"eos_token_id"},
}


def undecided(criteria: Iterable[Any]) -> tuple[int, frozenset[int]]:
    """Up to which length, and without which tokens, stopping criteria say nothing: asking them takes 0.3 ms a token.

    Returns:
        A length and token ids: as long as all sequences are shorter and no last token is one of these, each criterion
        says that the sequence goes on, and warns of nothing. The length is 0 if a criterion is not known.
    """
    length, tokens = sys.maxsize, frozenset[int]()
    for criterion in criteria:
        if type(criterion) not in _SETTINGS or vars(criterion).keys() != _SETTINGS[type(criterion)]:
            return 0, frozenset()
        for setting in vars(criterion).values():
            if isinstance(setting, Tensor):
                tokens |= {int(token) for token in setting.flatten()}
            elif setting is not None:
                length = min(length, setting)
    return length, tokens
