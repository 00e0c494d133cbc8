"""Options of `generate`, one by one: plain Transformers and an optimised model give the same, or the same error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)

import flashnorm
from decoders import VOCABULARY, build, text
from flashnorm.cpu.kernels import native

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")

IDS = text(20)[None]
PADDED = {
    "inputs": torch.cat([IDS, torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:, 4:]], 1)]),
    "attention_mask": torch.cat([torch.ones(1, 20), (torch.arange(20) >= 4).float()[None]]).long(),
}
SAMPLED = {"do_sample": True}
RETURNED = {"return_dict_in_generate": True}


def tokenizer() -> PreTrainedTokenizerFast:
    """Token 7 is `t7`; the last one is a word that Transformers wants for stop strings."""
    vocabulary = {f"t{i}": i for i in range(VOCABULARY - 1)} | {"abcdef": VOCABULARY - 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")


def lowered(ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor of the caller."""
    return scores - scores.roll(1, -1).abs()


def ended(ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
    """A stopping criterion of the caller: an even token after at least four."""
    return (ids[:, -1] % 2 == 0) & (ids.shape[1] > 24)


def last_token(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
    """A loop of the caller, which calls the model once."""
    return torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], 1)


# Name -> from the model to the arguments; what is used up is made anew for each call. Offloaded caches want a GPU.
OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "greedy": lambda _: {},
    "an inferred mask": lambda _: {"inputs": PADDED["inputs"], "attention_mask": None},
    "padding": lambda _: PADDED,
    "lengths": lambda _: {
        "max_new_tokens": None,
        "min_length": 30,
        "max_length": 40,
        "eos_token_id": list(range(3, 90)),
    },
    "a least length": lambda _: {"min_new_tokens": 10, "eos_token_id": list(range(3, 90))},
    "many ends": lambda _: PADDED | {"eos_token_id": list(range(3, 60))},
    "max_time": lambda _: {"max_time": 1e-9},
    "no cache": lambda _: {"use_cache": False},
    "sampling": lambda _: SAMPLED,
    "sampling from few": lambda _: SAMPLED | {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min_p": lambda _: SAMPLED | {"min_p": 0.1},
    "typical_p": lambda _: SAMPLED | {"typical_p": 0.5},
    "epsilon_cutoff": lambda _: SAMPLED | {"epsilon_cutoff": 0.01},
    "eta_cutoff": lambda _: SAMPLED | {"eta_cutoff": 0.01},
    "several samples": lambda _: PADDED | SAMPLED | {"num_return_sequences": 3},
    "beams": lambda _: {"num_beams": 3},
    "beams of padded texts": lambda _: PADDED | {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": lambda _: SAMPLED | {"num_beams": 3},
    "beams that end early": lambda _: {"num_beams": 3, "early_stopping": True, "eos_token_id": list(range(3, 60))},
    "a penalty of beams": lambda _: {"num_beams": 3, "length_penalty": -1.0, "eos_token_id": list(range(3, 60))},
    "an assistant": lambda _: {"assistant_model": build("llama", num_hidden_layers=1)},
    "a sampling assistant": lambda _: SAMPLED | {"assistant_model": build("llama", num_hidden_layers=1)},
    "an optimised assistant": lambda _: {"assistant_model": flashnorm.optimize(build("llama", num_hidden_layers=1))},
    "prompt lookup": lambda _: {"prompt_lookup_num_tokens": 3},
    "an early exit": lambda _: {"assistant_early_exit": 1},
    "a static cache": lambda _: {"cache_implementation": "static", "disable_compile": True},
    "a quantised cache": lambda _: {"cache_implementation": "quantized"},
    "a cache by name": lambda _: {"cache_implementation": "dynamic"},
    "the caller's cache": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "the caller's static cache": lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
    "chunks": lambda _: {"prefill_chunk_size": 7},
    "scores": lambda _: RETURNED | {"output_scores": True, "output_logits": True},
    "hidden states": lambda _: RETURNED | {"output_hidden_states": True},
    "attentions": lambda _: RETURNED | {"output_attentions": True},
    "scores of beams": lambda _: RETURNED | {"num_beams": 3, "output_scores": True, "output_logits": True},
    "a criterion": lambda _: {"stopping_criteria": StoppingCriteriaList([ended])},
    "stop strings": lambda _: {"stop_strings": [f"t{i}" for i in range(3, 60)], "tokenizer": tokenizer()},
    "a processor": lambda _: {"logits_processor": LogitsProcessorList([lowered])},
    "a prefix": lambda _: {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1]) ^ 1, 5, 6]},
    "bad words": lambda _: {"bad_words_ids": [[i] for i in range(3, 100)]},
    "suppressed": lambda _: {"suppress_tokens": list(range(3, 100))},
    "suppressed at first": lambda _: {"begin_suppress_tokens": list(range(3, 100))},
    "a forced end": lambda _: {"forced_eos_token_id": 2},
    "a forced start": lambda _: {"inputs": IDS[:, :1], "attention_mask": None, "forced_bos_token_id": 9},
    "a bias": lambda _: {"sequence_bias": [[[i], -20.0] for i in range(3, 100)]},
    "repetition_penalty": lambda _: {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": lambda _: {"no_repeat_ngram_size": 1},
    "an end that grows likelier": lambda _: {"exponential_decay_length_penalty": (3, 1.5)},
    "renormalised": lambda _: SAMPLED | {"top_k": 9, "renormalize_logits": True, "remove_invalid_values": True},
    "guidance": lambda _: {"guidance_scale": 1.5},
    "guidance away from": lambda _: {"guidance_scale": 1.5, "negative_prompt_ids": IDS[:, 3:9]},
    "a watermark": lambda _: {"watermarking_config": WatermarkingConfig(bias=2.5)},
    "embeddings": lambda model: {"inputs": None, "inputs_embeds": model.get_input_embeddings()(IDS)},
    "embeddings besides": lambda model: {"inputs_embeds": model.get_input_embeddings()(IDS)},
    "positions": lambda _: {"position_ids": 3 * torch.arange(20)[None]},
    "a loop of the caller": lambda _: {"custom_generate": last_token},
    "a config": lambda _: {"generation_config": GenerationConfig(max_new_tokens=9, num_beams=2, pad_token_id=0)},
    "a config and options": lambda _: {"generation_config": GenerationConfig(num_beams=2), "num_beams": 1},
}


