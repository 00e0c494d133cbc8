"""Numbers to run any model on: those of the calls that its plan is traced with, in the place of tensors without values.

* Token ids are those of a text, masks are ones, and pixels, sounds and embeddings are normal random numbers.
* A model that takes text alone gets several pieces of the text, each by itself, so that a classifier gives several
  numbers. Each piece ends with the token for the end, whose output some classifiers read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashnorm.errors import InputError
from flashnorm.trace.inputs import example_calls
from flashnorm.trace.inputs.sizes import configs_in

# Pieces of the text, and draws of random numbers.
PIECES = 8
DRAWS = 4

Arguments = Mapping[str, Any]

# The fields of a config with the tokens in whose place a model puts the features of an image, say.
_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech|media|img)\w*_token_(id|index)")
_TEXT = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "use_cache"}
FEWEST_IDS = 32  # embeddings with fewer rows are no vocabularies


class NotRunError(Exception):
    """The models cannot be run here. The message says why, in words for a report."""


@dataclass(frozen=True)
class CallWithNumbers:
    """A method of the model, and alternative lists of arguments for it: the first list that works is used, whole.

    Attributes:
        method: name of the method.
        alternatives: the lists of keyword arguments.
        name: another one for each call.
    """

    method: str
    alternatives: tuple[tuple[Arguments, ...], ...]
    name: str

    def run(self, model: nn.Module, arguments: Arguments, dtype: torch.dtype) -> Any:
        """Call the method once, with floating-point arguments in a dtype, and the same random numbers every time."""
        method = model if self.method == "forward" else getattr(model, self.method)
        with torch.random.fork_rng():  # the caller's random numbers go on as if there had been no call
            torch.manual_seed(0)  # some models mask at random
            return method(**{name: _in_dtype(value, dtype) for name, value in arguments.items()})


def calls_with_numbers(model: PreTrainedModel, tokens: Tensor, dtype: torch.dtype) -> list[CallWithNumbers]:
    """The calls that a model is run with; the first is its forward.

    Args:
        model: the model, on the meta device.
        tokens: token ids, `[tokens]`.
        dtype: the narrowest dtype that the model will run in: the numbers are numbers of this dtype.

    Raises:
        NotRunError: no known inputs fit the model's forward.
    """
    tokens = _ordinary(model, tokens)
    try:
        calls = example_calls(model)
    except InputError as error:
        raise NotRunError(str(error)) from error
    earlier: Counter[str] = Counter()
    found = []
    for call in calls:
        earlier[call.method] += 1
        name = call.method if earlier[call.method] == 1 else f"{call.method} ({earlier[call.method]})"
        numbers = (tuple(_with_numbers(model, one, tokens, dtype)) for one in call.alternatives)
        found.append(CallWithNumbers(call.method, tuple(numbers), name))
    return found


def _with_numbers(
    model: PreTrainedModel, arguments: Arguments, tokens: Tensor, dtype: torch.dtype
) -> Iterator[Arguments]:
    ids = arguments.get("input_ids")
    if arguments.keys() <= _TEXT and isinstance(ids, Tensor) and ids.dim() == 2:
        end = getattr(model.config, "eos_token_id", None)
        for piece in tokens.chunk(PIECES):
            text = torch.cat([piece, torch.tensor([end])]) if isinstance(end, int) else piece
            ids, mask = text[None], torch.ones_like(text[None])
            tensors = {name: mask if "mask" in name else ids for name in arguments if name != "use_cache"}
            yield {**arguments, **tensors}
        return
    rows = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    vocabulary = min((number for number in rows if number >= FEWEST_IDS), default=FEWEST_IDS)
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        yield {name: _number(name, value, tokens % vocabulary, dtype, generator) for name, value in arguments.items()}


def _number(name: str, value: Any, tokens: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    if value.dtype.is_floating_point:
        return torch.randn(value.shape, generator=generator).to(dtype)
    if name.endswith("_ids"):
        first = int(torch.randint(len(tokens), (), generator=generator))
        return tokens.roll(-first).repeat(-(-value.numel() // len(tokens)))[: value.numel()].view(value.shape)
    return torch.ones(value.shape, dtype=value.dtype)


def _ordinary(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Tokens without those that stand for something else than text."""
    fields = [vars(config).items() for _, config in configs_in(model.config)]
    named = [value for items in fields for name, value in items if _PLACEHOLDER.fullmatch(name)]
    special = torch.tensor([value for value in named if isinstance(value, int)], dtype=tokens.dtype)
    return tokens[~torch.isin(tokens, special)]


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype.is_floating_point else value
