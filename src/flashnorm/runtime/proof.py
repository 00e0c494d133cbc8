"""Proves that a model on the fused kernels computes what its own code computes, run as people run it.

`structure.py` proves the formula of each kind of layer. Here, a copy with one layer of each kind and a small vocabulary
runs both ways, with Transformers' own caches, masks and `generate`: what those hand to each other differs from version
to version, so it is not only read but run.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StaticCache

from flashnorm.compat import generation
from flashnorm.runtime.kernels import native
from flashnorm.runtime.structure import UnsupportedError

_VOCABULARY, _WINDOW = 64, 4
_TOKENS, _PADDING, _STEPS = 8, 3, 3
# float32 sums in another order, through a few layers: of the logits, relative to the largest.
_SAME = 1e-4
# How much farther from the float32 run than the model's own code a run in the model's own dtype may be: both round.
_FARTHER = 2.0


class DifferentError(UnsupportedError):
    """The kernels were meant to run this model, and give something else: an upstream has changed, or they are wrong."""


@torch.no_grad()
def prove(model: Any, indices: Sequence[int], install: Callable[[Any], None]) -> str | None:
    """Run a small copy of a model with its own code and on the kernels.

    Args:
        model: in memory, on the CPU; it is not changed.
        indices: of one layer of each kind.
        install: puts the kernels into a model.

    Returns:
        Why the loop behind `generate` must stay Transformers'; None if ours gives the same.

    Raises:
        DifferentError: a forward fails, differs by more than rounding, or does not reach the kernels.
    """
    own = small_copy(model, indices)
    ours = copy.deepcopy(own)
    install(ours)
    before = native.runs[native.AFTER_ATTENTION]
    expected = {name: _run(f"with its own code, {name}", run, own) for name, run in _RUNS.items()}
    found = {name: _run(name, run, ours) for name, run in _RUNS.items()}
    if native.runs[native.AFTER_ATTENTION] == before:
        raise DifferentError("expected its layers to reach the kernels, found that their own code runs")
    for name, logits in found.items():
        if not (error := _error(logits, expected[name])) <= _SAME:
            raise DifferentError(f"{name}: expected what its own code computes, found logits {error:.2g} apart")
    if model.dtype != torch.float32:
        _check_own_dtype(model.dtype, own, ours, expected)
    return _difference_of_generation(own, ours)


def small_copy(model: Any, indices: Sequence[int]) -> Any:
    """A model with a few of another's layers and entries of its vocabulary, in float32, with a window of a few tokens.

    Args:
        model: the other one.
        indices: which layers, in this order.
    """
    base, config = model.base_model, copy.deepcopy(model.config)
    embedding, head, layers = model.get_input_embeddings(), model.get_output_embeddings(), base.layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == len(layers):  # one entry a layer
            setattr(config, name, [value[i] for i in indices])
    config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = len(indices), _VOCABULARY, False
    config.pad_token_id = 0
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
    small.set_input_embeddings(nn.Embedding.from_pretrained(embedding.weight[:_VOCABULARY].float()))
    small.set_output_embeddings(nn.Linear(*head.weight[:_VOCABULARY].shape[::-1], bias=False))
    small.get_output_embeddings().weight = nn.Parameter(head.weight[:_VOCABULARY].float(), requires_grad=False)
    small.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, max_new_tokens=_STEPS + 1)
    return small.eval()


def _ids(texts: int) -> Tensor:
    return torch.randint(1, _VOCABULARY, (texts, _TOKENS + _STEPS), generator=torch.Generator().manual_seed(0))


def _at_once(model: Any) -> Tensor:
    return model(input_ids=_ids(1), use_cache=False).logits


def _in_steps(model: Any, texts: int, cache: Any) -> Tensor:
    """Logits `[tokens, vocabulary]` of a prompt, then of three single steps; a second text is padded on the left."""
    ids, mask = _ids(texts), torch.ones(texts, _TOKENS + _STEPS, dtype=torch.long)
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
    "two texts, one padded": lambda model: _in_steps(model, 2, DynamicCache(config=model.config)),
    "a static cache": lambda model: _in_steps(
        model, 2, StaticCache(config=model.config, max_cache_len=_TOKENS + _STEPS)
    ),
}


def _run(name: str, run: Callable[[Any], Tensor], model: Any) -> Tensor:
    try:
        return run(model).float()
    except Exception as error:  # whatever an upstream that has changed leads to
        raise DifferentError(f"{name}: expected logits, found {type(error).__name__}: {error}") from error


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest number; NaN if there is one."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _check_own_dtype(dtype: torch.dtype, own: Any, ours: Any, expected: dict[str, Tensor]) -> None:
    """The kernels for 16-bit weights are others; here each may round, so the float32 run tells which is nearer."""
    own, ours = copy.deepcopy(own).to(dtype), copy.deepcopy(ours).to(dtype)
    for name, run in _RUNS.items():
        oracle = expected[name]
        theirs, found = ((_run(name, run, one) - oracle).norm() / oracle.norm() for one in (own, ours))
        if not found <= _FARTHER * theirs + torch.finfo(dtype).eps:
            raise DifferentError(
                f"{name}, in {dtype}: expected an error of about {theirs:.2g} as with its own code, found {found:.2g}"
            )


def _difference_of_generation(own: Any, ours: Any) -> str | None:
    """Why our loop is not Transformers': the scores of each step are compared, as long as the texts agree."""
    mask = torch.ones(2, _TOKENS, dtype=torch.long)
    mask[1:, :_PADDING] = 0
    for name, texts in (("one text", 1), ("two texts, one padded", 2)):
        given = {"input_ids": _ids(texts)[:, :_TOKENS], "attention_mask": mask[:texts]}
        before = native.runs[native.ALL]
        try:
            expected, found = (_steps_of(model, given) for model in (own, ours))
        except Exception as error:  # whatever an upstream that has changed leads to
            return f"{name}: expected a text, found {type(error).__name__}: {error}"
        if native.runs[native.ALL] == before:
            return f"{name}: expected the loop to reach the kernels, found that Transformers' own runs"
        if len(expected) != len(found):
            return f"{name}: expected {len(expected)} tokens, found {len(found)}"
        for (ids, scores), (our_ids, our_scores) in zip(expected, found, strict=True):
            if not torch.equal(ids, our_ids):
                break  # a near tie, as the scores before it were the same
            if not (error := _error(our_scores, scores)) <= _SAME:
                return f"{name}: expected the scores of Transformers' own loop, found them {error:.2g} apart"
    return None


def _steps_of(model: Any, given: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The text before each token that `generate` adds, and its scores."""
    steps: list[tuple[Tensor, Tensor]] = []

    def record(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append((ids.clone(), scores.clone()))
        return scores

    model.generate(**given, logits_processor=LogitsProcessorList([record]))  # type: ignore[list-item]
    return steps
