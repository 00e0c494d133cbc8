"""Proofs by numbers that a norm's division cancels, or is needed, which know nothing of how that was found.

What a norm divides (or what a linear layer reads) is multiplied by random positive numbers, one for each token, from
1e-3 to 1e3. That stands for the division, whatever it divides by. If the division cancels, no output changes, once the
`eps` of the second norms is multiplied by the same numbers to the power that is claimed.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashnorm.removable import Division, Ending, Reader, Removable, Verdict
from flashnorm.verify.float64 import float64_everywhere

LIMIT = 1e-10  # relative to the largest output: what is equal
CHANGE = 1e-6  # what is not
EPS = 0.05  # of every norm while this is proven: as large as the mean squares of tiny models, so that it matters
TINY = 1e-30  # so small that it does not matter
BUT_FOR_EPS = "proven with an eps of zero"
MASKED = 1e30  # scores beyond this are those of masked positions
_EPS = ("eps", "variance_epsilon", "norm_eps", "epsilon", "layer_norm_eps", "rms_norm_eps")

aten = torch.ops.aten
_NORMS = (aten.native_layer_norm, aten._fused_rms_norm)
_DIVISIONS = (aten.mul, aten.mul_, aten.div, aten.div_)
_CHOICES = {"topk", "sort", "argsort", "argmax"}

Run = Callable[[Any, int], Tensor]


def outputs(model: nn.Module, run: Run) -> Tensor:
    """All outputs of a model for random inputs, and whatever a choice is made from; in float64 throughout."""
    with torch.no_grad(), float64_everywhere(), _Scores() as mode:
        found = run(model, 1)
    return torch.cat([found, *(one.flatten() for one in mode.scores)])


class _Scores(TorchFunctionMode):
    """Records what choices are made from (experts, tokens): a scale of it shows nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _CHOICES and args and args[0].is_floating_point():
            self.scores.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


@contextmanager
def large_eps(model: nn.Module, eps: float = EPS) -> Iterator[None]:
    """Give every norm of a model this `eps` in the block."""
    changed = [(module, name, vars(module)[name]) for module in model.modules() if (name := eps_name(module))]
    for module, name, _ in changed:
        setattr(module, name, eps)
    try:
        yield
    finally:
        for module, name, old in changed:
            setattr(module, name, old)


def eps_name(module: nn.Module) -> str | None:
    """The attribute that holds a norm's `eps`; None if the module has none of its own."""
    return next((name for name in _EPS if isinstance(vars(module).get(name), float)), None)


