"""Puts an identity in the place of each norm whose division cancels; the norms behind it take over its `eps`.

* With `q = W x`: `(q / r) / sqrt(mean((q / r)^2) + eps) = q / sqrt(mean(q^2) + eps * r^2)`. `r^2` is the mean square of
  `x` plus the first norm's own `eps`: one number for each token, which is kept for the norms behind.
* These norms can be computed at any time, and the outputs are the same. They are computed where the identity may be
  wrong (with an adapter, which may have biases) or too large (in float16: what is not divided can be out of its range).
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flashnorm.models.weightless import measured, same_outputs
from flashnorm.plan import Cancelled, Ending, Form


class CancelledNorm(nn.Module):
    """The identity, in the place of `x / sqrt(mean(x^2) + eps)` over the last dimension.

    Args:
        eps: what the norm adds to the mean square.
        form: what becomes of the `eps` of the norms behind.

    Attributes:
        computed: whether it is the norm after all.
    """

    # Called before each forward; see `adapters.py`.
    guard: Callable[[], object] | None = None

    def __init__(self, eps: float, form: Form):
        super().__init__()
        self.eps, self.form, self.computed = eps, form, False
        self.register_parameter("weight", None)
        self._squares: dict[int, Tensor | None] = {}  # of the last call in each thread

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., hidden size]`, as they are."""
        if self.guard is not None and not torch.compiler.is_compiling():
            self.guard()
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        computed = self.computed or hidden_states.dtype == torch.float16
        exact = self.form is Form.EXACT and not computed
        self._squares[_thread()] = wide.pow(2).mean(-1, keepdim=True) + self.eps if exact else None
        if computed:
            return F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(hidden_states.dtype)
        return hidden_states

    @property
    def squares(self) -> Tensor | None:
        """`r^2` of each token of the last call in this thread, `[..., 1]`; None if `eps` stays as it is."""
        return self._squares[_thread()]

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no last call."""
        return self.__dict__ | {"_squares": {}}

    def extra_repr(self) -> str:
        return f"eps={self.eps}, form={self.form.value}, computed={self.computed}"


class EndingNorm(nn.Module):
    """`(offset + weight) * q / sqrt(mean(q^2) + eps * r^power)` over the last dimension, `r` being a cancelled norm's.

    Args:
        eps: added to the mean square, with `r`.
        offset: 0.0, or 1.0 for gains like Gemma's.
        weight: `[head size]`, or None.
    """

    weight: nn.Parameter | None

    def __init__(self, eps: float, offset: float = 0.0, weight: nn.Parameter | None = None):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.register_parameter("weight", weight)
        self.power, self.dims = 0.0, ()
        self._of: list[CancelledNorm] = []  # in a list, it is no submodule

    def takes_over(self, norm: CancelledNorm, ending: Ending) -> None:
        """Take over the `eps` of a cancelled norm."""
        self._of, self.power, self.dims = [norm], ending.power, ending.dims

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[..., head size]`; the result has the same shape and dtype."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps_of(wide))
        if self.weight is not None:
            normed = normed * (self.offset + self.weight.to(wide.dtype) if self.offset else self.weight.to(wide.dtype))
        return normed.to(hidden_states.dtype)

    def eps_of(self, wide: Tensor) -> Tensor | float:
        """What is added to the mean square of each token of an input, `[..., 1]`."""
        squares = self._of[0].squares if self._of else None
        if squares is None:
            return self.eps
        shape = [1] * wide.dim()
        for dim, size in zip(self.dims, squares.shape, strict=False):
            shape[dim] = size
            if wide.shape[dim] != size:
                raise RuntimeError(f"expected {size} tokens along dimension {dim}, found {list(wide.shape)}")
        return self.eps * squares.to(wide.device).pow(self.power / 2).view(shape)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, power={self.power:g}"


def cancel_norms(model: nn.Module, cancelled: Cancelled) -> list[str]:
    """Replace cancelled norms, and in the exact form the norms behind them, in place.

    Args:
        model: the model, whose norms have lost their gains.
        cancelled: which norms, and how.

    Returns:
        The cancelled norms that were replaced. Where a module is no RMSNorm of a known kind, the norm is computed.
    """
    replaced: list[str] = []
    for name, ends in cancelled.norms.items():
        eps = _plain(model.get_submodule(name))
        behind = [_with_eps(model.get_submodule(one.norm)) for one in ends] if cancelled.form is Form.EXACT else []
        if eps is None or cancelled.form is None or None in behind:
            continue
        norm = CancelledNorm(eps, cancelled.form)
        _replace(model, name, norm)
        for ending, one in zip(ends, behind, strict=False):
            assert one is not None
            one.takes_over(norm, ending)
            _replace(model, ending.norm, one)
        replaced.append(name)
    return replaced


def compute_norms(model: nn.Module) -> None:
    """Make every `CancelledNorm` of a model compute its norm, for good."""
    for module in model.modules():
        if isinstance(module, CancelledNorm):
            module.computed = True


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner = model.get_submodule(name)
    # Code around the norm may read its settings.
    settings = {key: value for key, value in vars(owner).items() if not key.startswith("_")}
    vars(module).update(settings | vars(module))
    module.training = owner.training
    model.set_submodule(name, module)


def _plain(module: nn.Module) -> float | None:
    """The `eps` of an RMSNorm without parameters; None if the module is no such norm."""
    found = _with_eps(module)
    return found.eps if found is not None and found.weight is None else None


def _with_eps(module: nn.Module) -> EndingNorm | None:
    """An `EndingNorm` that computes what a module computes, as measured; None if there is none."""
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters.keys() <= {"weight"} or any(parameter.dim() != 1 for parameter in parameters.values()):
        return None
    channels = next((parameter.numel() for parameter in (*parameters.values(), *module.buffers(recurse=False))), 64)
    generator = torch.Generator("cpu").manual_seed(1)
    values = {name: torch.rand(p.shape, generator=generator, device="cpu") for name, p in parameters.items()}
    expected = measured(module, values, channels)
    if expected is None:
        return None
    for eps in sorted({value for value in vars(module).values() if isinstance(value, float)}):
        for offset in (0.0, 1.0) if parameters else (0.0,):
            candidate = EndingNorm(eps, offset, parameters.get("weight"))
            found = measured(candidate, values, channels)
            if found is not None and all(map(same_outputs, found, expected)):
                return candidate
    return None
