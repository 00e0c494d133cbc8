"""Writes text for a reader at a terminal: continues a text or answers in a chat, token by token."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import StoppingCriteriaList, StopStringCriteria, TextStreamer, set_seed

from flashnorm.errors import InputError, brief

Message = dict[str, str]


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it before one of the tokens is drawn; 0 takes the likeliest one.
        top_p: draw among the likeliest tokens that have this probability together; None: as the model's
            generation_config.json says.
        top_k: draw among so many of the likeliest tokens; 0: among all; None: as generation_config.json says.
        seed: of the random numbers; None: others in every run.

    Raises:
        InputError: an option of drawing is given, but the temperature is 0.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        drawing = {"--top-p": self.top_p, "--top-k": self.top_k, "--seed": self.seed}
        given = [name for name, value in drawing.items() if value is not None]
        if given and not self.temperature:
            raise InputError(
                f"expected --temp above 0 with {' and '.join(given)}, found none: tokens are drawn with a temperature "
                "only"
            )

    def options(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        if not self.temperature:
            return {"do_sample": False}
        given = {"top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, "temperature": self.temperature} | {k: v for k, v in given.items() if v is not None}


@dataclass(frozen=True)
class Written:
    """What was written, and how fast.

    Attributes:
        text: the new text, without special tokens.
        prompt: the tokens of the prompt.
        tokens: how many tokens were written, with the one that ends a text.
        first: seconds until the first of them.
        rest: seconds for all others together.
    """

    text: str
    prompt: int
    tokens: int
    first: float
    rest: float

    def __str__(self) -> str:
        rate = f", then {(self.tokens - 1) / self.rest:.1f} tokens a second" if self.tokens > 1 else ""
        return f"{self.tokens} tokens; the first after {self.first:.2f} s (a prompt of {self.prompt} tokens){rate}"


class TextWriter:
    """Writes with a model to standard output.

    Args:
        model: a model of Transformers with `generate`.
        tokenizer: its tokenizer.
        choice: how the next token is chosen. Its seed is set here, once.
        limit: how many tokens are written at most at a time.
        stops: texts after which to stop. They are written, too.
    """

    def __init__(self, model: Any, tokenizer: Any, choice: Choice, limit: int, stops: Sequence[str] = ()):
        if "" in stops:
            raise InputError("expected text as --stop, found none")
        self._model, self._tokenizer, self._limit = model, tokenizer, limit
        self._options = choice.options()
        if stops:
            # As a criterion, and not as `stop_strings`, it runs in the fused loop.
            self._options["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, list(stops))])
        if choice.seed is not None:
            set_seed(choice.seed)

    def continue_text(self, text: str) -> Written:
        """Write a text and its continuation. Raises `InputError` if the text has no token."""
        inputs = self._tokenizer(text, return_tensors="pt")
        if not inputs["input_ids"].numel():
            raise InputError(f"expected a prompt of at least one token, found {text!r}")
        return self._write(inputs, with_prompt=True)

    def answer(self, messages: Sequence[Message]) -> Written:
        """Write the answer to a chat.

        Args:
            messages: the chat so far; each has a `role` (system, user or assistant) and a `content`.

        Raises:
            InputError: the tokenizer has no chat template, or one that refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise InputError("expected a tokenizer with a chat template, found none; leave out --chat")
        try:
            inputs = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # a template can raise anything
            raise InputError(f"expected messages that the chat template takes, found {brief(error)}") from error
        return self._write(inputs, with_prompt=False)

    def _write(self, inputs: Any, *, with_prompt: bool) -> Written:
        streamer = _Timed(self._tokenizer, skip_prompt=not with_prompt, skip_special_tokens=True)
        answer = self._model.generate(**inputs, **self._options, max_new_tokens=self._limit, streamer=streamer)
        prompt = inputs["input_ids"].shape[1]
        text = self._tokenizer.decode(answer[0, prompt:], skip_special_tokens=True)
        started, first, *_ = at = streamer.at
        return Written(text, prompt, len(at) - 1, first - started, at[-1] - first)


class _Timed(TextStreamer):
    """Prints a text as it grows. `at` has the time of the start, then that of each new token, in seconds."""

    def __init__(self, tokenizer: Any, **options: Any):
        super().__init__(tokenizer, **options)
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        """Take the prompt, or the next token."""
        self.at.append(time.perf_counter())
        super().put(value)
