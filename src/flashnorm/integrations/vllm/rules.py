"""The plugin's decisions that do not need vLLM: which versions and uses are refused, and which names match."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import Tensor

from flashnorm.errors import InputError

# The oldest version that is tested; it is among the first for the PyTorch that flashnorm needs.
OLDEST = "0.27.1"

# Compiler passes whose fused operators need a norm's weight. The first one is for quantised linear layers.
_PASSES_WITH_WEIGHT = (
    "fuse_norm_quant",
    "fuse_allreduce_rms",
    "enable_sp",
    "fuse_gemm_comms",
    "fuse_act_padding",
    "fuse_mla_dual_rms_norm",
)

# Draft methods that do not read the target's hidden states.
_INDEPENDENT_DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model")

# Load formats that build models or read weights in another way than from the checkpoint's files.
_OTHER_LOADERS = ("tensorizer", "ipc_cache", "modelexpress")


def unsupported(version: str) -> str | None:
    """Why a version of vLLM cannot be used, or None. A version that is no number is a custom build, and accepted."""
    try:
        known = Version(version)
    except InvalidVersion:
        return None
    if known.release < Version(OLDEST).release and known.release > (0, 1):
        return f"expected vLLM {OLDEST} or newer, found {version}; install a newer vLLM, or use Transformers"
    return None


def differs(version: str, part: str) -> str:
    """Why a version of vLLM cannot be used although its number is supported.

    Args:
        version: vLLM's version.
        part: the part of vLLM that differs from what the plugin expects.
    """
    return (
        f"expected a vLLM that loads models in a way that is known, found version {version}, which differs ({part}); "
        "use another release of vLLM, or of flashnorm"
    )


def parameter_of(tensor: str, parameters: Collection[str]) -> str | None:
    """The parameter of a vLLM model that a checkpoint tensor is loaded into, found by name.

    Args:
        tensor: the tensor's name, after the model's own renaming.
        parameters: names of the model's parameters, which may have a longer or a shorter prefix than the checkpoint.

    Returns:
        The parameter with this name; else the only parameter whose name ends with it, or is its ending; else None.
    """
    if tensor in parameters:
        return tensor
    found = [name for name in parameters if name.endswith("." + tensor) or tensor.endswith("." + name)]
    return found[0] if len(found) == 1 else None


def on_other_stage(tensor: str, missing: Iterable[str]) -> bool:
    """Whether a tensor belongs to a module on another pipeline stage; `missing` has the names of those modules."""
    parts = tensor.split(".")
    prefixes = {".".join(parts[:count]) for count in range(1, len(parts))}
    return any(
        layer.rstrip(".") in prefixes or any(layer.rstrip(".").endswith("." + prefix) for prefix in prefixes)
        for layer in missing
    )


def outside_layers(norms: Iterable[str]) -> list[str]:
    """The norms that are in no numbered layer, such as the final norm."""
    return [name for name in norms if not any(part.isdigit() for part in name.split("."))]


def refusal(
    norms: Iterable[str], *, runner: str, draft: str | None, load_format: str, centred: bool = False
) -> str | None:
    """Why vLLM cannot use a FlashNorm checkpoint in this way, or None.

    Args:
        norms: names of the weightless norms.
        runner: vLLM's runner: "generate", "pooling" or "draft".
        draft: the method of speculative decoding, or None.
        load_format: vLLM's load format.
        centred: whether weights are centred. To vLLM, the model is one of LayerNorms all the same.
    """
    final = outside_layers(norms)
    if load_format in _OTHER_LOADERS:
        return f"expected a loader that reads the checkpoint's files, found --load-format {load_format}; leave it out"
    if centred and draft is not None and draft not in _INDEPENDENT_DRAFTS:
        return (
            f"expected a draft that reads neither the model's embedding nor its hidden states, found the method "
            f"{draft}; their means, which it would read, are subtracted: use {', '.join(_INDEPENDENT_DRAFTS[2:])} or "
            "ngram, or convert the source without --center"
        )
    if final and draft is not None and draft not in _INDEPENDENT_DRAFTS:
        return (
            f"expected a draft that does not read the model's hidden states, found the method {draft}; the gain of "
            f"{final[0]}, whose output it would read, is in the output head: use {', '.join(_INDEPENDENT_DRAFTS[2:])} "
            "or ngram, or convert the source with --keep final"
        )
    if final and runner == "pooling":
        return (
            f"expected a model that generates, found one that pools hidden states; the gain of {final[0]}, whose "
            "output would be pooled, is in the output head: convert the source with --keep final"
        )
    return None


def fused_with_weight(passes: Any, *, compiled: bool, quantized: bool) -> bool:
    """Whether norms should pass a constant weight, because a compiler pass would not fuse them without one.

    Args:
        passes: vLLM's `PassConfig`.
        compiled: whether vLLM's compiler runs; otherwise its passes do not run either.
        quantized: whether the linear layers are quantised.
    """
    chosen = [name for name in _PASSES_WITH_WEIGHT if getattr(passes, name, None)]
    return compiled and bool(chosen) and (quantized or chosen != ["fuse_norm_quant"])


def without_folded(weights: Iterable[tuple[str, Tensor]], norms: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors without the tensors of folded norms, which `--keep-norms` writes.

    Args:
        weights: name and value of each tensor.
        norms: name of a folded norm's tensor -> its identity value.

    Raises:
        InputError: the tensor of a folded norm is not at its identity value.
    """
    for name, tensor in weights:
        if name not in norms:
            yield name, tensor
        elif not bool((tensor == norms[name]).all()):
            raise InputError(
                f"expected {name} at {norms[name]:g}, because config.json says that it is folded, found other values: "
                "the model was trained since it was converted; convert it again, which folds these norms, too"
            )
