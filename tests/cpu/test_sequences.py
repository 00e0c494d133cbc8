"""Random sequences of what people do to a model: an optimised one computes what a plain copy does, and never crashes.

Each step is done to both. `pytest tests/cpu/test_sequences.py --sequences 3000` tries more of them; `make sanitize`
tries them under AddressSanitizer.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

import flashnorm
from decoders import build, error, text
from flashnorm.compat import generation
from flashnorm.cpu.kernels import native
from flashnorm.cpu.optimize import optimize_if_supported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled"),
]

KINDS = (
    *("llama", "qwen3", "mistral with a window", "phi3", "llama with biases"),
    "mixtral, all experts chosen",  # with few bits, rounding may choose another expert
)
LARGEST = 40  # tokens of a text and what is generated: caches grow by 512, so some texts are long
LAYERS = st.integers(0, 2)
OPTIONS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 6)},
    optional={
        "do_sample": st.booleans(),
        "num_beams": st.integers(1, 3),
        "num_return_sequences": st.just(1),
        "use_cache": st.booleans(),
        "repetition_penalty": st.sampled_from((0.7, 1.3)),
        "eos_token_id": st.just(list(range(3, 60))),
        "cache_implementation": st.sampled_from(("static", "dynamic")),
        "return_dict_in_generate": st.booleans(),
        "prefill_chunk_size": st.integers(2, 5),
    },
)


class Doubled(nn.Module):
    """Stands where a module was, and is not what it was."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.module(*args, **kwargs)


def negated(module: Any, args: Any, output: Any) -> Any:
    """A hook that changes what a module gives."""
    return -output


