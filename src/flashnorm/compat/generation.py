"""What Transformers' decoder layers and its `generate` hand on inside, and what they expect in return.

None of it is a documented interface, so each name stands here, with the versions that have it. `tests/contracts` asks
the installed version for all of it, and `runtime/proof.py` runs it before a model is optimised.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

__all__ = [
    "CACHES",
    "FOR_ATTENTION",
    "INDIFFERENT_ATTRIBUTES",
    "INDIFFERENT_SETTINGS",
    "GenerationMode",  # greedy search, sampling, beams, ...: what `generate` makes of its options
    "attention_function",
    "attention_implementation",
    "cache_argument",
    "forget_unfilled_cache",
    "is_recording",
    "only_wants_gradients",
    "own_loop",
    "padding",
    "prepared_config",
    "recorded",
    "update_cache",
]

# What a layer calls the cache that it is handed; since which version, and whether that cache's `update` is handed what
# attention is handed, as well.
CACHES: dict[str, bool] = {
    "past_key_values": False,  # up to 5.23
    "cache": True,  # since 5.24
}

# What a layer hands on to attention, unread. The last two are kept by hooks, see `recorded`.
FOR_ATTENTION = frozenset({"position_ids", "use_cache", "output_attentions", "output_hidden_states"})

# Attributes of a config that say how attention is run and what is returned, and nothing of what the model computes.
INDIFFERENT_SETTINGS = frozenset(
    {
        *("_attn_implementation_internal", "_experts_implementation_internal", "_name_or_path", "_commit_hash"),
        *("use_cache", "return_dict", "output_hidden_states", "_output_attentions", "transformers_version"),
        *("architectures", "dtype", "id2label", "label2id", "problem_type", "flash_norm", "flashnorm"),
    }
)

# The same of a model.
INDIFFERENT_ATTRIBUTES = frozenset({"generation_config", "name_or_path", "warnings_issued", "model_tags"})


def attention_function(attention: Any, config: Any) -> Callable[..., Any]:
    """The function that an attention module calls, as configured; an eager one is written where the module is.

    Raises:
        KeyError: it is none that Transformers knows.
    """
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)


def attention_implementation(model: Any) -> str:
    """The name under which `set_attn_implementation` knows what is configured."""
    return model.config._attn_implementation


def cache_argument(model: Any) -> str:
    """Under which name a model takes a cache: one of `CACHES`.

    Raises:
        LookupError: under none of them.
    """
    parameters = inspect.signature(type(model).forward).parameters
    name = next((name for name in reversed(CACHES) if name in parameters), None)
    if name is None:
        raise LookupError(f"expected {type(model).__name__} to take one of {', '.join(CACHES)}, found none")
    return name


def update_cache(name: str, cache: Any, keys: Tensor, values: Tensor, index: int, handed: Mapping[str, Any]) -> Any:
    """Put a layer's keys and values into the cache as the layer's own code does; all keys and values so far."""
    if CACHES[name]:
        return cache.update(keys, values, index, kwargs=handed)
    return cache.update(keys, values, index)


def is_recording(hook: object) -> bool:
    """Whether a hook is one of Transformers' own, for `output_hidden_states` and the like; they stay once installed."""
    return getattr(hook, "__module__", None) == output_capturing.__name__


def only_wants_gradients(hook: object) -> bool:
    """Whether a hook is the one that checkpointing of gradients leaves on the embedding: it marks what that gives."""
    return getattr(hook, "__qualname__", "").endswith("enable_input_require_grads.<locals>.make_inputs_require_grads")


def recorded() -> Collection[str]:
    """What those hooks record just now: "hidden_states", "attentions", ..., and what belongs to these."""
    return output_capturing._active_collector.get() or ()


def prepared_config(model: Any, config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
    """The configuration that `generate` arrives at: the caller's, then the model's, then Transformers' defaults.

    Args:
        model: whose `generate` it is.
        config, options: as the caller gives them to `generate`; neither is changed.
    """
    return model._prepare_generation_config(config, **options)[0]


def forget_unfilled_cache(model: Any) -> None:
    """Let the next `generate` make a static cache of its own, when a loop has left the model's one empty.

    Transformers 5.4 keeps it for the next call, and asks it for its sizes, which it has only once it was filled.
    """
    vars(model).pop("_cache", None)


def own_loop(model: Any) -> Callable[..., Any]:
    """Transformers' loop over single tokens; it is called with the model first."""
    return type(model)._sample


def padding(config: GenerationConfig) -> Tensor:
    """The token that follows the end of a text, `[]`, in a configuration that `generate` has prepared."""
    return config._pad_token_tensor  # type: ignore[attr-defined]
