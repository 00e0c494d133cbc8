"""Runs the models of a verification, one at a time: whole in memory or, where they do not fit, streamed from disk.

* Streaming is the disk offload of Transformers and Accelerate: the weights of one module at a time are read, cast and
  dropped. The operators and their inputs are those of a run in memory, and so is every bit of the result.
* The experts of a mixture, which Transformers stacks while it loads, are written to a temporary folder first. They come
  back in another layout, so there sums can differ in their last bit.
"""

import contextlib
import errno
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from flashnorm.compat.transformers import use_experts_for_float64
from flashnorm.errors import InputError
from flashnorm.runtime.load import load, load_all
from flashnorm.verify.float64 import float64_everywhere

# Of running code and small tensors, in bytes.
ROOM = 1 << 29


class Loader(Protocol):
    """Loads one of the two models in a dtype, with further arguments of `from_pretrained`."""

    def __call__(self, dtype: torch.dtype, **options: Any) -> PreTrainedModel: ...


def loaders(source: Path, converted: Path, trust_remote_code: bool) -> tuple[Loader, Loader]:
    """How source and converted model are loaded."""

    def load_source(dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        return load_all(
            AutoModelForCausalLM, source, dtype=dtype, trust_remote_code=trust_remote_code, **options
        ).eval()

    def load_converted(dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        return load(converted, dtype=dtype, optimize=False, trust_remote_code=trust_remote_code, **options).eval()

    return load_source, load_converted


@dataclass(frozen=True)
class Outputs:
    """What a model computes for a text.

    Attributes:
        logits: `[tokens, vocabulary]`.
        hidden: the residual stream after the embedding and after each layer but the last, `[tokens, hidden size]`
            each. Without the last one, as Transformers gives it after the final norm only; empty where a model gives
            none.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Runner:
    """Runs models.

    Attributes:
        streamed: whether weights come from disk, a module at a time.
        advance: called with the bytes of weights that a run has used so far, and will use in all.
    """

    streamed: bool = False
    advance: Callable[[int, int], object] = field(default=lambda done, total: None)

    @torch.inference_mode()
    def outputs(self, load_model: Loader, dtype: torch.dtype, tokens: Tensor, *, exact: bool = False) -> Outputs:
        """Logits and hidden states for `tokens`, `[tokens]`; `exact` runs the model in true float64."""
        with self._model(load_model, dtype) as model:
            self._count(model, 1)
            with float64_everywhere() if exact else contextlib.nullcontext():
                return outputs_of(model, tokens)

    @torch.inference_mode()
    def continuation(self, load_model: Loader, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """In float32, the most likely tokens after a prompt, `[steps]`, and the logits they were chosen by."""
        with self._model(load_model, torch.float32) as model:
            self._count(model, steps)
            # Not the checkpoint's own settings: no sampling, no penalties, no early end.
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
        gc.collect()  # the model before this one
        with quiet():
            if not self.streamed:
                model = load_model(dtype)
                use_experts_for_float64(model)
                yield model
                return
            with tempfile.TemporaryDirectory(prefix="flashnorm-") as folder, _disk_errors(folder):
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
        stored_bits: of most of the checkpoint's numbers.
        tokens: length of the text.
        vocabulary: of the logits.
        streamed: whether one module's weights are in memory at a time, or all.
    """
    sizes = [sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules()]
    elements = max(sizes) if streamed else sum(weight.numel() for weight in model.parameters())
    config: Any = getattr(model, "config", None)
    text = config.get_text_config()
    # Of three runs at a time; Transformers keeps what each layer gives.
    states = 3 * 8 * tokens * (getattr(text, "num_hidden_layers", 0) + 1) * getattr(text, "hidden_size", 0)
    return elements * (8 + stored_bits // 8) + 3 * 8 * tokens * vocabulary + states + ROOM


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError, AttributeError):
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks."""
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
def _disk_errors(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"{folder}: expected room for the weights that Transformers stacks, found the disk full; make room, or set "
            "TMPDIR to a folder on another disk"
        ) from error
