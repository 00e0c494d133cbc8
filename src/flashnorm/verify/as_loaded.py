"""The converted model as `flashnorm.load` gives it by default: what people run is judged as well.

The other runs of a verification use the model's own code. Here the fused kernels run, where they apply.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from flashnorm.runtime.load import load
from flashnorm.verify.measures import MAX_RATIO, Criterion, Greedy, Run, same_text, within
from flashnorm.verify.runs import ROOM, Outputs, available_memory, outputs_of, quiet

_PATH = "as flashnorm.load gives it"


@dataclass(frozen=True)
class AsLoaded:
    """What the model computes as `flashnorm.load` gives it.

    Attributes:
        path: what runs: the fused kernels, or the model's own code, and why.
        run: over the text, in the checkpoint's dtype; None if it does not fit into memory.
        greedy: continuations in float32; None if it does not fit.
    """

    path: str
    run: Run | None = None
    greedy: Greedy | None = None

    def criteria(self, dtype: str, source: Run, floor: float) -> tuple[Criterion, ...]:
        """Those of the other runs; `source` in `dtype`, the checkpoint's, and the KL that is as good as none."""
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
        """What was not run, in words."""
        missing = [words for words, part in (("the text", self.run), ("greedy text", self.greedy)) if part is None]
        return f"{' and '.join(missing)} {_PATH}: it does not fit into memory beside the rest" if missing else None


def loaded_model(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> tuple[PreTrainedModel, str]:
    """The model in a dtype, and what runs."""
    from flashnorm.runtime.status import status

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no kernels is said by `path`
        model = load(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        return model, status(model).in_words


def loaded_outputs(folder: Path, dtype: torch.dtype, tokens: Tensor, trust_remote_code: bool) -> tuple[Outputs, str]:
    """Logits and hidden states for `tokens`, `[tokens]`, and what ran."""
    model, path = loaded_model(folder, dtype, trust_remote_code)
    with torch.inference_mode():
        return outputs_of(model, tokens), path


def loaded_continuation(folder: Path, prompt: Tensor, steps: int, trust_remote_code: bool) -> Tensor:
    """In float32, the most likely tokens after a prompt, `[steps]`, by `generate` as people call it."""
    model, _ = loaded_model(folder, torch.float32, trust_remote_code)
    model.generation_config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0)
    with quiet():
        text = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]))  # type: ignore[operator]
    return text[0, len(prompt) :]


def fits(model: nn.Module, dtype: torch.dtype, besides: int) -> bool:
    """Whether a model, here on the meta device, fits into memory in a dtype, with so many bytes besides."""
    available = available_memory()
    weights = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    return available is None or weights + besides + ROOM <= available
