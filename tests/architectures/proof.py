"""Proves by numbers, without any tracing, that a norm cannot be folded; or shows that it can.

* A norm's gain `g` folds into slices of weights if and only if the model has a scaling symmetry: `g_k -> s_k g_k` with
  `W[..., k, ...] -> W[..., k, ...] / s_k` for these slices leaves every output as it is (`s = 1/g` is the fold).
* At `s = 1` the derivative of any functional `L` of the outputs then gives, for every channel `k`, the linear equation
  `g_k dL/dg_k = sum over the slices of sum(W * dL/dW at channel k)`.
* Random `L` and inputs give twice as many equations as there are slices that could take the gain. If least squares
  over all of them leaves a residual, then no set of them works, whatever the code of the model looks like.
* If nothing is left, the slices of a solution in zeros and ones take the gain for real, and the outputs are compared.
  If there is none, the same with minus ones: those slices are divided by the gain. If those change the outputs as
  well, the slices take the gain's magnitudes, and its signs stay: a ReLU passes positive numbers only, and a plan is
  made without knowing the signs.
* What a choice is made from (`topk` of scores) counts as an output: the choice itself has no derivative. A fold leaves
  it as it is, too; of a norm on which nothing but choices depends, it is all that there is to see.

Slices that could take a gain of `n` channels are those along any axis of any weight: all of it, any of its runs of `n`
channels or groups of equal channels, its first or last `n` channels; in a smaller axis, any run of the gain's channels.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from flashnorm.errors import brief
from flashnorm.plan import FoldPlan, Linear
from flashnorm.trace.solve import segments_of
from flashnorm.trace.values import UNKNOWN
from flashnorm.verify.float64 import float64_everywhere

Run = Callable[[PreTrainedModel, int], Tensor]

SEEDS = (1, 2, 3, 4)
NO_SOLUTION = 1e-9  # relative residuals above this are no rounding errors
SOLUTION = 1e-11  # and below this, nothing else
SAME = 1e-9  # relative difference of outputs that are the same
NO_FACTOR = 1e-3  # factors this near to another number are that number
NO_EFFECT = 1e-12  # of the largest sensitivity of all
MOST_PARTS = 8  # into how many weights a gain may be split
MOST_RUNS = 64  # how many times a gain may fit into an axis; longer axes count words
MOST_FREE = 7  # dimensions of the null space in which solutions in zeros and ones are looked for
STEPS = (1e-6, 1e-7, 1e-8)  # relative to the parameters, of the differences that gradients are compared with
MASKED = 1e30  # scores beyond this are those of masked positions

_CHOICES = {"topk", "sort", "argsort", "argmax", "max"}


@dataclass(frozen=True)
class Proof:
    """What the numbers say about a norm.

    Attributes:
        norm: the norm's weight.
        verdict: "impossible" (no weights can take the gain), "possible" (`into` took it, and the outputs are the same),
            "possible by division" (the same, with `divided` divided by it), "possible up to signs" (the same, with the
            gain's magnitudes), "no effect" (no output depends on it) or "undecided".
        residual: what least squares leaves of the gain's sensitivity, relative to it.
        into: the weights that took the gain, if possible.
        divided: the weights that were divided by it.
        vectors: other vectors of its size (gains, biases) that could take the gain, with or without weights, if
            weights alone cannot. Nothing folds into those.
        note: what is special about it, or why it is undecided.
    """

    norm: str
    verdict: str
    residual: float = math.nan
    into: tuple[Linear, ...] = ()
    divided: tuple[Linear, ...] = ()
    vectors: tuple[str, ...] = ()
    note: str = ""


def prove(model: PreTrainedModel, plan: FoldPlan, run: Run) -> dict[str, Proof]:
    """Judge every norm that a plan keeps.

    Args:
        model: in float64 and evaluation mode, with weights that are not special in any way. It is left as it was.
        plan: of the same model.
        run: the outputs for a seeded random input, differentiable in the parameters.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: threads would mostly wait for each other
    try:
        return _prove(model, plan, run)
    finally:
        torch.set_num_threads(threads)


def _prove(model: PreTrainedModel, plan: FoldPlan, run: Run) -> dict[str, Proof]:
    if not plan.kept:
        return {}
    parameters = dict(model.named_parameters())
    norms = {*plan.kept, *(fold.norm for fold in plan.folds)}
    weights = {name: parameter for name, parameter in parameters.items() if parameter.dim() >= 2 and name not in norms}
    candidates = {n: _candidates(weights, n) for n in {parameters[norm].numel() for norm in plan.kept}}
    try:
        with _all_differentiable(parameters), torch.autograd.graph.allow_mutation_on_saved_tensors():
            sensitivities = _sensitivities(model, run, candidates)
    except (RuntimeError, ValueError, AssertionError) as error:
        note = f"{type(error).__name__}: {brief(error)}"
        return {norm: Proof(norm, "undecided", note=note) for norm in plan.kept}
    proofs: dict[str, Proof] = {}
    for n, slices in candidates.items():
        equations = _Equations(model, run, sensitivities, n, slices)
        proofs |= {norm: equations.judge(norm) for norm in plan.kept if parameters[norm].numel() == n}
    return {norm: proofs[norm] for norm in plan.kept}


# --- what could take a gain


@dataclass(frozen=True)
class _Slices:
    """An axis of a parameter that may take a gain: `channels[i]` is the gain's channel for its index `i`, or -1."""

    name: str
    axis: int
    channels: Tensor


def _candidates(weights: Mapping[str, Tensor], n: int) -> list[_Slices]:
    """Everything that could take a gain of `n` channels, or a part of it."""
    return [
        _Slices(name, axis, channels)
        for name, weight in weights.items()
        for axis, size in enumerate(weight.shape)
        for channels in _channel_maps(size, n)
    ]


def _channel_maps(size: int, n: int) -> Iterator[Tensor]:
    def run(axis_start: int, gain_start: int, length: int) -> Tensor:
        channels = torch.full((size,), UNKNOWN)
        channels[axis_start : axis_start + length] = torch.arange(gain_start, gain_start + length)
        return channels

    if size > MOST_RUNS * n:
        return
    if size % n == 0:
        yield from (run(start, 0, n) for start in range(0, size, n))
        if size > n:
            yield torch.arange(n).repeat_interleave(size // n)
    elif size > n:
        yield run(0, 0, n)
        yield run(size - n, 0, n)
    elif n % size == 0 and n // size <= MOST_PARTS:
        yield from (run(0, start, size) for start in range(0, n, size))


def _linears(chosen: Sequence[_Slices], n: int) -> tuple[Linear, ...] | None:
    """As a plan would name them. None if a channel would take two gains."""
    channels: dict[tuple[str, int], Tensor] = {}
    for slices in chosen:
        before = channels.setdefault((slices.name, slices.axis), torch.full_like(slices.channels, UNKNOWN))
        if ((before != UNKNOWN) & (slices.channels != UNKNOWN)).any():
            return None
        channels[slices.name, slices.axis] = torch.maximum(before, slices.channels)
    return tuple(Linear(name, axis, segments_of(index, n)) for (name, axis), index in channels.items())


# --- sensitivities


@dataclass(frozen=True)
class _Sensitivities:
    """Of `F` functionals of the outputs.

    Attributes:
        scaling: `(weight, axis) -> [F, size]`, the sum of `W * dL/dW` over all other axes.
        gradient: `vector -> [F, n]`, `dL/dw` of everything that has the size of a gain.
    """

    scaling: Mapping[tuple[str, int], Tensor]
    gradient: Mapping[str, Tensor]


def _sensitivities(model: PreTrainedModel, run: Run, candidates: Mapping[int, Sequence[_Slices]]) -> _Sensitivities:
    """Random functionals of the outputs for several random inputs, differentiated: two equations an unknown.

    Raises:
        RuntimeError: autograd does not work for this model.
        ValueError: its gradients are not those of the outputs: something is hidden from autograd.
    """
    parameters = dict(model.named_parameters())
    vectors = {name: p.numel() for name, p in parameters.items() if p.numel() in candidates}
    sizes = list(vectors.values())
    each = max(math.ceil(2 * (len(slices) + 2 * sizes.count(n)) / n / len(SEEDS)) for n, slices in candidates.items())
    scaling: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    gradient: dict[str, list[Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    for seed in SEEDS:
        with torch.enable_grad():
            outputs = _outputs(model, run, seed)
        for _ in range(each):
            # Not of what is masked: it is infinite.
            functionals = [
                torch.where(
                    one.detach().abs() < MASKED, torch.randn(one.shape, generator=generator, dtype=one.dtype), 0.0
                )
                for one in outputs
            ]
            gradients = _gradients(outputs, parameters, functionals)
            for name, found in gradients.items():
                if name in vectors:
                    gradient[name].append(found.flatten())
                if found.dim() >= 2:
                    product = parameters[name].detach() * found
                    for axis in range(found.dim()):
                        scaling[name, axis].append(product.movedim(axis, 0).flatten(1).sum(1))
        if seed == SEEDS[0]:  # what is detached is so whatever the inputs are
            _check_gradients(parameters, lambda seed=seed: _outputs(model, run, seed), functionals, gradients)
    return _Sensitivities(
        {key: torch.stack(rows) for key, rows in scaling.items()},
        {key: torch.stack(rows) for key, rows in gradient.items()},
    )


def _outputs(model: PreTrainedModel, run: Run, seed: int) -> list[Tensor]:
    """The model's outputs, and whatever a choice is made from on the way."""
    with float64_everywhere(), _EverythingDifferentiable() as mode, patch.object(Function, "apply", _applied):
        outputs = run(model, seed)
    return [outputs, *mode.scores]


@classmethod
def _applied(function: type[Function], *args: Any) -> Any:
    """What a function computes, made of operators that autograd knows: its own backward may be an approximation."""
    return function.forward(MagicMock(), *args)


class _EverythingDifferentiable(TorchFunctionMode):
    """`no_grad` and `detach` have no effect, and what is sorted is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if func is Tensor.detach:
            return args[0].view_as(args[0])
        if getattr(func, "__name__", "") in _CHOICES and args and args[0].is_floating_point():
            self.scores.append(args[0])
        return func(*args, **(kwargs or {}))


def _gradients(
    outputs: Sequence[Tensor], parameters: Mapping[str, Tensor], functionals: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Of `sum(functional * output)` over all outputs; zero where a parameter was not used."""
    differentiable = [i for i, output in enumerate(outputs) if output.requires_grad]
    with float64_everywhere():
        found = torch.autograd.grad(
            [outputs[i] for i in differentiable],
            list(parameters.values()),
            [functionals[i] for i in differentiable],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    if not all(one.isfinite().all() for one in found):
        raise ValueError("gradients that are not finite")
    return dict(zip(parameters, found, strict=True))


@torch.no_grad()
def _check_gradients(
    parameters: Mapping[str, Tensor],
    outputs: Callable[[], Sequence[Tensor]],
    functionals: Sequence[Tensor],
    gradients: Mapping[str, Tensor],
) -> None:
    """Compare the gradients with a central difference along a random direction: nothing was detached on the way.

    What is detached shows at every step. The kink of a ReLU, which an element may be at, shows at long steps only.
    """
    generator = torch.Generator().manual_seed(1)
    direction = {name: p * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}
    terms = [float((direction[name] * found).sum()) for name, found in gradients.items()]
    measured = math.nan
    for step in STEPS:
        values = []
        for signed in (step, -step):
            with _changed(parameters, {name: p + signed * direction[name] for name, p in parameters.items()}):
                products = [f * o.where(f != 0, 0.0) for f, o in zip(functionals, outputs(), strict=True)]
                values.append(sum(float(product.sum()) for product in products))
        measured = (values[0] - values[1]) / (2 * step)
        if abs(measured - sum(terms)) <= 1e-4 * max(map(abs, terms)):
            return
    raise ValueError(f"the outputs change by {measured:.6g} along a direction, the gradients say {sum(terms):.6g}")


@contextmanager
def _all_differentiable(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters that are not trained have gradients as well, within the block."""
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _changed(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values for some parameters, within the block; no gradients there, and float64 throughout."""
    before = {name: parameters[name].detach().clone() for name in values}
    with torch.no_grad(), float64_everywhere():
        try:
            for name, value in values.items():
                parameters[name].copy_(value)
            yield
        finally:
            for name, value in before.items():
                parameters[name].copy_(value)


# --- the equations


@dataclass(frozen=True)
class _Symmetry:
    """The gain is `offset + w`; a bias of the norm scales along with it."""

    offset: float
    bias: str | None

    def __str__(self) -> str:
        return f"gain {self.offset:g} + w" + (f", {self.bias} / gain" if self.bias else "")


class _Equations:
    """Those of all norms with `n` channels: what could take their gains is the same, one column a candidate."""

    def __init__(
        self, model: PreTrainedModel, run: Run, sensitivities: _Sensitivities, n: int, candidates: Sequence[_Slices]
    ) -> None:
        self._run, self._n = (lambda: run(model, SEEDS[0])), n
        self._parameters = dict(model.named_parameters())
        self._gradients = {name: rows for name, rows in sensitivities.gradient.items() if rows.shape[1] == n}
        columns = [_column(sensitivities.scaling[one.name, one.axis], one.channels, n) for one in candidates]
        sides = [self._scaling(name) for name in self._gradients]
        self._negligible = NO_EFFECT * max(float(column.norm()) for column in columns + sides)
        used = [i for i, column in enumerate(columns) if column.norm() > self._negligible]
        self._candidates = [candidates[i] for i in used]
        self._space = _Space([columns[i] for i in used], like=sides[0])

    def judge(self, norm: str) -> Proof:
        """The verdict for a norm: impossible only if no form of its gain has a solution."""
        sides = self._sides(norm)
        if all(side.norm() <= self._negligible for symmetry, side in sides.items() if symmetry.bias is None):
            return Proof(norm, "no effect")
        residuals = {symmetry: float(self._space.rest(side).norm() / side.norm()) for symmetry, side in sides.items()}
        smallest = min(residuals.values())
        if smallest > NO_SOLUTION:
            return Proof(norm, "impossible", smallest, vectors=self._vectors(norm))
        if smallest > SOLUTION:
            return Proof(norm, "undecided", smallest, note="neither a solution nor none")
        tried = 0
        for factors, verdict, signed in (
            ((0.0, 1.0), "possible", True),
            ((0.0, 1.0, -1.0), "possible by division", True),
            ((0.0, 1.0, -1.0), "possible up to signs", False),
        ):
            for symmetry, residual in residuals.items():
                for into, divided in self._choices(sides[symmetry], factors) if residual <= SOLUTION else ():
                    tried += 1
                    if self._folds(norm, symmetry, into, divided, signed):
                        return Proof(norm, verdict, residual, into, divided, note=str(symmetry))
        return Proof(norm, "undecided", smallest, note=f"{tried} solutions with factors of one, all change the outputs")

    def _sides(self, norm: str) -> dict[_Symmetry, Tensor]:
        """The left sides of the equations: for both offsets, with the norm's bias and without it."""
        scaling = self._scaling(norm)
        sides = {0.0: scaling, 1.0: scaling + self._gradients[norm].flatten()}
        found = {_Symmetry(offset, None): side for offset, side in sides.items()}
        bias = norm.rpartition(".")[0] + ".bias"
        if bias in self._gradients:
            found |= {_Symmetry(offset, bias): side + self._scaling(bias) for offset, side in sides.items()}
        return found

    def _scaling(self, vector: str) -> Tensor:
        return (self._parameters[vector].detach().flatten() * self._gradients[vector]).flatten()

    def _vectors(self, norm: str) -> tuple[str, ...]:
        """Other vectors that take part in a solution; they may have an offset as well."""
        names, columns = [], []
        for name, gradient in self._gradients.items():
            if name != norm:
                for column in (self._scaling(name), gradient.flatten()):
                    rest = self._space.rest(column)
                    if rest.norm() > SOLUTION * column.norm() and column.norm() > self._negligible:
                        names.append(name)
                        columns.append(rest)
        for symmetry, side in self._sides(norm).items():
            if symmetry.bias is None:
                space = _Space(columns, like=side)
                rest = self._space.rest(side)
                if space.rest(rest).norm() < SOLUTION * side.norm():
                    return tuple(dict.fromkeys(names[i] for i in _support(space.solution(rest))))
        return ()

    def _choices(
        self, side: Tensor, factors: Sequence[float]
    ) -> Iterator[tuple[tuple[Linear, ...], tuple[Linear, ...]]]:
        """What takes the gain, and what is divided by it, in solutions with these factors only; the fewest first.

        Least squares gives the smallest solution, which is zero wherever a solution need not reach. Within its support
        all solutions are `smallest + null space @ t`, and `d` of its elements, given as factors, determine `t`.
        """
        support = _support(self._space.solution(side))
        space = self._space.only(support)
        smallest, null = space.solution(side), space.null
        if null.shape[1] > MOST_FREE or space.rest(side).norm() > SOLUTION * side.norm():
            return
        free = _independent_rows(null)
        found: dict[tuple[int, ...], None] = {}
        for some in itertools.product(factors, repeat=len(free)):
            t = torch.linalg.solve(null[free], torch.tensor(some, dtype=null.dtype) - smallest[free])
            solution = smallest + null @ t
            if (solution - solution.round()).abs().max() < NO_FACTOR and set(solution.round().tolist()) <= set(factors):
                found[tuple(int(factor) for factor in solution.round().tolist())] = None
        for solution in sorted(found, key=lambda solution: sum(map(abs, solution))):
            into, divided = (
                _linears([self._candidates[i] for i, f in zip(support, solution, strict=True) if f == sign], self._n)
                for sign in (1, -1)
            )
            if into is not None and divided is not None:
                yield into, divided

    def _folds(
        self, norm: str, symmetry: _Symmetry, into: Sequence[Linear], divided: Sequence[Linear], signed: bool
    ) -> bool:
        """Fold for real, and compare; the gain, or its magnitudes only."""
        parameters = self._parameters
        whole = symmetry.offset + parameters[norm].detach()
        gain = whole if signed else whole.abs()
        values = {norm: whole / gain - symmetry.offset}
        if symmetry.bias is not None:
            values[symmetry.bias] = parameters[symmetry.bias].detach() / gain
        for linears, taken in ((into, gain.flatten()), (divided, 1 / gain.flatten())):
            for linear in linears:
                weight = values.get(linear.name, parameters[linear.name].detach())
                factors = weight.new_ones(weight.shape[linear.axis])
                for start, first, length in linear.segments or ((0, 0, len(taken)),):
                    factors[start : start + length] = taken[first : first + length]
                values[linear.name] = weight * factors.view(-1, *[1] * (weight.dim() - linear.axis - 1))
        with _changed(parameters, {}):
            before = self._run()
        with _changed(parameters, values):
            after = self._run()
        return bool((after - before).abs().max() <= SAME * before.abs().max())


class _Space:
    """The span of some columns: least squares by the singular values of the columns, each made of length one."""

    def __init__(self, columns: Sequence[Tensor], like: Tensor) -> None:
        self._columns, self._like = list(columns), like
        matrix = torch.stack(columns, dim=1) if columns else like.new_zeros(len(like), 0)
        self._lengths = matrix.norm(dim=0)
        left, singular, right = torch.linalg.svd(matrix / self._lengths, full_matrices=False)
        rank = int((singular > NO_EFFECT * len(columns)).sum())
        self._left, self._singular, self._right = left[:, :rank], singular[:rank], right
        self._rank = rank

    def rest(self, side: Tensor) -> Tensor:
        """What no combination of the columns reaches."""
        for _ in range(2):  # once more, for the rounding errors of the first time
            side = side - self._left @ (self._left.T @ side)
        return side

    def solution(self, side: Tensor) -> Tensor:
        """One factor a column, the smallest ones."""
        return self._right[: self._rank].T @ ((self._left.T @ side) / self._singular) / self._lengths

    @property
    def null(self) -> Tensor:
        """Factors that add up to nothing, as columns."""
        return self._right[self._rank :].T / self._lengths[:, None]

    def only(self, columns: Sequence[int]) -> "_Space":
        """The span of some of the columns."""
        return _Space([self._columns[i] for i in columns], self._like)


def _column(rows: Tensor, channels: Tensor, n: int) -> Tensor:
    """Sensitivities along an axis `[F, size]`, summed for each of a gain's channels: `[F * n]`."""
    taken = channels != UNKNOWN
    return rows.new_zeros(len(rows), n).index_add(1, channels[taken], rows[:, taken]).flatten()


def _support(solution: Tensor) -> list[int]:
    return (solution.abs() > NO_FACTOR).nonzero().flatten().tolist()


def _independent_rows(matrix: Tensor) -> list[int]:
    """As many rows as there are columns, the first ones that are independent."""
    rows: list[int] = []
    for row in range(len(matrix)):
        if len(rows) < matrix.shape[1] and torch.linalg.matrix_rank(matrix[[*rows, row]], rtol=1e-8) > len(rows):
            rows.append(row)
    return rows