class _Numbers:
    """Random numbers for tokens, the same ones wherever as many tokens are met."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._of: dict[int, Tensor] = {}

    def of(self, shape: Sequence[int]) -> Tensor:
        """Numbers from 0.001 to 1000, in the shape of the tokens."""
        count = math.prod(shape)
        if count not in self._of:
            exponents = torch.rand(count, generator=self._generator, dtype=torch.float64) * 6 - 3
            self._of[count] = 10**exponents
        return self._of[count].view(*shape)

    def placed(self, shape: Sequence[int], dims: Sequence[int] | None) -> Tensor:
        """The numbers of tokens that run along these dimensions of a shape, so that they broadcast to it."""
        if dims is None or math.prod(shape[dim] for dim in dims) not in self._of:
            raise ValueError(f"no place of tokens is known in {list(shape)}")
        numbers = self.of([shape[dim] for dim in dims])
        order = sorted(range(len(dims)), key=lambda i: dims[i])
        return numbers.permute(order).reshape([size if dim in dims else 1 for dim, size in enumerate(shape)])


class _AtDivision(TorchDispatchMode):
    """Multiplies what one norm of a model divides by random numbers, at the line of code that divides.

    Attributes:
        inside: whether the norm's module is running.
        met: how often the division ran.
    """

    def __init__(self, model: nn.Module, where: str, numbers: _Numbers) -> None:
        super().__init__()
        self._line = where.rpartition("(")[2].removesuffix(")")
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._numbers = numbers
        self.inside, self.met = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if not (self.inside and operator in (*_NORMS, *_DIVISIONS) and self._is_here()):
            return out
        if operator in _NORMS:
            self.met += 1
            read, normalised = args[:2]
            bias = args[3] if operator is aten.native_layer_norm and args[3] is not None else 0.0
            outer = read.shape[: read.dim() - len(normalised)]
            # A bias of the norm is added behind its division.
            scaled = (out[0] - bias) * self._numbers.of([*outer, *[1] * len(normalised)]) + bias
            return (scaled, *out[1:])
        if (
            self.inside
            and operator in _DIVISIONS
            and self._is_here()
            and (shape := self._tokens(out, args)) is not None
        ):
            self.met += 1
            numbers = self._numbers.of(shape)
            return out.mul_(numbers) if out is args[0] else out * numbers
        return out

    def _is_here(self) -> bool:
        frame = sys._getframe(2)
        while frame is not None:
            if f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" == self._line:
                return True
            frame = frame.f_back
        return False

    def _tokens(self, out: Tensor, args: Sequence[Any]) -> list[int] | None:
        """The shape of the tokens of a division, by one number for many channels; None if it is another product."""
        for one in args[:2]:
            if not isinstance(one, Tensor) or one.dim() != out.dim() or not one.is_floating_point():
                continue
            shape = [1 if stride == 0 else size for size, stride in zip(one.shape, one.stride(), strict=True)]
            of_model = one.untyped_storage().data_ptr() in self._parameters
            if math.prod(shape) < out.numel() and not of_model:
                return shape
        return None


def changed(
    model: nn.Module, run: Run, before: Tensor, division: Division, part: bool = False, with_eps: bool = True
) -> float:
    """The largest change of any output, relative to the largest, if a division is scaled.

    Args:
        model, run: the model, and what gives all its outputs.
        before: its outputs as it is.
        division: the norm whose output is scaled.
        part: scale only what those linear layers read behind which it cancels.
        with_eps: whether the `eps` of the norms behind is scaled as claimed.

    Raises:
        ValueError: the division does not run, or tokens are not where they are expected.
    """
    numbers = _Numbers(seed=3)
    scaled = _AtDivision(model, division.where or "", numbers)
    hooks: list[Any] = []
    for reader in cancelling(division) if part else ():
        linear = model.get_submodule(str(reader.weight).removesuffix(".weight"))
        hooks.append(
            linear.register_forward_pre_hook(
                lambda _, args: (args[0] * numbers.of([*args[0].shape[:-1], 1]), *args[1:])
            )
        )
    if not part:
        norm = model.get_submodule(division.norm)
        hooks.append(norm.register_forward_pre_hook(lambda *_: setattr(scaled, "inside", scaled.inside + 1)))
        hooks.append(norm.register_forward_hook(lambda *_: setattr(scaled, "inside", scaled.inside - 1)))
    readers = cancelling(division) if part else division.readers
    endings = {ending.norm: ending for one in readers for ending in one.endings if with_eps}
    restored: list[tuple[nn.Module, str, float]] = []
    for ending in endings.values():
        norm = model.get_submodule(ending.norm)
        name = eps_name(norm)
        if ending.power is None or name is None:
            continue
        restored.append((norm, name, vars(norm)[name]))
        hooks += _scaled_eps(norm, name, ending, numbers)
    try:
        with scaled:
            after = outputs(model, run)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, name, eps in restored:
            setattr(norm, name, eps)
    if not (part or scaled.met):
        raise ValueError("its division does not run")
    return difference(before, after)


def difference(before: Tensor, after: Tensor) -> float:
    """The largest difference of outputs, relative to the largest; of numbers, and not of what is masked."""
    numbers = before.isfinite() & (before.abs() < MASKED)
    return float((after - before)[numbers].abs().max() / before[numbers].abs().max())


def _scaled_eps(norm: nn.Module, name: str, ending: Ending, numbers: _Numbers) -> list[Any]:
    eps = vars(norm)[name]

    def scaled(x: Tensor) -> Tensor:
        # Here, what is scaled is multiplied by s, not divided by r.
        return eps * numbers.placed(x.shape, ending.dims) ** ending.power

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        setattr(module, name, scaled(args[0]))

    def fused(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0] - args[0].mean(-1, keepdim=True) * isinstance(module, nn.LayerNorm)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + scaled(args[0]))
        x = x if module.weight is None else x * module.weight
        return x if getattr(module, "bias", None) is None else x + module.bias

    if type(norm).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return [norm.register_forward_hook(fused)]
    return [norm.register_forward_pre_hook(enter)]


def cancelling(division: Division) -> list[Reader]:
    """The linear layers behind which all of a division cancels."""
    return [one for one in division.readers if one.weight and one.endings and not one.escapes]


def claims(found: Removable) -> list[tuple[Division, bool, bool]]:
    """What is claimed: a division, whether it is only about a part of its readers, and whether it cancels there."""
    made: list[tuple[Division, bool, bool]] = []
    for division in found.divisions:
        if division.verdict is not Verdict.UNREAD:
            made.append((division, False, division.verdict is Verdict.CANCELS))
        if division.verdict is Verdict.IN_PART and cancelling(division):
            made.append((division, True, True))
    return made


def prove(model: nn.Module, found: Removable, run: Run) -> dict[str, str]:
    """What numbers say of each claim: "proven", `BUT_FOR_EPS`, "WRONG", or why nothing can be said; by norm.

    That a division is needed is proven with tiny `eps`, which take no part in what is scaled then.
    """
    verdicts: dict[str, str] = {}
    before: dict[float, Tensor] = {}

    def change(division: Division, part: bool, eps: float, with_eps: bool) -> float:
        with large_eps(model, eps):
            if eps not in before:
                before[eps] = outputs(model, run)
            return changed(model, run, before[eps], division, part, with_eps)

    for division, part, cancels in claims(found):
        try:
            if not cancels:
                verdict = "proven" if not change(division, part, TINY, True) <= CHANGE else "open: no output changes"
            elif not _knows_eps(cancelling(division) if part else division.readers):
                found_change = change(division, part, TINY, False)
                verdict = BUT_FOR_EPS if found_change <= LIMIT else f"WRONG: {found_change:.0e}"
            else:
                found_change = change(division, part, EPS, True)
                verdict = "proven" if found_change <= LIMIT else f"WRONG: {found_change:.0e}"
        except Exception as error:
            verdict = f"open: {type(error).__name__}: {error}"
        # A module may divide at several places.
        name = division.norm + (" in part" if part else "")
        verdicts[name if name not in verdicts else f"{name} at {division.where}"] = verdict
    return verdicts


def _knows_eps(readers: Iterable[Reader]) -> bool:
    """Whether it is known of which tokens each norm behind takes over the `eps`."""
    endings = [ending for reader in readers for ending in reader.endings]
    return all(ending.power is None or ending.dims is not None for ending in endings)


def prove_centred(model: nn.Module, found: Removable, run: Run) -> dict[str, str]:
    """What numbers say of each LayerNorm that is claimed to become an RMSNorm, by norm.

    All writers are centred, for good. Then what the LayerNorm reads must have a mean of zero, and no output may change.
    """
    before = outputs(model, run)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for writer in dict.fromkeys(writer for one in found.centred for writer in one.writers):
            parameter = parameters[writer.name]
            parameter -= parameter.mean(writer.axis, keepdim=True)
    means: dict[str, float] = {}
    hooks: list[Any] = []
    for one in found.centred:
        sizes = {parameters[writer.name].shape[writer.axis] for writer in one.writers}

        def enter(module: nn.Module, args: tuple[Tensor, ...], norm: str = one.norm, sizes: Any = sizes) -> None:
            # Images may have their channels first.
            dims = [dim for dim, size in enumerate(args[0].shape) if size in sizes]
            mean = min(float(args[0].mean(dim).abs().max()) for dim in dims) / float(args[0].abs().max())
            means[norm] = max(means.get(norm, 0.0), mean)

        hooks.append(model.get_submodule(one.norm).register_forward_pre_hook(enter))
    after = outputs(model, run)
    for hook in hooks:
        hook.remove()
    change = difference(before, after)
    verdicts: dict[str, str] = {}
    for one in found.centred:
        right = change <= LIMIT and means.get(one.norm, 0.0) <= LIMIT
        ran = "proven" if one.norm in means else "open: it does not run"
        verdicts[one.norm] = ran if right else f"WRONG: {change:.0e}"
    return verdicts
