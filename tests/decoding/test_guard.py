"""What was proven still holds when it is used: whatever is done to a model, it computes what a plain copy computes."""

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

import flashnorm
from decoders import build, error, generate, text
from flashnorm.compat import generation
from flashnorm.cpu import ops
from flashnorm.cpu.fused import FusedDecoder
from flashnorm.cpu.kernels import native
from flashnorm.cpu.optimize import install, optimize_if_supported
from flashnorm.decoding import guard
from flashnorm.decoding.proof import small_copy

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")

IDS = text(20)[None]


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What was logged in this test, as if nothing had been before."""
    monkeypatch.setattr(guard, "_said", set())
    caplog.set_level(logging.WARNING, "flashnorm")
    return caplog


def pair(name: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A plain model and an optimised one."""
    return build(name, dtype), flashnorm.optimize(build(name, dtype))


def assert_same(plain: Any, model: Any, **options: Any) -> None:
    """Both generate the same, and a forward gives the same."""
    assert torch.equal(generate(model, **options), generate(plain, **options))
    with torch.no_grad():
        assert error(model(IDS).logits, plain(IDS).logits) <= 1e-5


# --- arguments of a layer


def with_one_more(layer: Any, name: str) -> None:
    """Hand a layer one more argument by name, as a newer Transformers may."""
    forward = vars(layer)["forward"]
    vars(layer)["forward"] = lambda *args, **kwargs: forward(*args, **kwargs, **{name: torch.ones(1)})


def test_a_keyword_that_is_not_known_runs_the_layers_own_code(said: pytest.LogCaptureFixture) -> None:
    plain, model = pair()
    for layer in model.model.layers:
        with_one_more(layer, "cache_plan")
    native.runs.clear()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert not native.runs.total()
    (record,) = said.records  # once, not for each layer
    assert "cache_plan" in record.getMessage()
    assert record.name == "flashnorm"


def test_the_caches_other_name_is_no_name_that_is_swallowed(said: pytest.LogCaptureFixture) -> None:
    _, model = pair()
    layer: Any = model.model.layers[0]
    x, tables = torch.randn(1, 3, 64), model.model.rotary_emb(torch.zeros(1, 3, 64), torch.arange(3)[None])
    with torch.no_grad():
        expected = layer(x, position_embeddings=tables)
        native.runs.clear()
        for argument in ("past_key_value", "kv_cache"):
            assert error(layer(x, position_embeddings=tables, **{argument: object()}), expected) <= 1e-5
    assert not native.runs.total()
    assert len(said.records) == 2


def test_more_positional_arguments_run_the_layers_own_code() -> None:
    _, model = pair()
    layer: Any = model.model.layers[0]
    x, tables = torch.randn(1, 3, 64), model.model.rotary_emb(torch.zeros(1, 3, 64), torch.arange(3)[None])
    with torch.no_grad():
        expected = layer(x, position_embeddings=tables)
        native.runs.clear()
        assert error(layer(x, None, position_embeddings=tables), expected) <= 1e-5
    assert not native.runs.total()


def test_rotary_tables_of_another_kind_run_the_layers_own_code() -> None:
    plain, model = pair()
    x, tables = torch.randn(1, 3, 64), tuple(torch.randn(1, 3, 16) for _ in range(2))
    with torch.no_grad():
        expected = plain.model.layers[0](x, position_embeddings=tables)
        native.runs.clear()
        assert torch.equal(model.model.layers[0](x, position_embeddings=tables), expected)
    assert not native.runs.total()


# --- `generate`


def test_its_signature_is_transformers_own() -> None:
    plain, model = pair()
    assert inspect.signature(model.generate) == inspect.signature(plain.generate)
    assert model.generate.__doc__ == plain.generate.__doc__
    assert model.generate.__name__ == "generate"


def test_beams_that_the_models_own_config_asks_for() -> None:
    plain, model = pair()
    for one in (plain, model):
        one.generation_config.num_beams = 4
        one.generation_config.num_return_sequences = 4
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    found, expected = (one.generate(IDS, generation_config=config) for one in (model, plain))
    assert expected.shape == (4, 23)
    assert torch.equal(found, expected)


def test_an_option_that_is_not_known_is_transformers_affair(said: pytest.LogCaptureFixture) -> None:
    plain, model = pair()
    model.generation_config.new_in_some_version = 3
    native.runs.clear()
    assert torch.equal(generate(model), generate(plain))
    assert not native.runs[native.ALL]
    assert "new_in_some_version" in said.text


def test_why_the_loop_is_not_used_is_said_once(said: pytest.LogCaptureFixture) -> None:
    _, model = pair()
    for _ in range(3):
        generate(model, num_beams=2)
    (record,) = said.records
    assert "beam_search" in record.getMessage()