def outcome(model: Any, name: str) -> dict[str, Any]:
    """What a call gives, by name; or its error."""
    torch.manual_seed(0)
    defaults = {"inputs": IDS, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    if name == "attentions":
        model.set_attn_implementation("eager")
    try:
        options = defaults | {"attention_mask": torch.ones_like(IDS)} | OPTIONS[name](model)
        found = model.generate(**{key: value for key, value in options.items() if value is not None})
    except Exception as error:
        return {"error": type(error)}
    if isinstance(found, Tensor):
        return {"sequences": found}
    return {key: value for key, value in found.items() if "past" not in key and "cache" not in key}


def assert_same(found: Any, expected: Any) -> None:
    """Tokens are equal, numbers up to the rounding of float32."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = tuple(found.values()), tuple(expected.values())
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    elif isinstance(expected, Tensor) and expected.is_floating_point():
        assert found.shape == expected.shape
        finite = expected.isfinite()
        assert torch.equal(found[~finite], expected[~finite])
        assert (found - expected)[finite].abs().max() <= 1e-5 * expected[finite].abs().max()
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
@pytest.mark.parametrize("kind", ["llama", "mistral with a window"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name: str, kind: str, folded: bool) -> None:
    expected = outcome(build(kind), name)
    model: Any = build(kind)
    if folded:
        flashnorm.fold_(model)
    found = outcome(flashnorm.optimize(model), name)
    if folded and name == "hidden states":  # the last one is after the final norm, whose gain is in the head now
        for one in (found, expected):
            one["hidden_states"] = tuple(step[:-1] for step in one["hidden_states"])
    assert_same(found, expected)


def test_a_text_goes_on_over_its_cache() -> None:
    found = []
    for model in (build("llama"), flashnorm.optimize(build("llama"))):
        cache, ids = DynamicCache(config=model.config), IDS
        for _ in range(3):
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
            ids = torch.cat([ids, IDS[:, :3]], 1)
        found.append((ids, cache.get_seq_length()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
