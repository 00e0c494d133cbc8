"""From a model to its plan: a copy of the model runs on the meta device, under a tracer, with example inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch import tree_map
from flashnorm.compat.transformers import plain_operators
from flashnorm.errors import InputError, brief
from flashnorm.plan import Kept
from flashnorm.trace.inputs import Arguments, ExampleCall, ListsOfItems, MixedDevices, example_calls
from flashnorm.trace.meta_copy import meta_copy
from flashnorm.trace.records import Records, Use, unknown
from flashnorm.trace.rules import GUESSES, Call, propagate
from flashnorm.trace.tracer import Tracer
from flashnorm.trace.values import Value

_META = torch.device("meta")


@dataclass(frozen=True)
class Analysis:
    """What a trace looks for: what is known of the results of an operator, and the records to note it in."""

    propagate: Callable[[Call], list[Value]]
    records: Callable[[], Records]


GAINS = Analysis(propagate, Records)


@torch.inference_mode(False)
def trace(model: nn.Module, inputs: tuple[Any, ...] | None = None, analysis: Analysis = GAINS) -> Tracer:
    """Run a model's forward under a tracer of an analysis.

    A copy of the model runs in evaluation mode on the meta device, whatever device the model is on: no weight is read,
    moved or copied. The model itself is not changed, so another thread may use it meanwhile.

    Without `inputs`, the model's methods that take images or audio run as well. A method that fails might have read any
    parameter that the forward leaves unread: no fold then involves such a parameter.

    Inference mode is turned off, as the tracer would see other operators in it.

    Args:
        model: any module; its parameters may be on the meta device.
        inputs: positional arguments of its forward. None: the inputs of a Transformers model (`trace/inputs/`).
        analysis: what to look for.

    Raises:
        InputError: the forward does not run on the meta device.
    """
    given = tree_map(lambda leaf: leaf.to(_META) if isinstance(leaf, Tensor) else leaf, inputs)
    forward, *others = example_calls(model) if given is None else [ExampleCall("forward", ({},), given)]
    furthest: Exception | None = None
    most = -1
    besides = [chosen for call in others for chosen in _chosen(model, call, analysis)]
    for arguments in forward.alternatives:
        tracer, error = _traced(model, partial(_run_all, [(forward, arguments), *besides]), analysis)
        if error is None:
            return tracer
        if len(tracer.records.uses) > most:
            furthest, most = error, len(tracer.records.uses)
    raise InputError(
        f"expected a model whose forward runs on the meta device, found that {type(model).__name__}'s does not "
        f"({type(furthest).__name__}: {furthest}); pass example_inputs that it accepts, or report the model"
    ) from furthest


def _traced(
    model: nn.Module, calls: Callable[[nn.Module, Tracer], Any], analysis: Analysis
) -> tuple[Tracer, Exception | None]:
    """Run calls on a copy of a model under a new tracer, again for every guess that may matter.

    Returns:
        The tracer; and the first error if every run failed, else None.
    """
    model, stand_ins = meta_copy(model)
    model.eval()
    tracer = Tracer(model, dict(model.named_parameters()), analysis.records(), analysis.propagate)

    def run() -> Any:
        with ListsOfItems(), MixedDevices(bool(tracer.guess.number), tracer.note_guess, stand_ins):
            return calls(model, tracer)

    first: Exception | None = None
    worked = False
    with plain_operators(model):
        for tracer.guess in GUESSES:
            try:
                tracer.run(run)
                worked = True
            except Exception as error:  # a guess may be out of bounds; what the tracer saw until then counts
                first = first or error
            if not (tracer.guess_matters if worked else tracer.guessed):
                break
    return tracer, None if worked else first


def _chosen(model: nn.Module, call: ExampleCall, analysis: Analysis) -> list[tuple[ExampleCall, Arguments | None]]:
    """The call with the first of its alternatives that works. If none does, the calls that are to be made instead.

    If there are no such calls either, the alternative that uses most parameters before it fails.
    """
    if len(call.alternatives) == 1 and not call.instead:
        return [(call, call.alternatives[0])]
    furthest, most = None, -1
    for arguments in call.alternatives:
        tracer, error = _traced(model, lambda copy, _, arguments=arguments: call.run(copy, arguments), analysis)
        if error is None:
            return [(call, arguments)]
        if len(tracer.records.uses) > most:
            furthest, most = arguments, len(tracer.records.uses)
    if call.instead:
        return [chosen for other in call.instead for chosen in _chosen(model, other, analysis)]
    return [(call, furthest)]


def _run_all(calls: Sequence[tuple[ExampleCall, Arguments | None]], model: nn.Module, tracer: Tracer) -> list[Any]:
    """Run the calls. All but the first may fail; no fold then involves a parameter that the first left unread."""
    records = tracer.records
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
            failures.append(unknown(f"{call.method} cannot be traced: {brief(error)}"))
        if not unread:
            unread = dict(model.named_parameters()).keys() - records.uses.keys() - records.gains.keys()
    for name in unread if failures else ():
        records.uses[name].append(Use(at=failures[0]))
        if name in records.gains:
            records.gains[name].escapes.append(failures[0])
    return outputs
