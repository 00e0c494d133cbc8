"""Which divisions of norms cancel: the tracer, with factors of tokens in the place of gains.

* A norm divides by `r(x)`, one positive number for each token. What it gives is the *factor* `1 / r` times its input. A
  tensor carries a factor of degree `k` if it equals its value in a model without this division, times `r^-k`. The index
  tensor of `values.py` holds the token, in the place of the channel, of every element.
* Whatever moves elements, adds up channels or multiplies by a weight passes factors on, by the same rules as gains.
  Here are the others: products add degrees, powers multiply them, and a norm that divides by the root of its own mean
  square brings them to zero: there the factor *ends*.
* Between the mean square and its root, a norm adds `eps`. The factor passes if `eps` becomes `eps * r^power`; that is
  noted with the ending (`W (x / r)` in the place of `q` in `q / sqrt(mean(q^2) + eps)`).
* Everything else is an escape, with its operator and its place: the division is needed there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashnorm.compat.torch import flat
from flashnorm.plan import Kept, Kind
from flashnorm.removable import Division, Ending, Reader
from flashnorm.trace.planner import Analysis
from flashnorm.trace.records import GainRecord, Records, Use, not_reached
from flashnorm.trace.rules import RULES, Call, Rule, contraction, elementwise, propagate, reductions
from flashnorm.trace.rules.call import UnknownError
from flashnorm.trace.rules.reasons import ANOTHER_USE, DIFFERENT, MIXES, NON_LINEAR, TWICE, WITHOUT
from flashnorm.trace.tracer import Tracer
from flashnorm.trace.values import UNKNOWN, Value, constant_along, written_once

aten = torch.ops.aten

# The words of the rules for gains, said of a factor.
_WORDS = {
    WITHOUT: "it adds a tensor that is not scaled",
    MIXES: "it adds up different tokens",
    DIFFERENT: "it adds tensors that are scaled by different tokens",
    NON_LINEAR: "it does not commute with a scale",
    TWICE: "it multiplies tensors that are scaled by different tokens",
}
_BIAS = Kept("the norm adds a bias of its own", kind=Kind.STOPPED)
_NUMBER = Kept("it adds a number", kind=Kind.STOPPED)


@dataclass(frozen=True)
class Factor:
    """The factor of one division of a norm, to a power.

    Attributes:
        site: the number of the division, in the order in which the trace met them.
        weight: the linear layer behind which it is; None until there is one.
        degree: the power of `1 / r`.
        with_eps: an `eps` has been added, and the root has not been taken yet.
        power: the power of `r` that this `eps` takes, for all factors of the division; None if no `eps` was added.
    """

    site: int
    weight: str | None
    degree: float
    with_eps: bool = False
    power: float | None = None

    @property
    def key(self) -> str:
        """A name for it, in the place of a gain's."""
        return repr(self)


class FactorRecords(Records):
    """What a trace finds of factors. The escapes are those of `gains`, by the factor's key.

    Attributes:
        sites: each division: the place with its module.
        runs: how often each module runs.
        shapes: each division: the shape of its tokens, which is that of what is divided, with one channel.
        factors: key -> factor, of all that were met.
        endings: key -> the norms in which the factor cancels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running = self.runs = _Running()
        self.sites: list[tuple[str, str | None]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.factors: dict[str, Factor] = {}
        self.endings: dict[str, list[Ending]] = {}

    def key(self, factor: Factor) -> str:
        """The key of a factor, which is noted: the trace has met it."""
        self.factors[factor.key] = factor
        self.gains.setdefault(factor.key, GainRecord())
        return factor.key

    def end(self, factor: Factor, power: float | None, index: Tensor) -> None:
        """Note that a factor cancels in the module that is running; `index` has the token of each element there."""
        norm, dims = self.running[-1] if self.running else "", _dims(index, self.shapes[factor.site])
        self.endings.setdefault(self.key(factor), []).append(Ending(norm, power, dims))

    def escape(self, gain: str, why: Kept, operator: str | None) -> None:
        """Note that a factor does not cancel."""
        super().escape(gain, replace(why, reason=_WORDS.get(why, why.reason)), operator)


class _Running(list[str]):
    """The modules that are running, which counts how often each runs in one forward of the model, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.most: Counter[str] = Counter()
        self._runs: Counter[str] = Counter()

    def append(self, name: str) -> None:
        """Note that a module begins to run."""
        if not name:  # the model itself
            self._runs = Counter()
        self._runs[name] += 1
        self.most[name] = max(self.most[name], self._runs[name])
        super().append(name)


