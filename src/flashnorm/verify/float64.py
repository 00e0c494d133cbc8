"""Runs PyTorch code in true float64, including the parts that it casts to narrower dtypes.

* Modelling code computes norms, softmax and RoPE angles in float32 whatever the model's dtype is: `.float()`,
  `.to(torch.float32)`, `dtype=torch.float32`. Under `float64_everywhere` these casts give float64, so that two runs can
  be compared to 1e-10 and one of them can be the reference for the other.
* Stored values do not change: RoPE frequencies that were stored as float32 keep their values, and only the arithmetic
  on them is float64. Convert the model itself with `model.double()`.
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

# Methods whose name says their dtype.
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
_LEGACY_NAMES = {f"torch.{name}Tensor": "torch.DoubleTensor" for name in ("Float", "Half", "BFloat16")}


class _Float64Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        if func is torch.Tensor.view:  # reinterprets the bits as another dtype, which is no cast
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

    Existing tensors are not widened, so the model must be in float64 already. `torch.compile` is not supported.

    The default dtype is float64 in the block and is restored at the end, also after an error. It has to change because
    some operators read it in C++, where a function mode cannot replace it: the quotient of two integer tensors, or an
    integer tensor times a Python float. PyTorch has one default dtype for the process, so tensors that other threads
    make meanwhile are float64 as well. Casts are replaced in the calling thread only.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Mode():
            yield
    finally:
        torch.set_default_dtype(before)