# --- what is done to a model


def _appended(model: Any) -> None:
    layer = copy.deepcopy(build("llama").model.layers[1])
    layer.self_attn.layer_idx = 3
    model.model.layers.append(layer)
    model.config.num_hidden_layers = 4


def _fewer(model: Any) -> None:
    model.config.num_hidden_layers = 2


def _eps(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def _scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.01


def _rotary(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _other_rotary(model: Any) -> None:
    rotary = model.model.rotary_emb

    class Interleaved(nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
            return tuple(table.roll(1, -1) for table in rotary(x, position_ids))

    model.model.rotary_emb = Interleaved()


def _class_forward(model: Any) -> None:
    kind = type(model.model.layers[0].mlp)
    model.model.layers[0].mlp.__class__ = type("Other", (kind,), {"forward": lambda self, x: -kind.forward(self, x)})


def _own_forward(model: Any) -> None:
    forward = type(model).forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(model, *args, **kwargs)
        output.logits = -output.logits
        return output

    model.forward = functools.wraps(functools.partial(forward, model))(doubled)


def _prepares(model: Any) -> None:
    prepare = type(model).prepare_inputs_for_generation

    def shifted(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare(model, *args, **kwargs)
        return inputs | {"input_ids": inputs["input_ids"].clamp(max=50)}

    model.prepare_inputs_for_generation = shifted


def _hook_on_the_model(model: Any) -> None:
    def turned(module: Any, args: Any, output: Any) -> Any:
        output.logits = -output.logits
        return output

    model.register_forward_hook(turned)


def _hook_on_the_base(model: Any) -> None:
    def turned(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"input_ids": kwargs["input_ids"].clamp(max=50)}

    model.model.register_forward_pre_hook(turned, with_kwargs=True)


def _a_bias(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.full((100,), 0.3))


def _untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


def _resized(model: Any) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(208, mean_resizing=False)


def _checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()


def _shrunk(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 5.0
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


CHANGES = [
    *(_appended, _fewer, _eps, _scale, _rotary, _other_rotary, _class_forward, _own_forward, _prepares),
    *(_hook_on_the_model, _hook_on_the_base, _a_bias, _untied, _resized, _checkpointing, _shrunk),
]


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True], ids=["at first", "after a text"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts(change: Callable[[Any], None], before: bool) -> None:
    plain, model = pair()
    if before:
        generate(model)
    with torch.no_grad():
        change(plain)
        change(model)
    assert_same(plain, model)
    assert_same(plain, model, num_beams=2)


def test_what_is_slower_is_said_with_the_reason(said: pytest.LogCaptureFixture) -> None:
    _, model = pair()
    _resized(model)
    generate(model)
    assert "vocab_size of the LlamaForCausalLM was changed" in said.text
    assert "was changed" in str(flashnorm.status(model).generate)
    assert flashnorm.status(flashnorm.optimize(model)).generate is None


def test_checkpointing_of_gradients_that_is_over_leaves_the_loop_in_use() -> None:
    _, model = pair()
    _checkpointing(model)
    native.runs.clear()
    generate(model)
    assert native.runs[native.ALL]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16, torch.float32)])
def test_casts_between_texts(dtypes: tuple[torch.dtype, ...]) -> None:
    model: Any = flashnorm.optimize(build("qwen3", dtypes[0]))
    for dtype in dtypes:
        plain = build("qwen3", dtypes[0])
        for step in dtypes[: dtypes.index(dtype) + 1]:
            plain, model = plain.to(step), model.to(step)
        found = generate(model, max_new_tokens=60)
        native.runs.clear()
        assert torch.equal(generate(model, max_new_tokens=60), found)
        assert native.runs[native.ALL]
        if dtype == torch.float32:
            assert torch.equal(found, generate(plain, max_new_tokens=60))


def test_hooks_for_all_modules_are_called() -> None:
    plain, model = pair()
    seen: list[str] = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    try:
        generate(plain)
        expected, seen[:] = seen.copy(), []
        generate(model)
    finally:
        handle.remove()
    assert seen == expected
    native.runs.clear()
    generate(model)
    assert native.runs[native.ALL]


def test_a_mode_sees_every_operator() -> None:
    plain, model = pair()
    counted = []
    for one in (plain, model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            generate(one)
            one(IDS)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


def test_autocast_is_as_ever() -> None:
    plain, model = pair()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert torch.equal(generate(model), generate(plain))


def test_a_device_that_is_set_is_no_obstacle() -> None:
    plain, model = pair()
    expected = generate(plain)
    native.runs.clear()
    with torch.device("cpu"):
        assert torch.equal(generate(model), expected)
    assert native.runs[native.ALL]


def test_tangents_are_as_ever() -> None:
    plain, model = pair()
    x = plain.get_input_embeddings()(IDS).detach()

    def logits(one: Any) -> Callable[[Tensor], Tensor]:
        return lambda embeddings: one(inputs_embeds=embeddings, use_cache=False).logits

    for one in (plain, model):
        one.set_attn_implementation("eager")
    expected, found = (torch.func.jvp(logits(one), (x,), (torch.ones_like(x),)) for one in (plain, model))
    assert torch.equal(found[1], expected[1])


def test_a_weight_without_memory_is_an_error_and_no_crash() -> None:
    model: Any = build("llama")
    install(model)
    storage = model.model.layers[1].mlp.down_proj.weight.untyped_storage()
    storage.resize_(0)
    with pytest.raises((ValueError, RuntimeError)):
        generate(model)


def test_a_model_of_other_versions_is_proven_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair()
    monkeypatch.setattr(guard, "_versions", lambda: "torch 9 and transformers 9")
    assert "call flashnorm.optimize again" in str(flashnorm.status(model).generate)
    native.runs.clear()
    generate(model)
    assert not native.runs.total()
    flashnorm.optimize(model)
    assert flashnorm.status(model).generate is None


# --- status


def test_status_of_models() -> None:
    plain, model = pair()
    assert flashnorm.status(model) == flashnorm.Status((None,) * 3, None)
    assert flashnorm.status(model).in_words == "on the fused kernels"
    assert "was not optimized" in str(flashnorm.status(plain).generate)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    found = flashnorm.status(model)
    assert found.fused_layers == 2
    assert "hook on mlp.up_proj" in str(found.layers[1])
    assert "hook on model.layers.mlp.up_proj" in str(found.generate)
    assert "2 of 3 layers" in found.in_words
    model.train()
    assert flashnorm.status(model).fused_layers == 0
    assert flashnorm.status(build("llama", torch.float64)).generate == (
        "expected float32, bfloat16 or float16 weights, found torch.float64"
    )


# --- the proof behind `optimize`


def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers 5.24 did to a fused layer of an older release: the cache came under a name it did not read."""
    monkeypatch.setattr(generation, "update_cache", lambda name, cache, keys, values, *rest: (keys, values))


def _another_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    after = ops.after_attention
    monkeypatch.setattr(ops, "after_attention", lambda x, a, w, _, *rest: after(x, a, w, "relu", *rest))


def _a_step_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: FusedDecoder, ids: Tensor) -> Tensor:
        self.start(len(ids))
        return self._run(ids[:, None], len(ids), 0)

    monkeypatch.setattr(FusedDecoder, "step", step)


def _wrong_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    after = ops.after_attention
    uneven = torch.linspace(0.8, 1.2, 64)

    def wrong(x: Tensor, *rest: Any) -> Tensor:
        return after(x, *rest) if x.dtype == torch.float32 else (after(x, *rest) * uneven).to(x.dtype)

    monkeypatch.setattr(ops, "after_attention", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("break_it", [_no_cache, _another_activation, _wrong_in_16_bits, _a_step_that_forgets])
def test_kernels_that_compute_something_else_are_not_used(
    break_it: Callable[[pytest.MonkeyPatch], None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    said: pytest.LogCaptureFixture,
) -> None:
    if (break_it, dtype) == (_wrong_in_16_bits, torch.float32):
        return  # nothing is wrong there
    plain, model = build("llama", dtype), build("llama", dtype)
    break_it(monkeypatch)
    reason = optimize_if_supported(model)
    if break_it is _a_step_that_forgets:  # the layers are right
        assert reason is None
        assert "expected the scores of Transformers' own loop" in str(flashnorm.status(model).generate)
    else:
        assert "expected" in str(reason)
        assert flashnorm.status(model).fused_layers == 0
        assert "the fused kernels are not used" in said.text
    native.runs.clear()
    assert torch.equal(generate(model), generate(plain)) or dtype == torch.bfloat16
    assert not native.runs[native.ALL]


def test_the_copy_that_is_proven_is_small_and_leaves_the_model_as_it_is() -> None:
    model: Any = build("smollm3, every other layer rotated", torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(model.config.to_dict())
    small = small_copy(model, [0, 1])
    assert len(small.model.layers) == 2
    assert small.config.no_rope_layers == [1, 0]
    assert small.get_output_embeddings().weight.shape[0] == 64
    assert not any(parameter.is_meta for parameter in small.parameters())
    assert flashnorm.optimize(model).config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
