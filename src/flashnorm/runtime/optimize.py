"""`flashnorm.optimize`: a Transformers model that runs on the fused kernels, and `status`, which tells what does.

* Its decoder layers use the kernels inside Transformers' own forward (`layers.py`), whatever is asked of them.
* `generate`, where it is one token after the other, is a loop over all layers at once (`generate.py`).
* What is put into a model is proven first, on that model and with the versions that are installed (`structure.py`,
  `proof.py`), and asks before each use whether the model still is what was proven (`guard.py`).
"""

import mmap
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from flashnorm.runtime.fused import check_supported
from flashnorm.runtime.generate import Generate
from flashnorm.runtime.guard import Substitute
from flashnorm.runtime.layers import FusedForward, Rotation
from flashnorm.runtime.proof import prove
from flashnorm.runtime.structure import Decoder, UnsupportedError, find_decoder, kinds_of_layers, read_decoder

_REPLACED = "what flashnorm.optimize had put there was replaced"


def optimize(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model run on the fused kernels, where they apply; otherwise it stays as it is, with a warning.

    A layer of each kind is first run next to the formula that the kernels implement, and a small copy of the model in
    all the ways in which people run it; each must agree. Weights stay the model's parameters, and are moved once into
    memory of large pages. Folded and unfolded models are equally fast: the kernels apply a gain that is left while they
    read the activations.

    Args:
        model: in memory, on the CPU, with float32, bfloat16 or float16 weights. It is put into evaluation mode.

    Returns:
        The same model.
    """
    if reason := optimize_if_supported(model):
        warnings.warn(f"flashnorm.optimize leaves {type(model).__name__} as it is: {reason}", stacklevel=2)
    return model


def optimize_if_supported(model: PreTrainedModel) -> str | None:
    """`optimize` without a warning: why the model is left as it is, or None if it is not."""
    model.eval()
    restore(model)
    try:
        decoder, refusal = _proven(model)
    except UnsupportedError as reason:
        return str(reason)
    _move_to_large_pages(model)
    install(model, decoder, refusal)
    return None


def _proven(model: PreTrainedModel) -> tuple[Decoder, str | None]:
    """A model's decoder, and why its `generate` keeps Transformers' loop, if it does.

    Raises:
        UnsupportedError: the kernels do not compute what the model's own code computes.
    """
    decoder = read_decoder(model)
    check_supported(decoder)
    return decoder, prove(model, list(kinds_of_layers(model, decoder).values()), install)


def install(model: PreTrainedModel, decoder: Decoder | None = None, refusal: str | None = None) -> None:
    """Put the kernels into a model, without any proof.

    Args:
        model: in memory, on the CPU, in evaluation mode.
        decoder: as it was found in the model, if it was.
        refusal: why its `generate` keeps Transformers' own loop; None if it does not.
    """
    decoder = find_decoder(model) if decoder is None else decoder
    layers: Any = model.base_model.layers
    rotation, settings, sizes = Rotation(), decoder.settings, decoder.sizes
    generate = Generate(model, refusal)
    forwards = [FusedForward(layer, model.config, i, settings, sizes, rotation) for i, layer in enumerate(layers)]
    for layer, forward in zip(layers, forwards, strict=True):
        vars(layer)["forward"] = forward
    vars(model)["generate"] = generate


def restore(model: PreTrainedModel) -> None:
    """Take out what `install` has put in."""
    for module in model.modules():
        for name in ("forward", "generate"):
            if isinstance(vars(module).get(name), Substitute):
                del vars(module)[name]


@dataclass(frozen=True)
class Status:
    """What of a model runs on the fused kernels.

    Attributes:
        layers: for each decoder layer why its own code runs, or None: it runs on the kernels.
        generate: why `generate` runs Transformers' own loop whatever it is asked for; None: it runs ours, for greedy
            and sampled text.
    """

    layers: tuple[str | None, ...]
    generate: str | None

    @property
    def fused_layers(self) -> int:
        """How many layers run on the kernels."""
        return sum(reason is None for reason in self.layers)

    @property
    def in_words(self) -> str:
        """What runs, in one line: the fused kernels, or the model's own code, and why."""
        reasons = [reason for reason in dict.fromkeys((*self.layers, self.generate)) if reason is not None]
        if self.layers and not reasons:
            return "on the fused kernels"
        if not self.fused_layers:
            return f"in plain PyTorch: {reasons[0]}" if reasons else "in plain PyTorch: it has no decoder layers"
        return f"{self.fused_layers} of {len(self.layers)} layers on the fused kernels: {'; '.join(reasons)}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"layers": list(self.layers), "fused_layers": self.fused_layers, "generate": self.generate}

    def __str__(self) -> str:
        lines = [f"layers: {self.fused_layers} of {len(self.layers)} run on the fused kernels"]
        lines += [f"  {reason}" for reason in dict.fromkeys(self.layers) if reason is not None]
        loop = "the fused loop, for greedy and sampled text" if self.generate is None else "Transformers' own loop"
        lines.append(f"generate: {loop}" + (f": {self.generate}" if self.generate else ""))
        return "\n".join(lines)


def status(model: PreTrainedModel) -> Status:
    """Which parts of a model run on the fused kernels just now, and why the others do not.

    Args:
        model: any; `optimize` or `load` may have been called before.
    """
    layers = getattr(model.base_model, "layers", None)
    layers = list(layers) if isinstance(layers, torch.nn.ModuleList) else []
    substitutes = [vars(layer).get("forward") for layer in layers] + [vars(model).get("generate")]
    if not any(isinstance(one, Substitute) for one in substitutes):
        reason = _why_not_optimized(model)
        return Status((reason,) * len(layers), reason)
    *reasons, loop = (one.problem() if isinstance(one, FusedForward | Generate) else _REPLACED for one in substitutes)
    return Status(tuple(reasons), loop)


def _why_not_optimized(model: PreTrainedModel) -> str:
    if model.training:
        return "it is in training mode"
    try:
        _proven(model)
    except UnsupportedError as reason:
        return str(reason)
    return "it was not optimized; flashnorm.optimize(model) does that"


def _move_to_large_pages(model: PreTrainedModel) -> None:
    """Reading all weights once a token is faster by an eighth where one page of memory holds 2 MB of them.

    All of them move, as each may be a view of a mapped file, which would stay in memory for it.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return
    weights = [weight for weight in model.parameters() if not weight.is_inference()]
    sizes = [-(-weight.numel() * weight.element_size() // 64) * 64 for weight in weights]
    memory = mmap.mmap(-1, max(sum(sizes), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    at = 0
    for weight, size in zip(weights, sizes, strict=True):
        place = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=at).view(weight.shape)
        weight.data = place.copy_(weight.data)
        at += size
