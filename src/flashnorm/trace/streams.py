"""Which LayerNorms can become RMSNorms: the tracer, with the channels of sums of linear layers in the place of gains.

* To *centre* a parameter is to subtract its mean over the axis that runs over the channels of what it writes. If every
  parameter that writes into a sum is centred, the sum of each token's channels is zero, and a LayerNorm of it subtracts
  nothing.
* A tensor is a *stream* if it equals `P x` in the centred model where it is `x` in the model, `P` being the subtraction
  of the mean. A stream begins at an embedding, a linear layer or a convolution. Sums of streams are one stream, which
  has the writers of all of them. What moves elements or scales whole tokens passes it on.
* A stream may be read by the subtraction of its own mean alone. Whatever else reads it is an escape: then none of its
  writers can be centred.
* Streams that share a writer are one, as a parameter is centred in all of its uses or in none.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashnorm.compat.torch import flat
from flashnorm.plan import Kept, Kind, Writer
from flashnorm.removable import Centring
from flashnorm.trace.planner import Analysis
from flashnorm.trace.records import GainRecord, Records, Use, not_reached
from flashnorm.trace.rules import RULES, Call, Rule, joining, movement, propagate, reductions
from flashnorm.trace.solve import names_by_parameter
from flashnorm.trace.tracer import Tracer
from flashnorm.trace.values import PLAIN, Value, View, along, constant_along, constant_except

aten = torch.ops.aten

_READS = Kept("it reads the mean, and is no LayerNorm", kind=Kind.STOPPED)
_ADDS = Kept("it adds what no parameter writes", kind=Kind.STOPPED)
_PARTS = Kept("it normalises other channels than its input has", kind=Kind.STOPPED)
_CHANNELS = Kept("it multiplies the channels by different numbers", kind=Kind.STOPPED)
_OTHER_AXES = Kept("it adds channels of different axes", kind=Kind.STOPPED)
_NO_STREAM = Kept("its input is no sum of embeddings and linear layers", kind=Kind.STOPPED)
_USED = Kept("it is used in another way", kind=Kind.SHARED)


class StreamRecords(Records):
    """What a trace finds of streams. The escapes are those of `gains`, by the stream's key.

    A use of a parameter has an axis if it writes along that axis, and none otherwise.

    Attributes:
        sites: the module of each subtraction of a mean -> the keys of the streams that are read there.
        places: the same modules -> where in it.
        failed: the modules in which what is read is no stream -> why.
        means: the key of each mean that was taken -> the key of its stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, list[str]] = {}
        self.places: dict[str, str | None] = {}
        self.failed: dict[str, list[Kept]] = {}
        self.means: dict[str, str] = {}
        self._parents: dict[str, str] = {}
        self._writers: dict[str, dict[str, set[tuple[int, int]]]] = {}  # by the roots

    def begin(self, writers: Sequence[tuple[str, int, int]], operator: str) -> str:
        """The key of a new stream that these parameters write: name, axis, and how long it is."""
        key = f"stream {len(self._parents)}"
        self._parents[key] = key
        self._writers[key] = {name: {(axis, size)} for name, axis, size in writers}
        self.gains.setdefault(key, GainRecord())
        for name, axis, _ in writers:
            self.uses[name].append(Use(at=self.here(_USED, operator), axis=axis))
        return key

    def root(self, key: str) -> str:
        """The key that stands for all streams that are one with this one."""
        while self._parents[key] != key:
            key = self._parents[key]
        return key

    def join(self, keys: Sequence[str]) -> str:
        """Make streams one."""
        first, *others = dict.fromkeys(map(self.root, keys))
        for other in others:
            self._parents[other] = first
            for name, axes in self._writers.pop(other).items():
                self._writers[first].setdefault(name, set()).update(axes)
        return first

    def writers(self, key: str) -> dict[str, set[tuple[int, int]]]:
        """The parameters that write into a stream -> along which axis, and how long that is (all that were met)."""
        return self._writers[self.root(key)]

    @property
    def streams(self) -> list[str]:
        """The keys of all streams."""
        return list(self._parents)

    def escape(self, gain: str, why: Kept, operator: str | None) -> None:
        """Note that a stream, or the mean of one, is read by something else than a LayerNorm."""
        super().escape(self.means.get(gain, gain), why, operator)

    def read(self, key: str | None, why: Kept | None, operator: str) -> None:
        """Note the subtraction of a mean in the module that is running: of a stream, or of something else."""
        module = self.running[-1] if self.running else ""
        self.places.setdefault(module, self.here(Kept(""), operator).where)
        keys = self.sites.setdefault(module, [])
        if key is not None:
            keys.append(key)
        if why is not None:
            self.failed.setdefault(module, []).append(self.here(why, operator))


