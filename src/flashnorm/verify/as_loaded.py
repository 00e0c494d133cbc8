"""Runs the converted model as `flashnorm.load` gives it by default, because that is what people run.

The other runs of a verification use the model's own code; here the fused kernels run if they support the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from flashnorm.models.load import Loading, use_kernels
from flashnorm.verify.measures import MAX_RATIO, Criterion, Greedy, Run, same_text, within
from flashnorm.verify.runs import ROOM, Outputs, available_memory, outputs_of, quiet

_PATH = "as flashnorm.load gives it"


@dataclass(frozen=True)
class AsLoaded:
    """What the model computes as `flashnorm.load` gives it.

    Attributes:
        path: what ran: the fused kernels, or the model's own code and why.
        run: the run over the text in the checkpoint's dtype; None if the model does not fit into memory.
        greedy: the greedy continuations in float32; None if the model does not fit into memory.
    """

    path: str
    run: Run | None = None
    greedy: Greedy | None = None

    def criteria(self, dtype: str, source: Run, floor: float) -> tuple[Criterion, ...]:
        """The criteria of the other runs, for this one.

        Args:
            dtype: the checkpoint's dtype, in words.
            source: the source's run in that dtype.
            floor: the KL divergence that counts as zero.
        """
        where = f"{_PATH} ({self.path})"
        found: list[Criterion] = []
        if self.run is not None:
            asked = f"{where}, in {dtype}, it is at most {MAX_RATIO:g} times as far as the source"
            found.append(within(asked, self.run, source, MAX_RATIO, floor))
        if self.greedy is not None:
            asked = f"{where}, greedy tokens in float32 agree, or part at a near tie of the source"
            found.append(same_text(asked, self.greedy))
        return tuple(found)

    @property
    def unchecked(self) -> str | None:
        """What was not run, in words; None if everything was run."""
        missing = [words for words, part in (("the text", self.run), ("greedy text", self.greedy)) if part is None]
        return f"{' and '.join(missing)} {_PATH}: it does not fit into memory beside the rest" if missing else None


def loaded_model(loading: Loading, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """The model in a dtype, and words that say what runs (see `AsLoaded.path`)."""
    from flashnorm.models.status import status

    with quiet():
        model = loading.load(dtype=dtype)
        use_kernels(model)  # without the warning that there are no kernels, as the status says so
        return model, status(model).in_words


def loaded_outputs(loading: Loading, dtype: torch.dtype, tokens: Tensor) -> tuple[Outputs, str]:
    """Logits and hidden states for `tokens`, `[tokens]`, and words that say what ran."""
    model, path = loaded_model(loading, dtype)
    with torch.inference_mode():
        return outputs_of(model, tokens), path


def loaded_continuation(loading: Loading, prompt: Tensor, steps: int) -> Tensor:
    """The greedy continuation of a prompt in float32, `[steps]`, by an ordinary call of `generate`."""
    model, _ = loaded_model(loading, torch.float32)
    model.generation_config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0)
    with quiet():
        text = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]))  # type: ignore[operator]
    return text[0, len(prompt) :]


def fits(model: nn.Module, dtype: torch.dtype, besides: int) -> bool:
    """Whether a model (given on the meta device) fits into memory in a dtype, with `besides` more bytes."""
    weights = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    return weights + besides + ROOM <= available_memory()
