"""Every model type of Transformers. What must be so before Transformers is imported is done here.

timm imports torchvision, and PyPI has torchvision for CUDA only. Its compiled operators do not load beside a PyTorch
for the CPU, and its Python part then fails where it describes two of them. So they are declared, without an
implementation: timm calls none of them.
"""

import importlib.util
from pathlib import Path

import torch

_DESCRIBED = ("nms", "qnms")


def _declare_operators_of_torchvision() -> torch.library.Library | None:
    """The library of declared operators: they exist as long as it does. None if they are not needed."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    try:
        torch.ops.load_library(Path(found.origin).parent / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in _DESCRIBED:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_DECLARED = _declare_operators_of_torchvision()
