"""The fused kernels against Transformers, for every instruction set of this machine; and `optimize`."""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import flashnorm
from flashnorm.runtime.fused import FusedDecoder
from flashnorm.runtime.kernels import native
from flashnorm.runtime.structure import UnsupportedError, read_decoder

VOCABULARY, PROMPT, TEXT = 200, 130, 140  # longer than a span of attention, and no multiple of anything

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 100,  # no multiple of a block
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama with tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral with a window": ("Mistral", {"sliding_window": 16}),
    "phi3": ("Phi3", {}),
    "granite": (
        "Granite",
        {
            "residual_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3, every other layer rotated": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
}

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")


@pytest.fixture(autouse=True)
def _best_instruction_set() -> Iterator[None]:
    yield
    native.choose(native.instruction_sets()[-1])


def build(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    kind, besides = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | besides | more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.7 + 0.5 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.to(dtype)


def text(length: int = TEXT) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=text()[None]).logits[0].double()


def fused_logits(decoder: FusedDecoder) -> Tensor:
    """A prompt at once, then token by token."""
    parts = [decoder.extend(text()[:PROMPT], PROMPT)]
    parts += [decoder.step(token[None]) for token in text()[PROMPT:]]
    return torch.cat(parts).double()


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    oracle = logits(copy.deepcopy(model).double())
    theirs = error(logits(model), oracle)
    decoder = read_decoder(model)
    for instruction_set in native.instruction_sets():
        native.choose(instruction_set)
        ours = error(fused_logits(FusedDecoder(decoder, threads=1)), oracle)
        # float32 sums in another order; with fewer bits, deferred norms round less often than the model does.
        assert ours <= (1e-5 if dtype == torch.float32 else theirs), instruction_set


def test_a_folded_model() -> None:
    model = build("qwen3")
    oracle = logits(copy.deepcopy(model).double())
    flashnorm.fold_(model)
    assert error(fused_logits(FusedDecoder(read_decoder(model))), oracle) <= 1e-5


def test_a_long_text_grows_the_cache_and_splits_it_among_threads() -> None:
    model = build("llama", max_position_embeddings=4096)
    ids = text(1500)
    with torch.inference_mode():
        expected = model(input_ids=ids[None], logits_to_keep=4).logits[0].double()
    decoder = FusedDecoder(read_decoder(model), threads=2)
    decoder.extend(ids[:1400])
    found = torch.cat([decoder.extend(ids[1400:-2], 2), decoder.step(ids[-2:-1]), decoder.step(ids[-1:])])
    assert error(found, expected) <= 1e-5
    decoder.truncate(1400)
    assert torch.equal(decoder.extend(ids[1400:-2], 2), found[:2])


# --- what the kernels do not compute is refused


class Shifted(nn.Module):
    """A layer that adds something of its own."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer, self.self_attn, self.mlp = layer, layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(x, **kwargs) + 0.01 * x


def test_a_layer_that_computes_something_else_is_refused() -> None:
    model: Any = build("llama")
    model.model.layers[1] = Shifted(model.model.layers[1])
    with pytest.raises(UnsupportedError, match="layer 1 computes something else"):
        read_decoder(model)


def test_a_head_that_computes_something_else_is_refused() -> None:
    model: Any = build("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x).tanh()
    with pytest.raises(UnsupportedError, match="what surrounds the layers"):
        read_decoder(model)


def test_layers_of_different_sizes_are_refused() -> None:
    model: Any = build("llama")
    model.model.layers[2].mlp = build("llama", intermediate_size=80).model.layers[2].mlp  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match="gate of layer 2 to have the shape"):
        read_decoder(model)


def test_weights_of_different_dtypes_are_refused() -> None:
    model: Any = build("llama")
    model.model.layers[2].mlp.half()
    with pytest.raises(UnsupportedError, match="weights of one dtype on the CPU"):
        read_decoder(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length_of_the_text_are_refused(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    model = build("llama", rope_parameters=rope, max_position_embeddings=64)
    with pytest.raises(UnsupportedError, match="rotation of a position"):
        read_decoder(model)


def test_a_window_that_the_model_does_not_use_is_refused() -> None:
    model = build("llama")
    model.config.sliding_window = 16  # nothing reads it
    with pytest.raises(UnsupportedError, match="another mask"):
        read_decoder(model)


@pytest.mark.parametrize("kind", ["Gemma2", "Olmo2", "Mixtral", "GPT2", "Cohere", "StableLm", "GptOss"])
def test_other_architectures_are_left_as_they_are(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES | {"hidden_size": 64, "head_dim": 16, "n_embd": 64})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="leaves .* as it is"):
        assert flashnorm.optimize(model) is model
    assert "generate" not in vars(model)


# --- generate


def generate(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    ids = options.pop("ids", text(20)[None])
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    found = model.generate(ids, **options)
    return found if isinstance(found, Tensor) else found.sequences


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "a penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "an early end": {"eos_token_id": list(range(3, 60))},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "a dictionary": {"return_dict_in_generate": True, "output_hidden_states": True},
    "a static cache": {"cache_implementation": "static"},
    "two texts, one padded": {
        "ids": torch.stack([text(20), torch.cat([torch.zeros(4, dtype=torch.long), text(16)])]),
        "attention_mask": torch.stack([torch.ones(20), (torch.arange(20) >= 4).float()]).long(),
    },
}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral with a window"])
@pytest.mark.parametrize("options", OPTIONS)
def test_generate_gives_the_same_tokens(name: str, options: str) -> None:
    model = build(name)
    expected = generate(model, **OPTIONS[options])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashnorm.optimize(model)
    assert torch.equal(generate(model, **OPTIONS[options]), expected)
    assert torch.equal(generate(model, **OPTIONS[options]), expected)  # once more, over the same cache


def test_the_kernels_are_what_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = flashnorm.optimize(build("llama"))
    layer = type(model.model.layers[0])
    forward = layer.forward
    called: list[str] = []
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: called.append("layer") or forward(*args, **kwargs))
    assert generate(model).shape == (1, 44)
    assert not called
    generate(model, num_beams=2)
    assert called


def test_hooks_are_called() -> None:
    model: Any = flashnorm.optimize(build("llama"))
    expected = generate(model)
    called: list[str] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: called.append("layer"))
    assert torch.equal(generate(model), expected)
    assert len(called) == 24


def test_a_cache_of_the_caller_is_filled() -> None:
    model = flashnorm.optimize(build("llama"))
    cache = DynamicCache(config=model.config)
    generate(model, past_key_values=cache)
    assert cache.get_seq_length() == 43


def test_positions_of_the_caller_count() -> None:
    model = build("llama")
    positions = 3 * torch.arange(20)[None]
    expected = generate(model, position_ids=positions)
    assert not torch.equal(expected, generate(model))
    assert torch.equal(generate(flashnorm.optimize(model), position_ids=positions), expected)


def test_a_config_as_a_second_argument() -> None:
    model = build("llama")
    config = GenerationConfig(max_new_tokens=9, num_beams=3, do_sample=False, pad_token_id=0)
    expected = model.generate(text(20)[None], config)
    assert torch.equal(flashnorm.optimize(model).generate(text(20)[None], config), expected)


class Streamed(BaseStreamer):
    """What was streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed() -> None:
    streamed = Streamed()
    found = generate(flashnorm.optimize(build("llama")), streamer=streamed)
    assert (streamed.tokens, streamed.ended) == (found[0].tolist(), True)


def test_a_config_as_an_argument() -> None:
    model = build("llama")
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model.generate(text(20)[None], generation_config=config)
    assert torch.equal(flashnorm.optimize(model).generate(text(20)[None], generation_config=config), expected)


@pytest.mark.parametrize("write", [lambda weight: weight.detach().mul_(-1), lambda weight: weight.data.mul_(-1)])
def test_weights_that_were_changed_are_not_generated_with(write: Callable[[Tensor], Tensor]) -> None:
    model: Any = flashnorm.optimize(build("llama"))
    before = generate(model)
    write(model.model.layers[0].mlp.down_proj.weight)
    changed = generate(model)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, generate(flashnorm.optimize(model)))


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = build("llama")
        expected = generate(model)
        assert torch.equal(generate(flashnorm.optimize(model)), expected)


def test_a_copy_of_a_model_generates_by_itself() -> None:
    model = flashnorm.optimize(build("llama"))
    assert torch.equal(generate(copy.deepcopy(model)), generate(model))


def test_a_model_saves_what_it_would_have_saved(tmp_path: Path) -> None:
    model = build("llama")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flashnorm.optimize(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
