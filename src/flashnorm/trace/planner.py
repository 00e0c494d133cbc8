"""From a trace to a plan: a norm folds if nothing stopped its gain and every weight that takes it takes it always.

* Each norm is judged by itself: whether one folds does not depend on whether another does.
* The reason that is given for a norm that stays is the first thing that stopped it, at the place where that happened.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch import tree_map
from flashnorm.compat.transformers import plain_operators
from flashnorm.errors import InputError, brief
from flashnorm.plan import Fold, FoldPlan, Kept, Linear, Segments
from flashnorm.trace.inputs import Arguments, Call, MixedDevices, example_calls
from flashnorm.trace.models import on_meta
from flashnorm.trace.rules import GUESSES, UNKNOWN_OPERATOR
from flashnorm.trace.tracer import Tracer, Use
from flashnorm.trace.values import UNKNOWN

# The norm has no effect on the output: no weight takes its gain, and nothing stopped it.
NOTHING_READS_IT = "nothing reads it"

_META = torch.device("meta")


def plan_of(model: nn.Module, inputs: tuple[Any, ...] | None = None) -> FoldPlan:
    """Read off a model's own forward which norm weights fold into which linears.

    The forward runs in evaluation mode on the meta device, whatever device the model is on: no weight is read, moved
    or changed, and no memory is used.

    Args:
        model: any module; its parameters may be on the meta device.
        inputs: positional arguments of its forward. None: token ids, as for any transformers model.

    Raises:
        InputError: the forward does not run on the meta device.
    """
    tracer = trace(model, inputs)
    config = getattr(model, "config", None)
    return _solve(tracer, model, str(getattr(config, "model_type", "") or type(model).__name__))


@torch.inference_mode(False)
def trace(model: nn.Module, inputs: tuple[Any, ...] | None = None) -> Tracer:
    """Run the model's forward under a tracer; arguments and errors as for `plan_of`.

    Without `inputs`, the model's methods that take images or sounds are run as well. One that fails might have read any
    parameter that the forward does not read: nothing of these is folded then.

    Not in inference mode, whoever calls: there the tracer sees other operators.
    """
    given = tree_map(lambda leaf: leaf.to(_META) if isinstance(leaf, Tensor) else leaf, inputs)
    forward, *others = example_calls(model) if given is None else [Call("forward", ({},), given)]
    furthest: Exception | None = None
    most = -1
    with _traceable(model):
        besides = [(call, _chosen(model, call)) for call in others]
        for arguments in forward.alternatives:
            tracer, error = _traced(model, partial(_run_all, model, [(forward, arguments), *besides]))
            if error is None:
                return tracer
            if len(tracer.uses) > most:
                furthest, most = error, len(tracer.uses)
    raise InputError(
        f"expected a model whose forward runs on the meta device, found that {type(model).__name__}'s does not "
        f"({type(furthest).__name__}: {furthest}); pass example_inputs that it accepts, or report the model"
    ) from furthest


def _traced(model: nn.Module, calls: Callable[[Tracer], Any]) -> tuple[Tracer, Exception | None]:
    """Run calls of a model, with its parameters on the meta device, under a new tracer; how that ended."""
    blank = {id(tensor): on_meta(tensor) for tensor in (*model.parameters(), *model.buffers())}
    tracer = Tracer(model, {name: blank[id(parameter)] for name, parameter in model.named_parameters()})
    # Each module once: `functional_call` does not give a module that has two names its own tensors back.
    state = {
        f"model.{name}.{attribute}" if name else f"model.{attribute}": blank[id(tensor)]
        for name, module in model.named_modules()
        for tensors in (module.named_parameters, module.named_buffers)
        for attribute, tensor in tensors(recurse=False, remove_duplicate=False)
    }
    runner = _Runner(model, tracer)
    run = partial(torch.func.functional_call, runner, state, (lambda: calls(tracer),), tie_weights=False)
    first: Exception | None = None
    worked = False
    for tracer.guess in GUESSES:
        try:
            tracer.run(run)
            worked = True
        except Exception as error:  # a guess may be out of bounds; what was seen before that counts
            first = first or error
        if not (tracer.guess_matters if worked else tracer.guessed):
            break
    return tracer, None if worked else first


class _Runner(nn.Module):
    """Takes calls of a model for its forward, so that `functional_call` swaps the parameters for any method."""

    def __init__(self, model: nn.Module, tracer: Tracer):
        super().__init__()
        self.model = model
        self._tracer = tracer

    def forward(self, calls: Callable[[], Any]) -> Any:
        with MixedDevices(bool(self._tracer.guess.number), self._tracer.note_guess):
            return calls()


def _chosen(model: nn.Module, call: Call) -> Arguments | None:
    """The first of a call's alternatives that works, or else the one that comes furthest."""
    furthest, most = None, -1
    for arguments in call.alternatives:
        if len(call.alternatives) == 1:
            return arguments
        tracer, error = _traced(model, lambda _, arguments=arguments: call.run(model, arguments))
        if error is None:
            return arguments
        if len(tracer.uses) > most:
            furthest, most = arguments, len(tracer.uses)
    return furthest


