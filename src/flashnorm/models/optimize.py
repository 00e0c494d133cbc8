"""`flashnorm.optimize`: makes a Transformers model run on the fused kernels; `status.py` says which parts do."""

import importlib.util
import warnings
from collections.abc import Callable

from transformers import PreTrainedModel

from flashnorm.cpu import optimize as for_cpu
from flashnorm.decoding.decoder import UnsupportedError


def optimize(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model run on the fused kernels. A model that they do not support is left as it is, with a warning.

    First, a layer of each kind is compared with the formula that the kernels implement, and a small copy of the model
    runs with and without the kernels, in the ways in which models are used; all results must agree. The weights remain
    the model's parameters. Folded and unfolded models are equally fast: the kernels apply an unfolded gain while they
    read the activations.

    On the CPU, the weights are moved once into memory with large pages. On a GPU, the kernels run behind `generate` for
    one sequence, from its second token on; everything else stays Transformers' own.

    Args:
        model: the model, in memory, on the CPU or on one GPU, with float32, bfloat16 or float16 weights. It is put into
            evaluation mode.

    Returns:
        The same model.
    """
    if reason := optimize_if_supported(model):
        warnings.warn(f"flashnorm.optimize leaves {type(model).__name__} as it is: {reason}", stacklevel=2)
    return model


def optimize_if_supported(model: PreTrainedModel) -> UnsupportedError | None:
    """`optimize` without a warning: returns why the model is left as it is, or None if it was optimized."""
    if on_gpu(model):
        if (reason := _without_triton()) is not None:
            return reason
        from flashnorm.gpu import optimize as for_gpu

        return for_gpu.optimize_if_supported(model)
    return for_cpu.optimize_if_supported(model)


def problem(model: PreTrainedModel) -> UnsupportedError | None:
    """Why the kernels do not fit a model, which is not changed; None if they do."""
    if on_gpu(model):
        if (reason := _without_triton()) is not None:
            return reason
        from flashnorm.gpu.optimize import proven

        prove: Callable[[PreTrainedModel], object] = proven
    else:
        prove = for_cpu.proven
    try:
        prove(model)
    except UnsupportedError as reason:
        return reason
    return None


def on_gpu(model: PreTrainedModel) -> bool:
    """Whether a model is for the GPU's kernels."""
    return model.device.type == "cuda"


def _without_triton() -> UnsupportedError | None:
    if importlib.util.find_spec("triton") is not None:
        return None
    return UnsupportedError("expected the package triton, which compiles the kernels for a GPU, found none")
