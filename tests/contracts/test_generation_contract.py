"""What the fused runtime asks of Transformers' layers, caches, attention and `generate` (`compat/generation.py`)."""

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from decoders import MODELS, build, text
from flashnorm.compat import generation

VERSION = f"transformers {transformers.__version__}"
IDS = text(9)[None]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_layer_is_handed_is_known(name: str) -> None:
    """One positional argument, and names that the fused layer knows: else the layer's own code runs."""
    model: Any = build(name)
    handed: list[tuple[int, set[str]]] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: handed.append((len(args), set(kwargs))), with_kwargs=True
    )
    with torch.no_grad():
        model(IDS)
        model(IDS, use_cache=False, output_hidden_states=True)
        for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
            model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, **options)
    known = {"attention_mask", "position_embeddings", *generation.FOR_ATTENTION, *generation.CACHES}
    for count, names in handed:
        assert count == 1, f"{VERSION} hands a layer of {name} {count} positional arguments; one is known"
        assert names <= known, f"{VERSION} hands a layer of {name} {names - known}; fused layers do not know these"


@pytest.mark.parametrize("name", MODELS)
def test_what_attention_is_handed_is_what_the_fused_layer_hands_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build(name)
    handed: list[set[str]] = []
    configured = model.config._attn_implementation
    own = generation.attention_function(model.model.layers[0].self_attn, model.config)

    def attention(*args: Any, **kwargs: Any) -> Any:
        handed.append({key for key, value in kwargs.items() if value is not None})
        return own(*args, **kwargs)

    monkeypatch.setitem(generation.ALL_ATTENTION_FUNCTIONS._global_mapping, configured, attention)
    with torch.no_grad():
        model(IDS, output_hidden_states=True)
    known = {"dropout", "scaling", "sliding_window", "softcap", *generation.FOR_ATTENTION}
    assert handed
    for names in handed:
        assert names <= known, f"{VERSION} hands attention {names - known}; the fused layer does not"


def test_a_model_takes_a_cache_by_a_known_name() -> None:
    model: Any = build("llama")
    name = generation.cache_argument(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, **{name: cache})
    assert cache.get_seq_length() == 9, f"{VERSION} takes a cache as {name} and does not fill it"
    parameters = inspect.signature(type(model.model.layers[0]).forward).parameters
    assert name in parameters, f"{VERSION} calls the cache {name} in a model, and otherwise in its layers"


def test_the_keys_and_values_of_a_filled_cache() -> None:
    model: Any = build("llama")
    cache = generation.empty_cache(model)
    with torch.no_grad():
        model(IDS, **{generation.cache_argument(model): cache})
    found = generation.cached(cache)
    assert [part.shape for pair in found for part in pair] == [(1, 2, 9, 16)] * 6, f"{VERSION} has other caches"


def test_a_cache_is_handed_what_the_attention_of_this_version_hands_it() -> None:
    """The layer's own attention is asked what it hands to `update`."""

    class Spy(DynamicCache):
        calls: list[tuple[int, set[str]]]

        def update(self, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((len(args), set(kwargs)))
            return super().update(*args, **kwargs)

    model: Any = build("llama")
    name, cache = generation.cache_argument(model), Spy(config=model.config)
    cache.calls = []
    with torch.no_grad():
        model(IDS, **{name: cache})
        keys = torch.zeros(1, 2, 1, 16)
        generation.update_cache(name, cache, keys, keys, 0, {})
    assert cache.calls[-1] == cache.calls[0], f"{VERSION} hands a cache {cache.calls[0]}, we hand it {cache.calls[-1]}"


def test_the_configuration_is_the_one_that_generate_arrives_at() -> None:
    model: Any = build("llama")
    model.generation_config.num_beams = 3
    given = GenerationConfig(max_new_tokens=3)
    before = copy.deepcopy(given).to_dict()
    prepared = generation.prepared_config(model, given, {"temperature": 0.5})
    assert given.to_dict() == before, f"{VERSION} changes the caller's config while it prepares it"
    assert (prepared.num_beams, prepared.max_new_tokens, prepared.temperature) == (3, 3, 0.5)
    assert prepared.get_generation_mode() == GenerationMode.BEAM_SEARCH


def test_a_loop_is_handed_what_ours_asks_for() -> None:
    model: Any = build("llama")
    handed: dict[str, Any] = {}

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        handed.update(kwargs)
        return input_ids

    model.generate(IDS, custom_generate=loop, max_new_tokens=2, pad_token_id=0)
    for name in ("logits_processor", "stopping_criteria", "generation_config", "attention_mask"):
        assert name in handed, f"{VERSION} hands a loop no {name}"
    assert int(generation.padding(handed["generation_config"])) == 0
    parameters = list(inspect.signature(generation.own_loop(model)).parameters)
    expected = ["self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus"]
    assert parameters[:6] == expected, f"{VERSION}: the arguments of its own loop are {parameters}"
    assert parameters[6:] == ["streamer", "model_kwargs"], f"{VERSION}: its own loop takes {parameters[6:]} besides"


def test_criteria_say_nothing_where_they_are_not_asked() -> None:
    """And all that `generate` makes of a length and of end tokens is known."""
    model: Any = build("llama")
    handed: dict[str, Any] = {}

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        handed.update(kwargs)
        return input_ids

    model.generate(IDS, custom_generate=loop, max_new_tokens=3, eos_token_id=[7, 9], pad_token_id=0)
    criteria = handed["stopping_criteria"]
    length, ends = generation.undecided(criteria)
    assert (length, ends) == (IDS.shape[1] + 3, {7, 9}), f"{VERSION}: {criteria}"
    for size in range(1, length + 1):
        for token in range(12):
            ids = torch.full((1, size), 5)
            ids[:, -1] = token
            assert bool(criteria(ids, None)) == (size >= length or token in ends)
    assert generation.undecided([*criteria, lambda ids, scores: False])[0] == 0


def test_recording_hooks_are_told_from_others() -> None:
    model: Any = build("llama")
    with torch.no_grad():
        model(IDS, output_hidden_states=True)
    hooks = list(model.model.layers[0]._forward_hooks.values())
    assert hooks, f"{VERSION} records hidden states without hooks"
    assert all(map(generation.is_recording, hooks))
    assert not generation.is_recording(print)
    seen: list[set[str]] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(set(generation.recorded())))
    with torch.no_grad():
        model(IDS, output_hidden_states=True)
        model(IDS)
    assert "hidden_states" in seen[0], f"{VERSION} does not tell what is recorded"
    assert seen[1] == set()


def test_attention_is_what_is_configured() -> None:
    model: Any = build("llama")
    attention = model.model.layers[0].self_attn
    sdpa = generation.attention_function(attention, model.config)
    model.set_attn_implementation("eager")
    assert generation.attention_function(attention, model.config) is not sdpa


def test_the_hook_that_wants_gradients_is_known() -> None:
    model: Any = build("llama")
    model.enable_input_require_grads()
    hooks = list(model.get_input_embeddings()._forward_hooks.values())
    assert hooks
    assert all(map(generation.only_wants_gradients, hooks)), f"{VERSION}: {hooks} is unknown"