def _run_all(model: nn.Module, calls: Sequence[tuple[Call, Arguments | None]], tracer: Tracer) -> list[Any]:
    """Run the calls, of which all but the first may fail. What such a one may have read is not folded."""
    outputs: list[Any] = []
    unread: set[str] = set()
    failures: list[Kept] = []
    for call, arguments in calls:
        try:
            if arguments is None:
                raise ValueError("its inputs are not known")
            outputs.append(call.run(model, arguments))
        except Exception as error:
            if not outputs:
                raise
            failures.append(Kept(f"{UNKNOWN_OPERATOR}: {call.method} cannot be traced: {brief(error)}"))
        if not unread:
            unread = dict(model.named_parameters()).keys() - tracer.uses.keys() - tracer.gains.keys()
    for name in unread if failures else ():
        tracer.uses[name].append(Use(at=failures[0]))
        if name in tracer.gains:
            tracer.gains[name].escapes.append(failures[0])
    return outputs


@contextlib.contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the implementations of attention and experts that are made of plain operators."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with plain_operators(model):
            yield
    finally:
        for module in training:
            module.training = True


def names_by_parameter(model: nn.Module) -> dict[str, list[str]]:
    """Each parameter's first name -> all its names; tied parameters have several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _solve(tracer: Tracer, model: nn.Module, model_type: str) -> FoldPlan:
    parameters = dict(model.named_parameters())
    names = names_by_parameter(model)
    folds: list[Fold] = []
    kept: dict[str, Kept] = {}
    for norm, gain in tracer.gains.items():
        if not gain.is_norm:
            continue
        linears: list[Linear] = []
        reason = _stopped(tracer, norm)
        for name, uses in tracer.uses.items():
            if reason is None and any(norm in use.channels for use in uses):
                linear = _consistent(tracer, name, norm, parameters, names[name])
                if isinstance(linear, Kept):
                    reason = linear
                else:
                    linears.append(linear)
        if reason is None and not linears:
            reason = Kept(NOTHING_READS_IT)
        if reason is None:
            reason = _unread(tracer, norm, parameters)
        bias = _norm_bias(tracer, norm)
        if reason is None and isinstance(bias, Kept):
            reason = bias
        if reason is None and not isinstance(bias, Kept):
            takers = _with_biases(tracer, norm, bias, linears) if bias else linears
            folds.append(Fold(norm, next(iter(gain.offsets)), tuple(takers), bias))
        elif reason is not None:
            kept[norm] = reason
    return FoldPlan(model_type=model_type, folds=tuple(folds), kept=kept)


def _stopped(tracer: Tracer, norm: str) -> Kept | None:
    """What stopped the gain itself."""
    gain = tracer.gains[norm]
    if gain.escapes:
        return gain.escapes[0]
    if tracer.uses.get(norm):
        use = tracer.uses[norm][0].at
        unknown = f"{UNKNOWN_OPERATOR}: " if use.reason.startswith(UNKNOWN_OPERATOR) else ""
        return Kept(f"{unknown}the norm weight has another use than as a gain", use.operator, use.where)
    if len(gain.offsets) != 1:
        return Kept(f"{UNKNOWN_OPERATOR}: its gain is the weight plus {sorted(gain.offsets)}, depending on the place")
    return None


def _consistent(
    tracer: Tracer, name: str, norm: str, parameters: Mapping[str, Tensor], aliases: Sequence[str]
) -> Linear | Kept:
    """The linear that takes the gain, if all its uses agree on that."""
    uses = tracer.uses[name]
    axis = next(use.axis for use in uses if norm in use.channels)
    assert axis is not None
    size = parameters[name].shape[axis]
    nothing = torch.full((size,), UNKNOWN)
    channels, seen = nothing.clone(), torch.zeros(size, dtype=torch.bool)
    for use in uses:
        if use.axis is None:
            return _other_use(name, use.at, aliases)
        theirs = use.channels.get(norm, nothing)
        both = seen & use.touched
        if use.axis != axis or not torch.equal(channels[both], theirs[both]):
            reason = f"{name} would have to take it here, but not in another use of the same weight"
            return Kept(reason, use.at.operator, use.at.where)
        channels = torch.where(use.touched, theirs, channels)
        seen |= use.touched
    if name in tracer.gains:
        return Kept(f"{name} would take it, but it also multiplies an activation channel by channel")
    return Linear(name, axis, segments_of(channels, parameters[norm].numel()))


def _norm_bias(tracer: Tracer, norm: str) -> str | Kept | None:
    """The norm's own bias, if it has one; a reason if that bias is not its alone."""
    biases = tracer.gains[norm].biases
    if not biases:
        return None
    if len(biases) > 1:
        return Kept(f"{UNKNOWN_OPERATOR}: it goes with several biases, {', '.join(sorted(biases))}")
    bias = next(iter(biases))
    others = [use.at for use in tracer.uses[bias] if use.adds_to != norm]
    if others or bias in tracer.gains:
        at = others[0] if others else Kept("")
        return Kept(f"{UNKNOWN_OPERATOR}: its bias {bias} has another use", at.operator, at.where)
    return bias


