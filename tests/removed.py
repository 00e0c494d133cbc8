"""Proofs by numbers that a norm's division cancels, or is needed, which know nothing of how that was found.

What a norm gives (or what a linear layer reads) is multiplied by random positive numbers, one for each token, from 1e-3
to 1e3. That stands for the division, whatever it divides by. If the division cancels, no output changes, once the `eps`
of the second norms is multiplied by the same numbers to the power that is claimed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.removable import Division, Ending, Reader, Removable, Verdict
from flashnorm.verify.float64 import float64_everywhere

LIMIT = 1e-10  # relative to the largest output: what is equal
CHANGE = 1e-6  # what is not
EPS = 0.05  # of every norm while this is proven: as large as the mean squares of tiny models, so that it matters
TINY = 1e-30  # so small that it does not matter
_EPS = ("eps", "variance_epsilon", "norm_eps", "epsilon", "layer_norm_eps", "rms_norm_eps")

Run = Callable[[Any, int], Tensor]


def outputs(model: nn.Module, run: Run) -> Tensor:
    """All outputs of a model for random inputs, in float64 throughout."""
    with torch.no_grad(), float64_everywhere():
        return run(model, 1)


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


class _Scaled:
    """Multiplies the activations of tokens, and the `eps` of the norms behind, while a model runs.

    Attributes:
        numbers: `[batch, tokens]`, made at the first use.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.numbers: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        if self.numbers is None:
            exponents = torch.rand(tensor.shape[:2], generator=self.generator, dtype=torch.float64) * 6 - 3
            self.numbers = 10**exponents
        return spread(self.numbers, tensor.shape)

    def output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A bias of the norm is added behind its division.
        bias = 0 if getattr(module, "bias", None) is None else module.bias
        return (output - bias) * self.of(output) + bias

    def input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0] * self.of(args[0]), *args[1:]


def spread(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """`[batch, tokens]` numbers, in a shape that broadcasts to activations of a shape."""
    batch, tokens = numbers.shape
    if tuple(shape[:2]) == (batch, tokens):
        return numbers.reshape(batch, tokens, *[1] * (len(shape) - 2))
    if len(shape) == 4 and (shape[0], shape[2]) == (batch, tokens):
        return numbers.reshape(batch, 1, tokens, 1)
    if shape[0] == batch * tokens:
        return numbers.reshape(-1, *[1] * (len(shape) - 1))
    raise ValueError(f"no place of tokens is known in {list(shape)}")


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
    """
    scaled = _Scaled(seed=3)
    readers = cancelling(division) if part else division.readers
    hooks: list[Any] = []
    if not part:
        norm = model.get_submodule(division.norm)
        if next(norm.children(), None) is not None:
            raise ValueError(f"{division.norm} does more than to normalise")
        hooks.append(norm.register_forward_hook(scaled.output))
    for reader in readers if part else ():
        linear = model.get_submodule(str(reader.weight).removesuffix(".weight"))
        hooks.append(linear.register_forward_pre_hook(scaled.input))
    endings = {ending.norm: ending for one in readers for ending in one.endings if with_eps}
    restored: list[tuple[nn.Module, str, float]] = []
    for ending in endings.values():
        norm = model.get_submodule(ending.norm)
        name = eps_name(norm)
        if ending.power is None or name is None:
            continue
        restored.append((norm, name, vars(norm)[name]))
        hooks += _scaled_eps(norm, name, ending, scaled)
    try:
        after = outputs(model, run)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, name, eps in restored:
            setattr(norm, name, eps)
    finite = before.isfinite()
    return float((after - before)[finite].abs().max() / before[finite].abs().max())


def _scaled_eps(norm: nn.Module, name: str, ending: Ending, scaled: _Scaled) -> list[Any]:
    eps = vars(norm)[name]

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Here, what is scaled is multiplied by s, not divided by r.
        numbers = scaled.of(args[0]) ** ending.power
        setattr(module, name, eps * numbers)

    def fused(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0] - args[0].mean(-1, keepdim=True) * isinstance(module, nn.LayerNorm)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps * scaled.of(args[0]) ** ending.power)
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
    """What numbers say of each claim: "proven", "WRONG", or why nothing can be said; by norm.

    That a division is needed is proven with tiny `eps`, which take no part in what is scaled then.
    """
    verdicts: dict[str, str] = {}
    before: dict[float, Tensor] = {}
    for division, part, cancels in claims(found):
        eps = EPS if cancels else TINY
        with large_eps(model, eps):
            try:
                if eps not in before:
                    before[eps] = outputs(model, run)
                change = changed(model, run, before[eps], division, part)
            except Exception as error:
                verdict = f"open: {type(error).__name__}: {error}"
            else:
                right = change <= LIMIT if cancels else not change <= CHANGE
                verdict = "proven" if right else f"WRONG: {change:.0e}" if cancels else "open: no output changes"
        verdicts[division.norm + (" in part" if part else "")] = verdict
    return verdicts


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

        def enter(module: nn.Module, args: tuple[Tensor, ...], norm: str = one.norm) -> None:
            mean = args[0].mean(-1).abs().max() / args[0].abs().max()
            means[norm] = max(means.get(norm, 0.0), float(mean))

        hooks.append(model.get_submodule(one.norm).register_forward_pre_hook(enter))
    after = outputs(model, run)
    for hook in hooks:
        hook.remove()
    finite = before.isfinite()
    change = float((after - before)[finite].abs().max() / before[finite].abs().max())
    verdicts: dict[str, str] = {}
    for one in found.centred:
        right = change <= LIMIT and means.get(one.norm, 0.0) <= LIMIT
        ran = "proven" if one.norm in means else "open: it does not run"
        verdicts[one.norm] = ran if right else f"WRONG: {change:.0e}"
    return verdicts