def _records(call: Call) -> StreamRecords:
    assert isinstance(call.records, StreamRecords)
    return call.records


# --- what a tensor is


def _stream(call: Call, value: Value) -> tuple[str, Tensor] | None:
    """The key and the channels of a stream; streams that were joined in one tensor become one. None: it is none."""
    keys = [key for key in value.gains if key not in _records(call).means]
    if not keys:
        return None
    index = value.gains[keys[0]]
    for key in keys[1:]:
        index = torch.maximum(index, value.gains[key])
    return _records(call).join(keys), index


def _escape_all(call: Call, values: Sequence[Value], why: Kept) -> Value:
    for key in dict.fromkeys(key for value in values for key in value.gains):
        call.escape(key, why)
    return PLAIN


def _axis_along(view: View | None, dim: int) -> tuple[str, int, int] | None:
    """The parameter's name, and the axis of it that runs, whole and in order, along `dim` of its view; None if none."""
    if view is None or view.offset:
        return None
    varying = [axis for axis, index in enumerate(view.coordinates) if not constant_along(index, dim)]
    if len(varying) != 1 or not constant_except(view.coordinates[varying[0]], dim):
        return None
    (axis,) = varying
    size = view.shape[axis]
    whole = torch.equal(along(view.coordinates[axis], dim), torch.arange(size))
    return (view.name, axis, size) if whole else None


def _dim_of(index: Tensor) -> int | None:
    """The dimension along which the channels run, if they run along one alone."""
    return next((dim for dim in range(index.dim()) if constant_except(index, dim) and index.shape[dim] > 1), None)


def _begun(call: Call, writers: Sequence[tuple[str, int, int]], dim: int) -> Value:
    """The stream that parameters write, as the result of a call; channels run along `dim`."""
    out = call.out
    channels = torch.arange(out.shape[dim]).view([-1 if one == dim % out.dim() else 1 for one in range(out.dim())])
    return Value(gains={_records(call).begin(writers, call.operator): channels.expand(out.shape)})


# --- where a stream begins


def embedding(call: Call) -> Value:
    """Rows of a weight, by token."""
    found = _axis_along(call.value(call.args[0]).view, 1)
    return _begun(call, [found], -1) if found else _other(call)


def rows(call: Call) -> Value | Sequence[Value]:
    """`weight[index]`: rows of a weight, by position; or a selection of tokens of a stream."""
    view = call.value(call.args[0]).view
    if view is None:
        return movement.index(call)
    by_number = len(call.args[1]) == 1 and call.args[1][0].dtype != torch.bool
    found = _axis_along(view, 1) if by_number and len(view.stored_shape) == 2 else None
    return _begun(call, [found], -1) if found else _other(call)


def matmul(call: Call) -> Value:
    """`a @ weight`; a weight on the left is not covered."""
    return _linear(call, call.args[0], call.args[1])


def add_matmul(call: Call) -> Value:
    """`bias + a @ weight`."""
    return _linear(call, call.args[1], call.args[2], call.args[0])


def _linear(call: Call, read: Tensor, weight: Tensor, bias: Tensor | None = None) -> Value:
    _escape_all(call, [call.value(read)], _READS)
    found = [_axis_along(call.value(weight).view, weight.dim() - 1)]
    if bias is not None:
        found.append(_axis_along(call.value(bias).view, bias.dim() - 1) if not call.kwargs else None)
    writers = [one for one in found if one]
    if call.value(read).view or len(writers) < len(found):
        return _other(call)
    return _begun(call, writers, -1)


