"""`flashnorm.optimize`: the same results as ever, whatever a model is asked for."""

import copy
import io
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import flashnorm
from decoders import MODELS, OPTIONS, VOCABULARY, build, error, generate, in_float64, text
from flashnorm.cpu.kernels import native
from flashnorm.decoding.structure import choose_all_experts, find_decoder

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral with a window", "qwen3_moe, one layer dense"])
@pytest.mark.parametrize("options", OPTIONS)
def test_generate_gives_the_same_tokens(name: str, options: str) -> None:
    model = build(name)
    expected = generate(model, **OPTIONS[options])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashnorm.optimize(model)
    assert torch.equal(generate(model, **OPTIONS[options]), expected)
    assert torch.equal(generate(model, **OPTIONS[options]), expected)  # once more, over the same cache


@pytest.fixture
def runs() -> Counter[int]:
    """How often each part of the kernels has run since the test began."""
    native.runs.clear()
    return native.runs


# Where Transformers' own loop runs, with the fused layers inside; everywhere else the fused loop does, as promised.
IN_LAYERS = ("beams", "a dictionary", "four beams of a padded batch")


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral with a window", "qwen3_moe, one layer dense"])
def test_which_way_ran(name: str, options: str, runs: Counter[int]) -> None:
    model = flashnorm.optimize(build(name))
    runs.clear()
    generate(model, **OPTIONS[options])
    assert bool(runs[native.ALL]) == (options not in IN_LAYERS)
    assert bool(runs[native.AFTER_ATTENTION]) == (options in IN_LAYERS)
    assert bool(runs[native.ATTENTION_INPUTS]) == (options in IN_LAYERS)


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


# --- inside Transformers' own forward