class Sequences(RuleBasedStateMachine):
    """A plain model and an optimised one, to which the same is done."""

    @initialize(kind=st.sampled_from(KINDS), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
    def start(self, kind: str, dtype: torch.dtype) -> None:
        self.kind, self.hooks = kind, []
        self.plain, self.model = build(kind, dtype), build(kind, dtype)
        if self.plain._can_set_experts_implementation():  # the grouped kernels have no float64
            self.both(lambda model: model.set_experts_implementation("eager"))
        flashnorm.optimize(self.model)

    def both(self, act: Callable[[Any], Any]) -> list[Any]:
        """Do the same to each, with the same random numbers; what came of it."""
        found = []
        for model in (self.plain, self.model):
            torch.manual_seed(0)
            found.append(act(model))
        return found

    # --- what is done to it

    @rule(dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)))
    def cast(self, dtype: torch.dtype) -> None:
        self.both(lambda model: model.to(dtype))

    @rule(layer=LAYERS, dtype=st.sampled_from((torch.float32, torch.bfloat16)))
    def cast_one_module_and_back(self, layer: int, dtype: torch.dtype) -> None:
        before = self.plain.dtype
        self.both(lambda model: model.model.layers[layer].mlp.to(dtype))
        self.both(lambda model: model.model.layers[layer].mlp.to(before))

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        self.both(lambda model: model.train(mode))

    @precondition(lambda self: len(self.plain.model.layers) < 5)
    @rule(layer=LAYERS)
    def append(self, layer: int) -> None:
        added = copy.deepcopy(self.plain.model.layers[layer])

        def act(model: Any) -> None:
            another = copy.deepcopy(added)
            another.self_attn.layer_idx = len(model.model.layers)
            model.model.layers.append(another)
            model.config.num_hidden_layers = len(model.model.layers)
            if getattr(model.config, "layer_types", None):
                model.config.layer_types = [*model.config.layer_types, model.config.layer_types[layer]]

        self.both(act)

    @rule(layer=LAYERS, part=st.sampled_from(("mlp", "input_layernorm", "post_attention_layernorm")))
    def replace(self, layer: int, part: str) -> None:
        def act(model: Any) -> None:
            module = getattr(model.model.layers[layer], part)
            setattr(model.model.layers[layer], part, module.module if isinstance(module, Doubled) else Doubled(module))

        self.both(act)

    @rule(layer=LAYERS, other=LAYERS)
    def swap(self, layer: int, other: int) -> None:
        def act(model: Any) -> None:
            one, two = model.model.layers[layer], model.model.layers[other]
            one.mlp, two.mlp = two.mlp, one.mlp

        self.both(act)

    @rule(layer=LAYERS, name=st.sampled_from(("mlp", "self_attn.o_proj", "post_attention_layernorm")))
    def hook(self, layer: int, name: str) -> None:
        self.hooks += self.both(
            lambda model: model.model.layers[layer].get_submodule(name).register_forward_hook(negated)
        )

    @rule()
    def unhook(self) -> None:
        for handle in self.hooks:
            handle.remove()
        self.hooks = []

    @rule(size=st.sampled_from((200, 208, 320)))
    def resize(self, size: int) -> None:
        self.both(lambda model: model.resize_token_embeddings(size, mean_resizing=False))

    @rule(layer=LAYERS, eps=st.sampled_from((1e-6, 0.3)))
    def set_eps(self, layer: int, eps: float) -> None:
        def act(model: Any) -> None:
            norm = model.model.layers[layer].input_layernorm
            (norm.module if isinstance(norm, Doubled) else norm).variance_epsilon = eps

        self.both(act)

    @rule(layer=LAYERS)
    def write(self, layer: int) -> None:
        self.both(lambda model: model.model.layers[layer].self_attn.o_proj.weight.data.mul_(-1))

    @rule(layer=LAYERS)
    def assign(self, layer: int) -> None:
        def act(model: Any) -> None:
            linear = model.model.layers[layer].self_attn.o_proj
            linear.weight = nn.Parameter(linear.weight.detach().flip(0))

        self.both(act)

    @rule(name=st.sampled_from(("eager", "sdpa")))
    def attention(self, name: str) -> None:
        self.both(lambda model: model.set_attn_implementation(name))

    @rule()
    def copy_it(self) -> None:
        self.plain, self.model = self.both(copy.deepcopy)
        self.hooks = []  # of the copies, which cannot be removed

    @precondition(lambda self: not self.hooks)
    @rule()
    def pickle_it(self) -> None:
        self.plain, self.model = self.both(lambda model: pickle.loads(pickle.dumps(model)))

    @rule()
    def save_and_load_its_weights(self) -> None:
        def act(model: Any) -> None:
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            file.seek(0)
            model.load_state_dict(torch.load(file), strict=True)

        self.both(act)

    @rule()
    def optimize_again(self) -> None:
        self.plain.eval()  # as `optimize` does
        optimize_if_supported(self.model)

    @rule(beams=st.sampled_from((None, 2)))
    def configure(self, beams: int | None) -> None:
        self.both(lambda model: setattr(model, "generation_config", GenerationConfig(pad_token_id=0, num_beams=beams)))

    @precondition(lambda self: self.plain.dtype in (torch.float32, torch.float64))
    @rule()
    def a_step_of_training(self) -> None:
        def act(model: Any) -> Tensor:
            loss = model(self.ids(1, 9), labels=self.ids(1, 9)).loss
            loss.backward()
            return loss.detach()

        ours, theirs = self.both(act)[::-1]
        assert error(ours[None], theirs[None]) <= 1e-5 or not theirs.isfinite()
        self.both(lambda model: model.zero_grad())

    # --- what it computes

    def ids(self, texts: int, tokens: int) -> Tensor:
        return text(texts * tokens).view(texts, tokens)

    @rule(texts=st.integers(1, 3), tokens=st.integers(1, LARGEST), options=OPTIONS, padding=st.integers(0, 5))
    def generate(self, texts: int, tokens: int, options: dict[str, Any], padding: int) -> None:
        mask = torch.ones(texts, tokens, dtype=torch.long)
        mask[1:, : min(padding, tokens - 1)] = 0
        given = {"input_ids": self.ids(texts, tokens), "attention_mask": mask, "pad_token_id": 0} | options

        def act(model: Any) -> Any:
            try:
                found = model.generate(**given)
            except (ValueError, RuntimeError, NotImplementedError, TypeError) as problem:
                return type(problem)
            return found if isinstance(found, Tensor) else found.sequences

        theirs, ours = self.both(act)
        if isinstance(theirs, Tensor) and self.exact:
            assert isinstance(ours, Tensor)
            assert ours.shape[0] == theirs.shape[0]
            if not torch.equal(ours, theirs) and not given.get("do_sample") and given.get("num_beams", 1) == 1:
                self.near_tie(ours, theirs, mask)
        else:
            assert isinstance(ours, Tensor) == isinstance(theirs, Tensor)

    def near_tie(self, ours: Tensor, theirs: Tensor, mask: Tensor) -> None:
        """Where texts part, the plain model has nearly the same score for both tokens."""
        length = min(ours.shape[1], theirs.shape[1])
        parted = (ours[:, :length] != theirs[:, :length]).any(0).nonzero()
        at = int(parted[0]) if len(parted) else length
        assert at >= mask.shape[1]
        seen = torch.cat([mask, torch.ones(len(mask), at - mask.shape[1], dtype=torch.long)], 1)
        with torch.no_grad():
            scores = self.plain(theirs[:, :at], attention_mask=seen).logits[:, -1]
        best = scores.topk(2).values
        assert ((best[:, 0] - best[:, 1]) <= 1e-4 * scores.abs().max()).any()

    @property
    def exact(self) -> bool:
        """Whether both compute in float32 or wider, without dropout."""
        return all(parameter.dtype in (torch.float32, torch.float64) for parameter in self.plain.parameters())

    @invariant()
    def computes_the_same(self) -> None:
        if not hasattr(self, "plain"):
            return
        ids = self.ids(2, 7)
        with torch.no_grad():
            theirs, ours = self.both(lambda model: _logits(model, ids))
            if isinstance(theirs, type) or isinstance(ours, type):
                assert theirs == ours
            elif self.exact:
                assert error(ours, theirs) <= 1e-4
            elif theirs.isfinite().all():
                reference = _logits(copy.deepcopy(self.plain).double(), ids)
                bits = max(torch.finfo(parameter.dtype).eps for parameter in self.plain.parameters())
                norm = reference.norm()
                assert (ours - reference).norm() / norm <= 2 * (theirs - reference).norm() / norm + 4 * bits


def _logits(model: Any, ids: Tensor) -> Any:
    """Of a text in two parts, over a cache; or the error."""
    try:
        cache = DynamicCache(config=model.config)
        name = generation.cache_argument(model)
        first = model(ids[:, :-2], use_cache=True, **{name: cache}).logits
        return torch.cat([first, model(ids[:, -2:], use_cache=True, **{name: cache}).logits], 1).double()
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as problem:
        return type(problem)


def test_sequences(request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--sequences")
    run_state_machine_as_test(
        Sequences, settings=settings(max_examples=count, stateful_step_count=12, deadline=None, print_blob=True)
    )