def _dims(index: Tensor, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The dimensions along which tokens of a shape run, one for each but the last; None if they do not run in order.

    Args:
        index: the token of each element, counted in the order of the shape.
        shape: `[..., 1]`.
    """
    index, dims, expected = written_once(index), [], torch.zeros((), dtype=torch.long)
    for axis, size in enumerate(shape[:-1]):
        step = torch.Size(shape[axis + 1 :]).numel()
        for dim in range(index.dim()):
            if index.shape[dim] == size > 1 and bool((index.diff(dim=dim) == step).all()):
                dims.append(dim)
                expected = expected + (step * torch.arange(size)).view(
                    [-1 if d == dim else 1 for d in range(index.dim())]
                )
                break
    whole = len({*dims}) == len(shape) - 1 and shape[-1] == 1
    return tuple(dims) if whole and torch.equal(index, expected.expand(index.shape)) else None


def _records(call: Call) -> FactorRecords:
    assert isinstance(call.records, FactorRecords)
    return call.records


def _changed(call: Call, value: Value, change: Callable[[Factor], Factor]) -> dict[str, Tensor]:
    """The factors of a value after a change of each."""
    records = _records(call)
    return {records.key(change(records.factors[key])): index for key, index in value.gains.items()}


# --- where a factor begins


def _begin(call: Call, of: Tensor, divisor: Tensor) -> dict[str, Tensor]:
    """The factor of a division by one number for many channels; nothing if it is another product.

    Args:
        of: what is divided, `[..., n]`.
        divisor: the root of a mean square, or its reciprocal, with size 1, or expanded, where it is constant.
    """
    shape = [1 if stride == 0 else size for size, stride in zip(divisor.shape, divisor.stride(), strict=True)]
    tokens = torch.arange(torch.Size(shape).numel()).view(shape)
    index = tokens.broadcast_to(call.out.shape)
    if of.shape != call.out.shape or tokens.numel() == call.out.numel():
        return {}
    return _site(call, index, shape)


def _site(call: Call, index: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    records = _records(call)
    place = records.here(Kept(""), call.operator)
    records.sites.append((records.running[-1] if records.running else "", place.where))
    records.shapes.append(tuple(shape))
    return {records.key(Factor(len(records.sites) - 1, None, 1)): index}


# --- products and powers


def multiply(call: Call) -> Value:
    """A product: degrees add up. An activation times a statistic of tokens is a norm's division."""
    return _product(call, 1)


def divide(call: Call) -> Value:
    """A quotient: the degrees of the divisor count negatively."""
    return _product(call, -1)


def _product(call: Call, sign: int) -> Value:
    if call.kwargs:
        raise UnknownError  # it rounds
    a, b = (call.value(argument) for argument in call.args[:2])
    if not call.is_tensor(0):
        gains = _changed(call, b, lambda factor: replace(factor, degree=sign * factor.degree))
        return _statistic(Value(gains=gains), b.statistic and call.args[0] > 0)
    if not call.is_tensor(1):
        return _statistic(a, a.statistic and call.args[1] > 0)
    gains = _multiplied(call, a, b, sign)
    if b.statistic and not a.statistic and not a.view:
        gains |= _begin(call, call.args[0], call.args[1])
    elif a.statistic and not b.statistic and not b.view and sign > 0:
        gains |= _begin(call, call.args[1], call.args[0])
    return Value(gains=gains)


def _multiplied(call: Call, a: Value, b: Value, sign: int) -> dict[str, Tensor]:
    """The factors of a product or quotient. The degrees of the same factor add up, if it is that of the same tokens."""
    records = _records(call)
    gains = {key: index.broadcast_to(call.out.shape) for key, index in a.gains.items()}
    for key, index in b.gains.items():
        theirs = records.factors[key]
        theirs, index = replace(theirs, degree=sign * theirs.degree), index.broadcast_to(call.out.shape)
        same = next((key for key in gains if _same(records.factors[key], theirs)), None)
        if same is None:
            gains[records.key(theirs)] = index
            continue
        ours, mine = records.factors[same], gains.pop(same)
        if not torch.equal(mine, index):
            call.escape(same, TWICE)
            continue
        power = ours.power if theirs.power is None else theirs.power
        both = replace(ours, degree=ours.degree + theirs.degree, power=power)
        if both.degree:
            gains[records.key(both)] = mine
        else:
            records.end(both, power, mine)
    return gains


def _same(a: Factor, b: Factor) -> bool:
    return (a.site, a.weight) == (b.site, b.weight)


def _powers(exponent: float) -> Callable[[Call], Value]:
    """The rule for an operator that gives the positive homogeneous function of this degree."""

    def rule(call: Call) -> Value:
        value = call.value(call.args[0])
        gains = _changed(call, value, lambda one: replace(one, degree=one.degree * exponent, with_eps=False))
        return Value(gains=gains, statistic=abs(exponent) == 0.5 or (exponent == -1 and value.statistic))

    return rule


def power(call: Call) -> Value:
    """A power with a number as its exponent."""
    exponent = call.args[1]
    if not call.is_tensor(0) or not isinstance(exponent, (int, float)) or not exponent:
        raise UnknownError
    if abs(exponent) != 0.5:
        call = _before_roots(call)
    return _powers(exponent)(call)


def same_sign(call: Call) -> Value:
    """A function `f` with `f(s * x) = s * f(x)` for every positive `s`, element by element: relu, abs."""
    return replace(call.value(call.args[0]), statistic=False)


def as_complex(call: Call) -> Value:
    """`view_as_complex`: pairs of channels as one complex number, which carries a factor that both carry."""
    value, dim = call.value(call.args[0]), call.args[0].dim() - 1
    gains = {key: index.select(dim, 0) for key, index in value.gains.items() if constant_along(index, dim)}
    for key in value.gains.keys() - gains.keys():
        call.escape(key, DIFFERENT)
    return Value(gains=gains)


def as_real(call: Call) -> Value:
    """`view_as_real`: complex numbers as pairs of channels."""
    value = call.value(call.args[0])
    return Value(gains={key: index.unsqueeze(-1).expand(call.out.shape) for key, index in value.gains.items()})


# --- statistics


def reduce(call: Call) -> Value:
    """`sum` and `mean`."""
    return replace(reductions.reduce(call), statistic=False)


def variance(call: Call) -> Value:
    """`var`: like a mean square."""
    return _powers(2)(replace(call, value_of=lambda _: reductions.reduce(call)))


def vector_norm(call: Call) -> Value:
    """`linalg_vector_norm(x, ord, dim, keepdim)`: of degree one, whatever `ord` is."""
    reduced = reductions.reduce(replace(call, args=(call.args[0], call.argument(2, "dim"))))
    return replace(reduced, statistic=True)


def add(call: Call) -> Value:
    """A sum. A number that is added to a mean square is a norm's `eps`."""
    tensors = [argument for argument in call.args[:2] if isinstance(argument, Tensor)]
    if len(tensors) == 2:
        a, b = map(call.value, tensors)
        return replace(elementwise.add(call), statistic=a.statistic and b.statistic)
    value = call.value(tensors[0])
    number = call.args[1] if call.is_tensor(0) else call.args[0]
    adds = call.func.overloadpacket in (aten.add, aten.add_)
    positive = adds and number > 0 and call.kwargs.get("alpha", 1) == 1
    if number == 0:
        return value
    return _with_eps(call, value, positive, value.statistic and number > 0)


def clamp(call: Call) -> Value:
    """`max(x, eps)`, where `x` is the root that a norm divides by."""
    value = call.value(call.args[0])
    least, most = call.argument(1, "min"), call.argument(2, "max")
    is_eps = value.statistic and most is None and isinstance(least, (int, float)) and least > 0
    return _with_eps(call, value, is_eps, is_eps)


def _with_eps(call: Call, value: Value, is_eps: bool, statistic: bool) -> Value:
    gains = dict(value.gains)
    for key in value.gains:
        factor = _records(call).factors[key]
        if not is_eps or factor.with_eps or factor.power is not None:
            call.escape(key, _NUMBER)
            del gains[key]
    before_root, degrees = not value.statistic, _degrees(call, gains)
    noted = _changed(call, Value(gains=gains), lambda one: replace(one, with_eps=before_root, power=degrees[one.site]))
    return Value(gains=noted, statistic=statistic)


def _degrees(call: Call, gains: Iterable[str]) -> dict[int, float]:
    """Division -> the degree of its factors together: behind two linear layers (gate and up), it is there twice."""
    degrees: dict[int, float] = {}
    for factor in map(_records(call).factors.__getitem__, gains):
        degrees[factor.site] = degrees.get(factor.site, 0) + factor.degree
    return degrees


def _statistic(value: Value, statistic: bool) -> Value:
    return replace(value, statistic=bool(statistic))


# --- norms that are one operator


def rms_norm(call: Call) -> list[Value]:
    """`_fused_rms_norm`: input, normalised shape, weight, eps."""
    return _norm(call, None)


def layer_norm(call: Call) -> list[Value]:
    """`native_layer_norm`: input, normalised shape, weight, bias, eps."""
    return _norm(call, call.argument(3, "bias"))


def _norm(call: Call, bias: Tensor | None) -> list[Value]:
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    value, dims = call.value(call.args[0]), range(-len(call.args[1]), 0)
    records, degrees = _records(call), _degrees(call, value.gains)
    for key, index in value.gains.items():
        if constant_along(index, tuple(dim % out.dim() for dim in dims)) and (written_once(index) != UNKNOWN).all():
            factor = records.factors[key]
            records.end(replace(factor, degree=0), 2 * degrees[factor.site], index)
        else:
            call.escape(key, MIXES)
    outer = out.shape[: out.dim() - len(dims)]
    index = torch.arange(outer.numel()).view(*outer, *[1 for _ in dims]).expand(out.shape)
    gains = _site(call, index, (*outer, *[1 for _ in dims]))
    if bias is not None:
        for key in gains:
            call.escape(key, _BIAS)
        gains = {}
    return [Value(gains=gains)]


# --- linear layers


def _behind(of: Callable[[Call], Value], operands: Sequence[int]) -> Callable[[Call], Value]:
    """The rule for a product of matrices, at these positions; factors are from then on behind the parameter in it."""

    def rule(call: Call) -> Value:
        call = _before_roots(call)
        left, right = (call.args[position] for position in operands)
        views = call.value(left).view, call.value(right).view

        def value_of(tensor: Tensor) -> Value:
            value = replace(call.value(tensor), view=None, parts=())
            weight = views[1] if tensor is left else views[0] if tensor is right else None
            if weight is None:
                return value
            gains = _changed(call, value, lambda one: one if one.weight else replace(one, weight=weight.name))
            return replace(value, gains=gains)

        return of(replace(call, value_of=value_of))

    return rule


# --- the table

_ROOTS: dict[Callable[[Call], Any], str] = {_powers(0.5): "sqrt", _powers(-0.5): "rsqrt", power: "pow"}
_OTHERS: dict[Callable[[Call], Any], str] = {
    multiply: "mul",
    divide: "div",
    add: "add sub",
    clamp: "clamp clamp_min",
    _powers(2): "square",
    _powers(-1): "reciprocal",
    same_sign: "relu abs leaky_relu",
    as_complex: "view_as_complex",
    as_real: "view_as_real",
    reduce: "sum mean",
    variance: "var",
    vector_norm: "linalg_vector_norm",
    rms_norm: "_fused_rms_norm",
    layer_norm: "native_layer_norm",
    _behind(contraction.matmul, (0, 1)): "mm bmm",
    _behind(contraction.add_matmul, (1, 2)): "addmm baddbmm",
}


def _of_activations(apply: Callable[[Call], Any]) -> Rule:
    """A rule for gains as one for factors: to it, parameters are tensors like any other."""

    def rule(call: Call) -> list[Value]:
        call = _before_roots(call)
        call = replace(call, value_of=_without_views(call.value_of))
        values = apply(call)
        return [_statistic(value, False) for value in ([values] if isinstance(values, Value) else values)]

    return Rule(rule)


def _without_views(value_of: Callable[[Tensor], Value]) -> Callable[[Tensor], Value]:
    return lambda tensor: replace(value_of(tensor), view=None, parts=())


def _before_roots(call: Call) -> Call:
    """The call, of an operator that takes no root, without factors with an `eps`: they escape."""
    records = _records(call)

    def value_of(tensor: Tensor) -> Value:
        value = call.value_of(tensor)
        gains = {key: index for key, index in value.gains.items() if not records.factors[key].with_eps}
        for key in value.gains.keys() - gains.keys():
            call.escape(key, _NUMBER)
        return replace(value, gains=gains)

    return replace(call, value_of=value_of)


def _after_roots(apply: Callable[[Call], Any]) -> Rule:
    return Rule(lambda call: apply(_before_roots(call)))


def _only_moves(rule: Rule) -> bool:
    return rule.keeps_parts and rule.keeps_shifts


_TABLE: dict[Any, Rule] = {
    operator: rule if _only_moves(rule) else _of_activations(rule.apply) for operator, rule in RULES.items()
}
for _apply, _names in {**_ROOTS, **_OTHERS}.items():
    for _name in _names.split():
        _TABLE[getattr(aten, _name)] = Rule(_apply) if _apply in _ROOTS else _after_roots(_apply)


def _propagate(call: Call) -> list[Value]:
    """What is known of the factors of each result of an operator. Notes which parameters operators compute with."""
    rule = _TABLE.get(call.func.overloadpacket)
    if rule is None or not _only_moves(rule):
        for leaf in flat((call.args, call.kwargs)):
            view = call.value_of(leaf).view if isinstance(leaf, Tensor) else None
            if view is not None and view.name not in call.records.uses:
                call.records.uses[view.name].append(Use(at=call.records.here(ANOTHER_USE, call.operator)))
    return propagate(call, _TABLE)


FACTORS = Analysis(_propagate, FactorRecords)


# --- from a trace to divisions


def divisions(tracer: Tracer) -> tuple[Division, ...]:
    """The division of every norm, and where it cancels, from a trace of `FACTORS`."""
    records = tracer.records
    assert isinstance(records, FactorRecords)
    read = records.uses.keys()
    unread = [name for name, _ in tracer.model.named_parameters() if name not in read]
    found: dict[tuple[str, str | None], dict[str | None, Reader]] = {place: {} for place in records.sites}
    for key, factor in records.factors.items():
        readers = found[records.sites[factor.site]]
        reader = readers.get(factor.weight, Reader(factor.weight))
        escapes = [*reader.escapes, *records.gains[key].escapes, *not_reached(records.gains[key].received_by, unread)]
        endings = [*reader.endings, *records.endings.get(key, ())]
        readers[factor.weight] = Reader(factor.weight, tuple(dict.fromkeys(endings)), tuple(dict.fromkeys(escapes)))
    made: list[Division] = []
    for (norm, where), by_weight in found.items():
        readers = tuple(reader for reader in by_weight.values() if reader.endings or reader.escapes)
        modules = [norm, *(ending.norm for reader in readers for ending in reader.endings)]
        shared = next((name for name in modules if records.runs.most[name] > 1), None)
        made.append(Division(norm, where, readers, shared))
    return tuple(made)