def _with_biases(tracer: Tracer, norm: str, bias: str, linears: Sequence[Linear]) -> list[Linear]:
    """The linears with the biases that take the norm's bias, if every one has such a bias; else as they are.

    `c + W beta` is one tensor: it must be right in every use of `c`.
    """
    takers: list[Linear] = []
    for linear in linears:
        uses = tracer.uses[linear.name]
        own = uses[0].bias
        always = all(
            use.bias == own and bias in use.shifts and torch.equal(use.shifts[bias], use.channels[norm]) for use in uses
        )
        if own is None or not always or own in tracer.gains:
            return list(linears)
        if any(use.adds_to != linear.name for use in tracer.uses[own]):
            return list(linears)
        takers.append(replace(linear, bias=own))
    return takers


def _other_use(name: str, use: Kept, aliases: Sequence[str]) -> Kept:
    if len(aliases) > 1:
        tie = f"tied: {aliases[-1]} is {aliases[0]}, which {use.operator} reads without the gain"
        return Kept(tie, use.operator, use.where)
    if use.reason.startswith(UNKNOWN_OPERATOR):
        return Kept(f"{UNKNOWN_OPERATOR}: it also reads {name}, which would take it", use.operator, use.where)
    return Kept(f"{name} would take it, but {use.reason}", use.operator, use.where)


def segments_of(channels: Tensor, gain_size: int) -> Segments:
    """Runs of consecutive channels as `(axis_start, gain_start, length)`; empty if every channel `i` takes gain `i`.

    Args:
        channels: `[axis size]`, the gain's channel for every index of the axis, -1 where there is none.
        gain_size: how many channels the gain has.
    """
    if torch.equal(channels, torch.arange(gain_size)):
        return ()
    segments: list[tuple[int, int, int]] = []
    for position, channel in enumerate(channels.tolist()):
        if channel == UNKNOWN:
            continue
        if segments:
            start, first, length = segments[-1]
            if position == start + length and channel == first + length:
                segments[-1] = (start, first, length + 1)
                continue
        segments.append((position, channel, 1))
    return tuple(segments)


def _unread(tracer: Tracer, norm: str, parameters: Mapping[str, Tensor]) -> Kept | None:
    """A module that was given the gain's activation and left parameters unread may read them another time."""
    for module in sorted(tracer.gains[norm].received_by):
        prefix = f"{module}." if module else ""
        for name in parameters:
            if name.startswith(prefix) and not tracer.uses.get(name) and name not in tracer.gains:
                return Kept(f"{UNKNOWN_OPERATOR}: {name} may read it, but the trace did not reach it", None, module)
    return None