def convolution(call: Call) -> Value:
    """A convolution without groups: its output channels are the first axis of the weight, the second if transposed."""
    read, weight, bias, *_, transposed, _, groups = call.args[:9]
    _escape_all(call, [call.value(read)], _READS)
    found = [_axis_along(call.value(weight).view, 1 if transposed else 0)]
    if bias is not None:
        found.append(_axis_along(call.value(bias).view, 0))
    writers = [one for one in found if one]
    if groups != 1 or len(writers) < len(found):
        return _other(call)
    return _begun(call, writers, 1)


# --- where it goes on


def add(call: Call) -> Value:
    """A sum of streams, and of a stream and a parameter; or the subtraction of a mean."""
    if not (call.is_tensor(0) and call.is_tensor(1)):
        tensor, number = call.args[:2] if call.is_tensor(0) else (call.args[1], call.args[0])
        return call.value(tensor) if number == 0 else _spoilt(call, call.value(tensor), _ADDS)
    values = [call.value(argument) for argument in call.args[:2]]
    if (centred := _subtraction(call, values)) is not None:
        return centred
    found = [_stream(call, value) for value in values]
    if not any(found) or any(key in _records(call).means for value in values for key in value.gains):
        return _other(call)
    for position in (0, 1):
        if found[position] is None and (one := found[1 - position]) is not None:
            found[position] = _parameter(call, values[position].view, one[1].broadcast_to(call.out.shape))
            if found[position] is None:
                plain, stream = values[position], values[1 - position]
                return stream if plain.zero else _spoilt(call, stream, _ADDS)
    (left, mine), (right, theirs) = (one for one in found if one)
    mine = mine.broadcast_to(call.out.shape)
    if not torch.equal(mine, theirs.broadcast_to(call.out.shape)):
        return _other(call, _OTHER_AXES)
    return Value(gains={_records(call).join([left, right]): mine})


def _parameter(call: Call, view: View | None, index: Tensor) -> tuple[str, Tensor] | None:
    """A parameter that is added to a stream of these channels, as a stream; None if it has no such channels."""
    dim = _dim_of(index)
    if view is None or dim is None:
        return None
    own = dim - index.dim() + len(view.stored_shape)
    found = _axis_along(view, own) if own >= 0 else None
    if found is None or view.stored_shape[own] != index.shape[dim]:
        return None
    return _records(call).begin([found], call.operator), index


def _subtraction(call: Call, values: Sequence[Value]) -> Value | None:
    """What is left of a stream when its own mean is subtracted; None if this is something else."""
    if call.func.overloadpacket is not aten.sub or call.kwargs:
        return None
    found = _stream(call, values[0])
    if found is None or [*values[1].gains] != [_key_of_mean(call.args[0], found[0])]:
        return None
    _records(call).read(found[0], None, call.operator)
    return PLAIN


def _key_of_mean(tensor: Tensor, stream: str) -> str:
    return f"mean of {stream} in {id(tensor)}"


def mean(call: Call) -> Value:
    """The mean over the channels; or a mean or sum over something else."""
    value = call.value(call.args[0])
    found = _stream(call, value)
    if found is None:
        return _other(call)
    key, index = found
    dims, dim = call.argument(1, "dim"), _dim_of(index)
    dims = [dims] if isinstance(dims, int) else dims
    if dims is not None and dim is not None and [one % index.dim() for one in dims] == [dim]:
        if call.func.overloadpacket is aten.mean and _all_channels(call, key, index, dim):
            nothing = torch.zeros((), dtype=torch.long).expand(call.out.shape)
            mean_key = _key_of_mean(call.args[0], key)
            _records(call).means[mean_key] = key
            return Value(gains={mean_key: nothing})
        return _other(call)
    if dims is None or dim is None or not constant_along(index, tuple(dims)):
        return _other(call)
    return reductions.reduce(replace(call, value_of=lambda _: Value(gains={key: index})))


