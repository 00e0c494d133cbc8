"""Operators that add up or linearly mix elements: a gain passes if it does not vary among the elements of a sum."""

from torch import Tensor

from flashnorm.trace.rules.call import Call, UnknownError
from flashnorm.trace.rules.reasons import MIXES
from flashnorm.trace.values import Value, collapse, constant_along


def reduce(call: Call) -> Value:
    """`sum` and `mean` over some dimensions."""
    value, count = _activation(call), call.args[0].dim()
    dims = call.argument(1, "dim")
    dims = range(count) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = tuple(sorted(dim % count for dim in dims))
    gains = {gain: index.reshape(call.out.shape) for gain, index in _collapsed(call, value, dims).items()}
    return Value(gains=gains, statistic=value.statistic)


def resample(call: Call, count: int) -> Value:
    """Average pooling and interpolation over the last `count` dimensions; the input may lack a batch dimension."""
    value, dims = _activation(call), call.args[0].dim()
    places = tuple(range(dims - count, dims))
    gains = {gain: index.expand(call.out.shape) for gain, index in _collapsed(call, value, places).items()}
    return Value(gains=gains, statistic=value.statistic)


def cumulate(call: Call) -> Value:
    """`cumsum` along one dimension."""
    value, dim = _activation(call), call.args[1]
    kept = _collapsed(call, value, (dim,))
    return Value(gains={gain: value.gains[gain] for gain in kept})


def _activation(call: Call) -> Value:
    value = call.value(call.args[0])
    if value.view:
        raise UnknownError
    return value


def _collapsed(call: Call, value: Value, dims: tuple[int, ...]) -> dict[str, Tensor]:
    """The gains that do not vary along these dimensions, their index reduced to size 1 there; other gains escape."""
    gains: dict[str, Tensor] = {}
    for gain, index in value.gains.items():
        if not constant_along(index, dims):
            call.escape(gain, MIXES)
            continue
        for dim in dims:
            index = collapse(index, dim)
        gains[gain] = index
    return gains
