"""Operators that no gain passes.

Their reasons say that folding is impossible, whatever the gain's values. `relu` and `abs` have no rule and so count as
unknown, since positive gains pass them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from flashnorm.compat.torch import flat
from flashnorm.trace.rules.call import Call
from flashnorm.trace.rules.reasons import NON_LINEAR
from flashnorm.trace.values import PLAIN, Value


def stop(call: Call, operands: Sequence[Any] | None = None) -> Value:
    """Every gain escapes. What is computed from a statistic, such as `rsqrt(mean(x^2))`, is a statistic as well."""
    leaves = flat((call.args, call.kwargs) if operands is None else operands)
    values = [call.value(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    for gain in dict.fromkeys(gain for value in values for gain in value.gains):
        call.escape(gain, NON_LINEAR)
    call.use(*values)
    return Value(statistic=any(value.statistic for value in values))


def statistic(call: Call) -> Value:
    """A root or a vector norm, by which a norm divides."""
    return replace(stop(call), statistic=True)


def power(call: Call) -> Value:
    """A power; with exponent 0.5 or -0.5, a statistic."""
    exponent = call.args[1]
    return statistic(call) if isinstance(exponent, float) and exponent in (-0.5, 0.5) else stop(call)


def tanh(call: Call) -> Value:
    """The tanh with which a DyT normalises."""
    return replace(stop(call), normalised=True)


def independent(call: Call) -> Value:
    """The result does not depend on the elements."""
    return PLAIN


def zeros(call: Call) -> Value:
    """Zeros, which carry any gain."""
    return Value(zero=True)