def multiply(call: Call) -> Value:
    """A stream times a number, or times one number for each token."""
    values = [call.value(argument) for argument in call.args[:2]]
    found = [_stream(call, value) for value in values]
    position = 0 if found[0] else 1
    divides = call.func.overloadpacket in (aten.div, aten.div_)
    # With a keyword, it rounds.
    if all(found) or not any(found) or (divides and position == 1) or call.kwargs:
        return _other(call)
    if not call.is_tensor(1 - position):
        return values[position]
    _escape_all(call, [values[1 - position]], _READS)  # the mean of a stream
    key, index = found[position] or ("", torch.empty(0))
    index = index.broadcast_to(call.out.shape)
    if not _one_number_each(call.args[1 - position], index):
        return _spoilt(call, values[position], _CHANNELS)
    return Value(gains={key: index})


def masked_fill(call: Call) -> Value:
    """Whole tokens become zero."""
    found = _stream(call, call.value(call.args[0]))
    if found is None or call.is_tensor(2) or call.args[2] != 0:
        return _other(call)
    index = found[1].broadcast_to(call.out.shape)
    if not _one_number_each(call.args[1], index):
        return _spoilt(call, call.value(call.args[0]), _CHANNELS)
    return Value(gains={found[0]: index})


def _one_number_each(factor: Tensor, index: Tensor) -> bool:
    """Whether a tensor is constant along the channels of a stream, by its shape."""
    dim = _dim_of(index)
    if dim is None:
        return False
    own = dim - index.dim() + factor.dim()
    return own < 0 or factor.shape[own] == 1 or factor.stride(own) == 0


def join(call: Call) -> Value:
    """Streams, and parameters with the same channels, one after the other (a class token and patches)."""
    tensors = call.args[0]
    values = [call.value(tensor) for tensor in tensors]
    known = next((one for value in values if (one := _stream(call, value))), None)
    if known is None or (dim := _dim_of(known[1])) is None:
        return _other(call)
    of: dict[int, Value] = {}
    for tensor, value in zip(tensors, values, strict=True):
        found = _axis_along(value.view, dim)
        if found and call.func.overloadpacket is aten.cat:
            key = _records(call).begin([found], call.operator)
            channels = torch.arange(tensor.shape[dim]).view([-1 if one == dim else 1 for one in range(tensor.dim())])
            of[id(tensor)] = Value(gains={key: channels.expand(tensor.shape)})
        else:
            of[id(tensor)] = replace(value, view=None, parts=())
    return joining.join(replace(call, value_of=lambda tensor: of[id(tensor)]))


# --- where it is read


def layer_norm(call: Call) -> list[Value]:
    """`native_layer_norm`: input, normalised shape, weight, bias."""
    value = call.value(call.args[0])
    records, found = _records(call), _stream(call, value)
    for position in (2, 3):
        _other_uses(call, [call.argument(position, ("weight", "bias")[position - 2])])
    whole = found and len(call.args[1]) == 1 and _all_channels(call, *found, call.args[0].dim() - 1)
    if found and whole:
        records.read(found[0], None, call.operator)
    else:
        records.read(None, _PARTS if found else _NO_STREAM, call.operator)
        _escape_all(call, [value], _PARTS)
    return [PLAIN]


def _all_channels(call: Call, key: str, index: Tensor, dim: int) -> bool:
    """Whether a tensor has all channels of a stream's writers, in order, along `dim`."""
    sizes = {size for axes in _records(call).writers(key).values() for _, size in axes}
    return (
        sizes == {index.shape[dim]}
        and constant_except(index, dim)
        and torch.equal(along(index, dim), torch.arange(index.shape[dim]))
    )


