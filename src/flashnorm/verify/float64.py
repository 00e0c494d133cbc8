"""Runs PyTorch code in true float64, including what it casts to narrower types inside.

* Modelling code computes its norms, softmax and rotary angles in float32 whatever the model's dtype is: `.float()`,
  `.to(torch.float32)`, `dtype=torch.float32`. Under `float64_everywhere` those give float64, so that two runs can be
  compared to 1e-10 and one of them can be the oracle for the other.
* What a tensor holds stays: rotary frequencies that were stored as float32 are those numbers, only the arithmetic on
  them is float64. Move the model itself with `model.double()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flashnorm.compat.torch import TorchFunctionMode

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}

# Methods that name their dtype by themselves.
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
_LEGACY_NAMES = {f"torch.{name}Tensor": "torch.DoubleTensor" for name in ("Float", "Half", "BFloat16")}


class _Float64Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        if func is torch.Tensor.view:  # reads the same bits as another dtype, which is no cast
            return func(*args, **(kwargs or {}))
        widened = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*(_widen(value) for value in args), **widened)


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    if isinstance(value, str):
        return _LEGACY_NAMES.get(value, value)
    return value


@contextmanager
def float64_everywhere() -> Iterator[None]:
    """Within the block, every cast to a narrower floating type gives float64, and so does every new tensor.

    Makes no tensor wider that is not touched by a cast: run a model that is in float64 already. Not for
    `torch.compile`. The default dtype, which is one for the whole process, is float64 meanwhile.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Mode():
            yield
    finally:
        torch.set_default_dtype(before)
