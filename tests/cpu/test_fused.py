"""The fused kernels against Transformers, for every instruction set of this machine; and what they refuse."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import flashnorm
from decoders import MODELS, PROMPT, SIZES, build, error, in_float64, logits, text
from flashnorm.cpu.fused import FusedDecoder
from flashnorm.cpu.kernels import native
from flashnorm.decoding.decoder import UnsupportedError
from flashnorm.decoding.formula import read_decoder
from flashnorm.decoding.structure import choose_all_experts

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")


@pytest.fixture(autouse=True)
def _best_instruction_set() -> Iterator[None]:
    yield
    native.choose(native.instruction_sets()[-1])


def fused_logits(decoder: FusedDecoder) -> Tensor:
    """A prompt at once, then token by token."""
    parts = [decoder.extend(text()[:PROMPT], PROMPT)]
    parts += [decoder.step(token[None]) for token in text()[PROMPT:]]
    return torch.cat(parts).double()


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    if dtype != torch.float32:
        choose_all_experts(model)  # with few bits, rounding may choose another expert: see test_experts.py
    reference = logits(in_float64(model))
    theirs = error(logits(model), reference)
    decoder = read_decoder(model)
    for instruction_set in native.instruction_sets():
        native.choose(instruction_set)
        ours = error(fused_logits(FusedDecoder(decoder, threads=1)), reference)
        # float32 sums in another order; with fewer bits, deferred norms round less often than the model does.
        assert ours <= (1e-5 if dtype == torch.float32 else theirs), instruction_set


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "qwen2_moe, one layer dense"])
def test_a_folded_model(name: str) -> None:
    model = build(name)
    reference = logits(in_float64(model))
    flashnorm.fold_(model)
    assert error(fused_logits(FusedDecoder(read_decoder(model))), reference) <= 1e-5


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


def test_without_room_for_the_proof_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral", torch.bfloat16)
    needed = 6 * sum(weight.numel() for weight in model.base_model.layers[0].parameters())  # its layers are of one kind
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(UnsupportedError, match="GB of free memory for a copy of a layer of each kind"):
        read_decoder(model)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=needed))
    read_decoder(model)


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
    model.model.layers[2].self_attn = build("llama", head_dim=32).model.layers[2].self_attn  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match="layer 2: expected q to have the shape"):
        read_decoder(model)


def test_mlps_may_have_different_sizes() -> None:
    model: Any = build("llama")
    model.model.layers[2].mlp = build("llama", intermediate_size=80).model.layers[2].mlp  # type: ignore[union-attr]
    model.model.layers[1].mlp = build("llama", intermediate_size=230).model.layers[1].mlp  # type: ignore[union-attr]
    found = fused_logits(FusedDecoder(read_decoder(model)))
    assert error(found, logits(in_float64(model))) <= 1e-5


def test_weights_of_different_dtypes_are_refused() -> None:
    model: Any = build("llama")
    model.model.layers[2].mlp.half()
    with pytest.raises(UnsupportedError, match="weights of one dtype on one device"):
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


def test_a_window_of_one_position_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a window of at least 2 positions, found 1"):
        read_decoder(build("mistral with a window", sliding_window=1))


@pytest.mark.parametrize("kind", ["GPT2", "Cohere", "StableLm", "GptOss"])
def test_other_architectures_are_left_as_they_are(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES | {"hidden_size": 64, "head_dim": 16, "n_embd": 64})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="leaves .* as it is"):
        assert flashnorm.optimize(model) is model
    assert "generate" not in vars(model)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("length", [1, 2, 7, 130, 131])
def test_what_an_earlier_text_left_in_the_cache_does_not_count(dtype: torch.dtype, length: int) -> None:
    decoder = read_decoder(build("qwen3", dtype))
    for instruction_set in native.instruction_sets():
        native.choose(instruction_set)
        clean, poisoned = FusedDecoder(decoder), FusedDecoder(decoder)
        clean.extend(text(1))
        poisoned.extend(text(1))
        for one in (clean, poisoned):
            one.start()
        for tensors in poisoned._cache:
            for tensor in tensors:
                tensor.fill_(torch.nan)
        for one in (clean, poisoned):
            one.extend(text(length), length)
        for token in text(length + 3)[length:]:
            assert torch.equal(poisoned.step(token[None]), clean.step(token[None]))