PADDED = {
    "input_ids": torch.stack([text(30), torch.cat([torch.zeros(7, dtype=torch.long), text(23)])]),
    "attention_mask": torch.stack([torch.ones(30), (torch.arange(30) >= 7).float()]).long(),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    if dtype != torch.float32:
        choose_all_experts(model)  # with few bits, rounding may choose another expert
    seen = PADDED["attention_mask"].bool()

    def run(model: Any) -> Tensor:
        return model(**PADDED).logits[seen].double()

    def run_without_padding(model: Any) -> Tensor:
        """Each text alone, at its positions in the batch: eager attention in float64 gives NaN for a padded one, as its
        softmax is in float32."""
        texts = zip(PADDED["input_ids"], seen, strict=True)
        each = [model(ids[used][None], position_ids=used.nonzero().T).logits[0] for ids, used in texts]
        return torch.cat(each)

    with torch.inference_mode():
        reference, theirs = run_without_padding(in_float64(model)), run(model)
        ours = run(flashnorm.optimize(model))
    assert not torch.equal(ours, theirs)  # another order of sums
    if dtype == torch.float32:
        assert error(ours, reference) <= 1e-5
    else:
        # Attention, the residual stream and the head round as ever; the rest of a layer rounds less.
        assert (ours - reference).norm() <= 1.1 * (theirs - reference).norm()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral with a window", "qwen3_moe, one layer dense"])
def test_everything_that_a_forward_gives(name: str) -> None:
    model = build(name)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        wanted = {"output_hidden_states": True, "output_attentions": implementation == "eager", "use_cache": True}
        with torch.inference_mode():
            expected = copy.deepcopy(model)(**PADDED, **wanted)
            found = flashnorm.optimize(model)(**PADDED, **wanted)
        seen = PADDED["attention_mask"].bool()
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert error(ours[seen], theirs[seen]) <= 1e-5
        assert (found.attentions is None) == (implementation != "eager")
        for ours, theirs in zip(found.attentions or (), expected.attentions or (), strict=True):
            assert (ours - theirs).abs().max() <= 1e-5
        assert found.past_key_values.get_seq_length() == 30


def test_attentions_cost_their_forward_only(runs: Counter[int]) -> None:
    model: Any = flashnorm.optimize(build("llama"))
    model.set_attn_implementation("eager")
    for wanted, layers in ((True, 0), (False, 3), (True, 0)):
        runs.clear()
        with torch.inference_mode():
            model(**PADDED, output_attentions=wanted)
        assert runs[native.AFTER_ATTENTION] == layers


class Adapter(nn.Module):
    """What a library of adapters puts in the place of a linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.linear(x)


def _adapt(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj = Adapter(model.model.layers[1].self_attn.q_proj)


def _hook(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)


def _patch(model: Any) -> None:
    norm = model.model.layers[2].post_attention_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) ** 2


def _write(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj.weight = nn.Parameter(model.model.layers[0].mlp.gate_proj.weight.flip(0))


@pytest.mark.parametrize("change", [_adapt, _hook, _patch, _write])
def test_what_is_done_to_a_layer_counts(change: Callable[[Any], None]) -> None:
    expected, model = build("llama"), flashnorm.optimize(build("llama"))
    before = generate(model)
    change(expected)
    change(model)
    with torch.inference_mode():
        assert error(model(**PADDED).logits[0], expected(**PADDED).logits[0]) <= 1e-5
    assert torch.equal(generate(model), generate(expected))
    assert not torch.equal(generate(model), before)


def test_gradients_and_training() -> None:
    expected, model = build("llama"), flashnorm.optimize(build("llama"))
    for training in (False, True):
        for one in (expected, model):
            one.train(training)
            one.zero_grad()
            one(**PADDED, labels=PADDED["input_ids"]).loss.backward()
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


def test_another_dtype() -> None:
    model = build("llama")
    expected = generate(in_float64(model))
    flashnorm.optimize(model).double()
    assert torch.equal(generate(model), expected)
    assert model(**PADDED).logits.dtype == torch.float64


def test_a_model_in_a_file_is_still_one() -> None:
    model = flashnorm.optimize(build("llama"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(generate(loaded), generate(model))


def test_a_copy_has_weights_and_a_cache_of_its_own() -> None:
    model: Any = flashnorm.optimize(build("llama"))
    expected = generate(model)
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj.weight.data.mul_(-1)
    assert not torch.equal(generate(other), expected)
    assert torch.equal(generate(model), expected)


def test_weights_are_held_once() -> None:
    model: Any = build("phi3")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flashnorm.optimize(model)
    generate(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    decoder = model.generate._decoder
    read = [tensor for tensor in decoder._keep if tensor.dim() == 2]
    assert len(read) == 7 * 3 + 1
    assert all(tensor.untyped_storage().data_ptr() in own for tensor in read)


def test_two_threads_at_once() -> None:
    model = flashnorm.optimize(build("llama"))
    expected = generate(model, max_new_tokens=60)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(generate(model, max_new_tokens=60))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)


def test_an_assistant() -> None:
    model, assistant = build("llama"), build("llama", num_hidden_layers=1)
    expected = generate(model, assistant_model=assistant)
    assert torch.equal(generate(flashnorm.optimize(model), assistant_model=flashnorm.optimize(assistant)), expected)


def test_a_prompt_in_chunks() -> None:
    model = build("llama")
    expected = generate(model, prefill_chunk_size=7)
    assert torch.equal(generate(flashnorm.optimize(model), prefill_chunk_size=7), expected)


@pytest.mark.slow
def test_a_compiled_model_is_the_compilers(runs: Counter[int]) -> None:
    expected, model = build("llama"), flashnorm.optimize(build("llama"))
    runs.clear()
    with torch.inference_mode():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**PADDED).logits
        assert error(found[0], expected(**PADDED).logits[0]) <= 1e-5
    assert not runs.total()


def test_the_decoder_is_found_again_after_each_change() -> None:
    model = flashnorm.optimize(build("qwen3", torch.bfloat16))
    assert find_decoder(model).head.dtype == torch.bfloat16
    model.float()
    assert find_decoder(model).head.dtype == torch.float32
    assert generate(model).max() < VOCABULARY


def test_stopping_criteria_are_asked_when_they_can_say_something(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flashnorm.optimize(build("llama"))
    lengths: list[int] = []
    own = MaxLengthCriteria.__call__

    def counted(self: Any, ids: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        lengths.append(ids.shape[1])
        return own(self, ids, *rest, **kwargs)

    monkeypatch.setattr(MaxLengthCriteria, "__call__", counted)
    found = generate(model, max_new_tokens=24, eos_token_id=VOCABULARY + 1)
    assert found.shape[1] == 44
    assert lengths == [44]
    ends = found[0, 30].item()
    lengths.clear()
    first = found[0, 20:].tolist().index(ends)
    assert generate(model, max_new_tokens=24, eos_token_id=ends).shape[1] == 20 + first + 1
    assert lengths == [20 + first + 1]
