"""Proves that a model on the fused kernels computes what its own code computes, in the ways in which models are used.

`formula.py` proves the formula of each kind of layer. Here, a copy with one layer of each kind and a small vocabulary
runs with and without the kernels, with Transformers' own caches, masks and `generate`. What Transformers passes between
these parts differs from version to version, so only a run can show that the kernels fit.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StaticCache

from flashnorm.compat import generation
from flashnorm.cpu.decoder import UnsupportedError
from flashnorm.cpu.kernels import native
from flashnorm.cpu.structure import choose_all_experts

_VOCABULARY, _WINDOW = 64, 4
_TOKENS, _PADDING, _STEPS = 8, 3, 3
# Tolerance for float32 sums in another order through a few layers, relative to the largest logit.
_SAME = 1e-4
# In the model's own dtype both runs round. The kernels' distance from the float32 run may be this many times its own.
_FARTHER = 2.0


class DifferentError(UnsupportedError):
    """The kernels should fit this model but give other results: an upstream has changed, or they are wrong."""


@torch.no_grad()
def prove(model: Any, indices: Sequence[int], install: Callable[[Any], None]) -> str | None:
    """Run a small copy of a model with its own code and on the kernels.

    Args:
        model: the model, in memory, on the CPU; it is not changed.
        indices: the index of one layer of each kind.
        install: puts the kernels into a model.

    Returns:
        Why `generate` must keep Transformers' own loop; None if the fused loop gives the same.

    Raises:
        DifferentError: a forward fails, differs by more than rounding, or does not reach the kernels.
    """
    own = small_copy(model, indices)
    ours = copy.deepcopy(own, {id(weight): weight for weight in own.parameters()})  # a mixture's layers are large
    install(ours)
    before = native.runs[native.AFTER_ATTENTION]
    expected = {name: _run(f"with its own code, {name}", run, own) for name, run in _RUNS.items()}
    found = {name: _run(name, run, ours) for name, run in _RUNS.items()}
    if native.runs[native.AFTER_ATTENTION] == before:
        raise DifferentError("expected its layers to reach the kernels, found that their own code runs")
    for name, logits in found.items():
        if not (error := _error(logits, expected[name])) <= _SAME:
            raise DifferentError(f"{name}: expected what its own code computes, found logits {error:.2g} apart")
    refusal = _difference_of_generation(own, ours)
    if model.dtype != torch.float32:
        # With few bits, rounding may choose other experts at a near tie: of these two runs, or of the float32 run.
        if choose_all_experts(own) and choose_all_experts(ours):
            install(ours)
            expected = {name: _run(f"with its own code, {name}", run, own) for name, run in _RUNS.items()}
        _check_own_dtype(model.dtype, own, ours, expected)
    return refusal


def small_copy(model: Any, indices: Sequence[int]) -> Any:
    """A copy with a few layers and vocabulary entries of a model, in float32, with a window of a few tokens.

    Args:
        model: the model to copy from.
        indices: which of its layers to copy, in this order.
    """
    base, config = model.base_model, copy.deepcopy(model.config)
    embedding, head, layers = model.get_input_embeddings(), model.get_output_embeddings(), base.layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == len(layers):  # has an entry for each layer
            setattr(config, name, [value[i] for i in indices])
    config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = len(indices), _VOCABULARY, False
    config.pad_token_id = 0
    if getattr(config, "output_router_logits", False):  # then layers run their own code
        config.output_router_logits = False
    windowed = bool(getattr(config, "sliding_window", None))
    if windowed:
        config.sliding_window = _WINDOW
    with torch.device("meta"):
        small = type(model)(config)

    def copied(module: nn.Module) -> nn.Module:
        return copy.deepcopy(module, {id(model.config): config}).float()

    for made, original in ((small, model), (small.base_model, base)):
        for name, child in original.named_children():
            if not any(child is other for other in (base, embedding, head, layers)):
                setattr(made, name, copied(child))
    small.base_model.layers = nn.ModuleList(copied(layers[i]) for i in indices)
    for index, layer in enumerate(small.base_model.layers):
        for settings in map(vars, layer.modules()):
            if "layer_idx" in settings:
                settings["layer_idx"] = index
            if windowed and settings.get("sliding_window"):
                settings["sliding_window"] = _WINDOW
    entries: Any = small.get_input_embeddings()
    entries.weight = nn.Parameter(embedding.weight[:_VOCABULARY].float(), requires_grad=False)
    for name, buffer in embedding.named_buffers():
        setattr(entries, name, buffer.float())
    small.set_output_embeddings(nn.Linear(*head.weight[:_VOCABULARY].shape[::-1], bias=False))
    small.get_output_embeddings().weight = nn.Parameter(head.weight[:_VOCABULARY].float(), requires_grad=False)
    small.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, max_new_tokens=_STEPS + 1)
    return small.eval()


def _ids(sequences: int) -> Tensor:
    return torch.randint(1, _VOCABULARY, (sequences, _TOKENS + _STEPS), generator=torch.Generator().manual_seed(0))


def _at_once(model: Any) -> Tensor:
    return model(input_ids=_ids(1), use_cache=False).logits


def _in_steps(model: Any, sequences: int, cache: Any) -> Tensor:
    """Logits `[tokens, vocabulary]` of a prompt and three single steps; a second sequence is padded on the left."""
    ids, mask = _ids(sequences), torch.ones(sequences, _TOKENS + _STEPS, dtype=torch.long)
    mask[1:, :_PADDING] = 0
    logits = []
    for start, stop in ((0, _TOKENS), *((at, at + 1) for at in range(_TOKENS, _TOKENS + _STEPS))):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        output = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions,
            use_cache=True,
            **{generation.cache_argument(model): cache},
        )
        logits.append(output.logits)
    together = torch.cat(logits, 1)
    return together[mask.bool()]


_RUNS: dict[str, Callable[[Any], Tensor]] = {
    "without a cache": _at_once,
    "a prompt and three steps": lambda model: _in_steps(model, 1, DynamicCache(config=model.config)),
    "two sequences, one padded": lambda model: _in_steps(model, 2, DynamicCache(config=model.config)),
    "a static cache": lambda model: _in_steps(
        model, 2, StaticCache(config=model.config, max_cache_len=_TOKENS + _STEPS)
    ),
}


def _run(name: str, run: Callable[[Any], Tensor], model: Any) -> Tensor:
    try:
        return run(model).float()
    except Exception as error:  # an upstream package that has changed can raise anything
        raise DifferentError(f"{name}: expected logits, found {type(error).__name__}: {error}") from error


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected number; NaN if a number is NaN."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _check_own_dtype(dtype: torch.dtype, own: Any, ours: Any, expected: dict[str, Tensor]) -> None:
    """Compare runs in the model's own dtype, which has other kernels. Both round, so each is compared with float32.

    Both models are cast to that dtype in place.
    """
    own, ours = own.to(dtype), ours.to(dtype)
    for name, run in _RUNS.items():
        oracle = expected[name]
        before = native.runs[native.AFTER_ATTENTION]
        theirs, found = ((_run(name, run, one) - oracle).norm() / oracle.norm() for one in (own, ours))
        if native.runs[native.AFTER_ATTENTION] == before:
            raise DifferentError(f"{name}, in {dtype}: expected its layers to reach the kernels, found its own code")
        if not found <= _FARTHER * theirs + torch.finfo(dtype).eps:
            raise DifferentError(
                f"{name}, in {dtype}: expected an error of about {theirs:.2g} as with its own code, found {found:.2g}"
            )


def _difference_of_generation(own: Any, ours: Any) -> str | None:
    """Why the fused loop differs from Transformers'; None if it does not.

    The scores of each step are compared as long as the sequences agree.
    """
    mask = torch.ones(2, _TOKENS, dtype=torch.long)
    mask[1:, :_PADDING] = 0
    for name, sequences in (("one sequence", 1), ("two sequences, one padded", 2)):
        given = {"input_ids": _ids(sequences)[:, :_TOKENS], "attention_mask": mask[:sequences]}
        before = native.runs[native.ALL]
        try:
            expected, found = (_steps_of(model, given) for model in (own, ours))
        except Exception as error:  # an upstream package that has changed can raise anything
            return f"{name}: expected a sequence, found {type(error).__name__}: {error}"
        if native.runs[native.ALL] == before:
            return f"{name}: expected the loop to reach the kernels, found that Transformers' own runs"
        if len(expected) != len(found):
            return f"{name}: expected {len(expected)} tokens, found {len(found)}"
        for (ids, scores), (our_ids, our_scores) in zip(expected, found, strict=True):
            if not torch.equal(ids, our_ids):
                break  # a near tie, because the scores before it agreed
            if not (error := _error(our_scores, scores)) <= _SAME:
                return f"{name}: expected the scores of Transformers' own loop, found them {error:.2g} apart"
    return None


def _steps_of(model: Any, given: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each token that `generate` adds: the sequence before it, and the scores that it was chosen by."""
    steps: list[tuple[Tensor, Tensor]] = []

    def record(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append((ids.clone(), scores.clone()))
        return scores

    model.generate(**given, logits_processor=LogitsProcessorList([record]))  # type: ignore[list-item]
    return steps
