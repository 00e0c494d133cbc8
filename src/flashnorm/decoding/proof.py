"""What the proofs of the kernels share: a small copy of a model, and its runs with and without the kernels.

`formula.py` proves the formula of each kind of layer. Then a copy with one layer of each kind and a small vocabulary
runs with and without the kernels, with Transformers' own caches, masks and `generate` (`cpu/proof.py`, `gpu/proof.py`).
What Transformers passes between these parts differs from version to version, so only a run can show that the kernels
fit.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from flashnorm.compat import generation
from flashnorm.decoding.decoder import UnsupportedError

_VOCABULARY, _WINDOW = 64, 4
TOKENS, _PADDING, STEPS = 8, 3, 3
# Tolerance for float32 sums in another order through a few layers, relative to the largest logit.
SAME = 1e-4
# In the model's own dtype both runs round. The kernels' distance from the float32 run may be this many times its own.
FARTHER = 2.0


class DifferentError(UnsupportedError):
    """The kernels should fit this model but give other results: an upstream has changed, or they are wrong."""


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
    small.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, max_new_tokens=STEPS + 1)
    return small.eval()


def ids(sequences: int, tokens: int = TOKENS + STEPS) -> Tensor:
    """Random token ids of a small copy, always the same: `[sequences, tokens]`."""
    return torch.randint(1, _VOCABULARY, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def in_steps(model: Any, sequences: int, cache: Any) -> Tensor:
    """Logits `[tokens, vocabulary]` of a prompt and three single steps; a second sequence is padded on the left."""
    tokens, mask = ids(sequences), torch.ones(sequences, TOKENS + STEPS, dtype=torch.long)
    mask[1:, :_PADDING] = 0
    logits = []
    for start, stop in ((0, TOKENS), *((at, at + 1) for at in range(TOKENS, TOKENS + STEPS))):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        output = model(
            input_ids=tokens[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions,
            use_cache=True,
            **{generation.cache_argument(model): cache},
        )
        logits.append(output.logits)
    together = torch.cat(logits, 1)
    return together[mask.bool()]


def run(name: str, how: Callable[[Any], Tensor], model: Any) -> Tensor:
    """A run's logits in float32; `DifferentError` if it fails."""
    try:
        return how(model).float()
    except Exception as problem:  # an upstream package that has changed can raise anything
        found = f"{type(problem).__name__}: {problem}"
        raise DifferentError(f"{name}: expected logits, found {found}") from problem


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected number; NaN if a number is NaN."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def difference_of_generation(own: Any, ours: Any, count: Callable[[], int], most: int = 2) -> str | None:
    """Why the fused loop differs from Transformers'; None if it does not.

    The scores of each step are compared as long as the sequences agree.

    Args:
        own, ours: copies of a model without and with the kernels.
        count: how often a step has run on the kernels so far.
        most: how many sequences the kernels run at a time, at most.
    """
    device = own.device
    mask = torch.ones(2, TOKENS, dtype=torch.long, device=device)
    mask[1:, :_PADDING] = 0
    for name, sequences in (("one sequence", 1), ("two sequences, one padded", 2))[:most]:
        given = {"input_ids": ids(sequences)[:, :TOKENS].to(device), "attention_mask": mask[:sequences]}
        before = count()
        try:
            expected, found = (_steps_of(model, given) for model in (own, ours))
        except Exception as problem:  # an upstream package that has changed can raise anything
            return f"{name}: expected a sequence, found {type(problem).__name__}: {problem}"
        if count() == before:
            return f"{name}: expected the loop to reach the kernels, found that Transformers' own runs"
        if len(expected) != len(found):
            return f"{name}: expected {len(expected)} tokens, found {len(found)}"
        for (chosen, scores), (our_chosen, our_scores) in zip(expected, found, strict=True):
            if not torch.equal(chosen, our_chosen):
                break  # a near tie, because the scores before it agreed
            if not (apart := error(our_scores, scores)) <= SAME:
                return f"{name}: expected the scores of Transformers' own loop, found them {apart:.2g} apart"
    return None


def _steps_of(model: Any, given: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each token that `generate` adds: the sequence before it, and the scores that it was chosen by."""
    steps: list[tuple[Tensor, Tensor]] = []

    def record(chosen: Tensor, scores: Tensor) -> Tensor:
        steps.append((chosen.clone(), scores.clone()))
        return scores

    model.generate(**given, logits_processor=LogitsProcessorList([record]))  # type: ignore[list-item]
    return steps