def _other(call: Call, why: Kept = _READS) -> Value:
    """Any other operator: streams that it reads escape, and so do its parameters."""
    leaves = [leaf for leaf in flat((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    _escape_all(call, [call.value(leaf) for leaf in leaves], why)
    _other_uses(call, leaves)
    return PLAIN


def _spoilt(call: Call, stream: Value, why: Kept) -> Value:
    """A stream that cannot be centred from here on. It goes on as one, so that norms that read it are kept for this."""
    _other(call, why)
    found = _stream(call, stream)
    return Value(gains={found[0]: found[1].broadcast_to(call.out.shape)}) if found else PLAIN


def _other_uses(call: Call, leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        value = call.value_of(leaf) if isinstance(leaf, Tensor) else PLAIN
        for view in [value.view] if value.view else value.parts:
            call.records.uses[view.name].append(Use(at=call.records.here(_USED, call.operator)))


# --- the table

_MOVES = {operator: rule for operator, rule in RULES.items() if rule.keeps_parts and rule.keeps_shifts}
_SELECTS: dict[Callable[[Call], Any], str] = {
    movement.same: "neg",
    movement.index_select: "index_select",
    movement.gather: "gather",
}
_OWN: dict[Callable[[Call], Any], str] = {
    embedding: "embedding",
    rows: "index",
    matmul: "mm bmm",
    add_matmul: "addmm baddbmm",
    convolution: "convolution",
    add: "add sub",
    mean: "mean sum",
    multiply: "mul div",
    masked_fill: "masked_fill",
    join: "cat stack",
    layer_norm: "native_layer_norm",
}


def _of_streams(apply: Callable[[Call], Any]) -> Rule:
    """A rule that selects elements of streams; of a parameter, it is another use."""

    def rule(call: Call) -> Any:
        if any(isinstance(leaf, Tensor) and call.value(leaf).view for leaf in call.args[:1]):
            return _other(call)
        return apply(call)

    return Rule(rule)


_TABLE: dict[Any, Rule] = {operator: Rule(_other) for operator in RULES} | _MOVES
_TABLE |= {getattr(aten, name): _of_streams(rule) for rule, names in _SELECTS.items() for name in names.split()}
_TABLE |= {getattr(aten, name): Rule(rule) for rule, names in _OWN.items() for name in names.split()}


def _propagate(call: Call) -> list[Value]:
    return propagate(call, _TABLE)


STREAMS = Analysis(_propagate, StreamRecords)


# --- from a trace to centrings


def centrings(tracer: Tracer) -> tuple[Centring, ...]:
    """The mean of every LayerNorm, and what is to be centred for it to be zero, from a trace of `STREAMS`."""
    records = tracer.records
    assert isinstance(records, StreamRecords)
    _join_shared(records)
    aliases = names_by_parameter(tracer.model)
    unread = [name for name in aliases if name not in records.uses]
    escapes: dict[str, list[Kept]] = {}
    for key in records.streams:
        root = records.root(key)
        found = escapes.setdefault(root, _not_alone(records, root, aliases))
        found += [*records.gains[key].escapes, *not_reached(records.gains[key].received_by, unread)]
    made: list[Centring] = []
    for norm, keys in records.sites.items():
        roots = dict.fromkeys(map(records.root, keys))
        writers = [Writer(name, min(axes)[0]) for root in roots for name, axes in records.writers(root).items()]
        reasons = [*records.failed.get(norm, ()), *(why for root in roots for why in escapes[root])]
        made.append(Centring(norm, records.places[norm], tuple(writers), tuple(dict.fromkeys(reasons))))
    return tuple(made)


def _join_shared(records: StreamRecords) -> None:
    """Make streams one that share a writer."""
    by_writer: dict[str, list[str]] = {}
    for key in records.streams:
        for name in records.writers(key):
            by_writer.setdefault(name, []).append(key)
    for keys in by_writer.values():
        records.join(keys)


def _not_alone(records: StreamRecords, root: str, aliases: dict[str, list[str]]) -> list[Kept]:
    """Reasons for the writers of a stream that have another use, or write along another axis elsewhere."""
    reasons: list[Kept] = []
    for name, axes in records.writers(root).items():
        others = [use.at for use in records.uses[name] if use.axis is None or use.axis != min(axes)[0]]
        if others and len(aliases[name]) > 1:
            reasons.append(replace(others[0], reason=f"tied: {aliases[name][-1]} is {name}", kind=Kind.TIED))
        elif others:
            reasons.append(replace(others[0], reason=f"{name} has another use", kind=Kind.SHARED))
    return reasons
