"""Runs the models of a verification, one at a time: whole in memory or, where they do not fit, streamed from disk.

* Streaming uses the disk offload of Transformers and Accelerate: the weights of one module at a time are read, cast and
  dropped. Operators and inputs are the same as in memory, and so is every bit of the result.
* There is one exception: the experts of a mixture, which Transformers stacks while it loads, are written to a temporary
  folder first and come back in another memory layout, so their sums can differ in the last bit.
"""

import contextlib
import errno
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import psutil
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from flashnorm.compat.transformers import use_experts_for_float64
from flashnorm.errors import InputError, brief
from flashnorm.models.load import Loading, load_all
from flashnorm.verify.float64 import float64_everywhere

T = TypeVar("T")

# Memory for running code and small tensors, in bytes.
ROOM = 1 << 29


class Loader(Protocol):
    """Loads one of the two models in a dtype, with further arguments of `from_pretrained`."""

    def __call__(self, dtype: torch.dtype, **options: Any) -> PreTrainedModel: ...


def source_loader(source: Path, trust_remote_code: bool, base: Any = AutoModelForCausalLM, **always: Any) -> Loader:
    """A loader of the source by a class of Transformers; `always` are arguments of its `from_pretrained`."""

    def load_source(dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        return load_all(base, source, dtype=dtype, trust_remote_code=trust_remote_code, **always, **options).eval()

    return load_source


def converted_loader(loading: Loading) -> Loader:
    """A loader of the converted model, which runs on its own code."""

    def load_converted(dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        return loading.load(dtype=dtype, **options).eval()

    return load_converted


@dataclass(frozen=True)
class Outputs:
    """What a model computes for a text.

    Attributes:
        logits: `[tokens, vocabulary]`.
        hidden: the residual stream after the embedding and after each layer but the last, `[tokens, hidden size]`
            each; empty if the model gives no hidden states. The last layer is left out, because Transformers gives its
            output only after the final norm.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()

    def without_means(self) -> "Outputs":
        """The same, with hidden states that have a mean of zero over their channels."""
        return Outputs(self.logits, tuple(state - state.mean(-1, keepdim=True) for state in self.hidden))


@dataclass(frozen=True)
class Runner:
    """Runs models.

    Attributes:
        streamed: whether weights come from disk, a module at a time.
        advance: called with the bytes of weights that a run has used so far and will use in total.
    """

    streamed: bool = False
    advance: Callable[[int, int], object] = field(default=lambda done, total: None)

    @torch.inference_mode()
    def outputs(self, load_model: Loader, dtype: torch.dtype, tokens: Tensor, *, exact: bool = False) -> Outputs:
        """Logits and hidden states for `tokens`, `[tokens]`; `exact` runs the model in true float64."""
        return self.use(load_model, dtype, lambda model: outputs_of(model, tokens), exact=exact)

    @torch.inference_mode()
    def use(
        self, load_model: Loader, dtype: torch.dtype, called: Callable[[PreTrainedModel], T], *, exact: bool = False
    ) -> T:
        """What a function makes of a model, which it calls once; `exact` runs the model in true float64."""
        with self._model(load_model, dtype) as model:
            self._count(model, 1)
            with float64_everywhere() if exact else contextlib.nullcontext():
                return called(model)

    @torch.inference_mode()
    def continuation(self, load_model: Loader, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The greedy continuation of a prompt in float32, `[steps]`, and the logits that it was chosen by."""
        with self._model(load_model, torch.float32) as model:
            self._count(model, steps)
            # Replaces the checkpoint's own settings: no sampling, no penalties, no early end.
            model.generation_config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0)
            answer: Any = cast(Any, model).generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                return_dict_in_generate=True,
                output_logits=True,
            )
            return answer.sequences[0, len(prompt) :], torch.cat(answer.logits)

    @contextlib.contextmanager
    def _model(self, load_model: Loader, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
        gc.collect()  # frees the previous model
        with quiet():
            if not self.streamed:
                model = load_model(dtype)
                use_experts_for_float64(model)
                yield model
                return
            with tempfile.TemporaryDirectory(prefix="flashnorm-") as folder, _streaming_errors(folder):
                model = load_model(dtype, device_map={"": "disk"}, offload_folder=folder)
                use_experts_for_float64(model)
                yield model

    def _count(self, model: nn.Module, runs: int) -> None:
        """Report progress whenever a module with weights has run."""
        sizes = {
            module: sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False))
            for module in model.modules()
        }
        done, total = 0, runs * sum(sizes.values())

        def used(module: nn.Module, inputs: object, output: object) -> None:
            nonlocal done
            done = min(total, done + sizes[module])  # a module can run more than once
            self.advance(done, total)

        for module, size in sizes.items():
            if size:
                module.register_forward_hook(used)


def outputs_of(model: PreTrainedModel, tokens: Tensor) -> Outputs:
    """Logits and hidden states of a model for `tokens`, `[tokens]`."""
    answer = model(input_ids=tokens[None], use_cache=False, output_hidden_states=True)
    hidden = getattr(answer, "hidden_states", None) or ()
    return Outputs(answer.logits[0], tuple(state[0] for state in hidden[:-1] if isinstance(state, Tensor)))


def needed_memory(model: nn.Module, stored_bits: int, tokens: int, vocabulary: int, *, streamed: bool) -> int:
    """The bytes that a verification needs at its peak, when the model runs in float64.

    Args:
        model: the model, on the meta device.
        stored_bits: bits of a number in the checkpoint's main dtype.
        tokens: length of the text in tokens.
        vocabulary: number of logits of a token.
        streamed: whether only one module's weights are in memory at a time.
    """
    sizes = [sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules()]
    elements = max(sizes) if streamed else sum(weight.numel() for weight in model.parameters())
    config: Any = getattr(model, "config", None)
    text = config.get_text_config()
    # The hidden states of three runs at a time, because Transformers keeps the output of each layer.
    states = 3 * 8 * tokens * (getattr(text, "num_hidden_layers", 0) + 1) * getattr(text, "hidden_size", 0)
    return elements * (8 + stored_bits // 8) + 3 * 8 * tokens * vocabulary + states + ROOM


def available_memory() -> int:
    """The bytes of memory that are available without swapping."""
    return psutil.virtual_memory().available


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn off Transformers' progress bars and log messages in the block, for all threads of the process."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _streaming_errors(folder: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # up to 5.10, Transformers asks some weights on disk for their values
        raise InputError(
            f"expected transformers {transformers.__version__} to run a model whose weights stay on disk, found that "
            f"it cannot ({brief(error)}); take a newer transformers, a machine with more memory, or --weights-only"
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"{folder}: expected room for the weights that Transformers stacks, found the disk full; make room, or set "
            "TMPDIR to a folder on another disk"
        ) from error
