"""Compares all that source and converted model return, for models other than causal language models.

Encoders, classifiers, encoder-decoders, vision and audio models are run on the numbers of `inputs.py`. Nothing is known
of what their outputs mean, so the distance of two runs is the length of the error of a vector (the last axis of a
tensor), relative to the length of the vectors in the reference run, the source in float64.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashnorm.errors import InputError, brief
from flashnorm.verify.divergence import vector_errors
from flashnorm.verify.inputs import Call, NoInputsError
from flashnorm.verify.measures import CHANCE, FLOAT64_NOISE, MAX_RATIO, Criterion
from flashnorm.verify.runs import Loader, Runner

# An output whose source is farther from the reference is chosen or drawn by chance in this dtype.
MOST_ERROR = 0.5

# The most that rounding the weights may change such an output in float64; a gain that is left out changes about as much
# as the output is long.
CHANGED = 0.1

# A cache is no output: a folded model fills and reads it without the gain.
_CACHES = {"past_key_values", "cache_params", "cache"}


@dataclass(frozen=True)
class Returned:
    """One tensor that a call returns, and how far runs are from the reference run, the source in float64.

    Attributes:
        name: method and field, such as "forward: last_hidden_state".
        numbers: how many numbers were compared.
        source, converted: mean relative error of a vector in the checkpoint's dtype.
        rounding: that of the converted model in float64, which shows only the rounding of the folded weights.
        spread: the standard error of `source`.
    """

    name: str
    numbers: int
    source: float
    converted: float
    rounding: float
    spread: float = 0.0

    @property
    def judged(self) -> bool:
        """Whether the output can be compared in the checkpoint's dtype: whether the source repeats it there."""
        return self.source <= MOST_ERROR


@dataclass(frozen=True)
class ReturnedReport:
    """What was measured of a model that is no causal language model.

    Attributes:
        model_class: the class of the models.
        dtype: the checkpoint's dtype, in which both models were run.
        streamed: whether the weights came from disk, a module at a time.
        returned: the tensors that the calls returned.
        criteria: the conditions that decide whether the models count as the same.
    """

    model_class: str
    dtype: str
    streamed: bool
    returned: tuple[Returned, ...]
    criteria: tuple[Criterion, ...]
    skipped: None = None

    @property
    def ok(self) -> bool:
        """Whether all criteria hold."""
        return all(criterion.ok for criterion in self.criteria)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """What was not compared, in words."""
        chance = [one.name for one in self.returned if not one.judged]
        by_chance = f"in {self.dtype}, which the source itself does not repeat there: {', '.join(chance)}"
        return (
            *((by_chance,) if chance else ()),
            f"other inputs of {self.model_class} than a text, and random numbers for images, sounds and embeddings",
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        returned = [asdict(one) | {"judged": one.judged} for one in self.returned]
        return {"ok": self.ok, **asdict(self), "returned": returned}


def compare_returned(
    run: Runner,
    load_source: Loader,
    load_converted: Loader,
    calls: Sequence[Call],
    dtype: torch.dtype,
    *,
    model_class: str,
    stage: Callable[[str], object],
) -> ReturnedReport:
    """Run source and converted model, and compare both with the reference run, the source in float64.

    The models count as the same if two criteria hold for every tensor that they return. They are criteria 1 and 2 of
    `verify_outputs`, for the mean relative error of a vector in the place of the KL divergence. The tolerance is 3
    standard errors of the difference, for errors that spread as the source's do. An error below the dtype's epsilon
    counts as epsilon. The second criterion cannot be asked of an output that the source itself does not repeat in its
    dtype, such as one that depends on random numbers; in float64, such an output may change by `CHANGED`.

    Args:
        run: how models are run.
        load_source, load_converted: load the two models.
        calls: what to call, see `calls_with_numbers`.
        dtype: the checkpoint's dtype.
        model_class: the class of the models, for the report.
        stage: called with a few words before each run.

    Raises:
        NoInputsError: the source's forward works with none of the inputs.
        InputError: another run returns other tensors than the reference run.
    """
    named = str(dtype).removeprefix("torch.")

    def wide(model: PreTrainedModel) -> PreTrainedModel:
        """The model with all parts in float64, also those that its class loads in float32."""
        return model if run.streamed else model.double()

    stage("the source in float64, as the reference")
    chosen, oracle = run.use(load_source, torch.float64, lambda model: _first_that_work(wide(model), calls), exact=True)

    def outputs(load: Loader, dtype: torch.dtype, exact: bool = False) -> dict[str, Tensor]:
        def returned(model: PreTrainedModel) -> dict[str, Tensor]:
            try:
                found = _outputs(wide(model) if exact else model, chosen, dtype)
            except Exception as error:  # code for tensors that are not what it expects raises anything
                who = f"{model_class} {'in float64' if exact else f'in {named}'}"
                if load is load_source:
                    raise NoInputsError(f"{who} does not run ({brief(error)})") from error
                raise InputError(
                    f"expected the converted model to run as its source does, found that {who} fails: {brief(error)}"
                ) from error
            if found.keys() != oracle.keys():
                raise InputError(f"expected that all runs return {', '.join(oracle)}, found {', '.join(found)}")
            return found

        return run.use(load, dtype, returned, exact=exact)

    stage(f"the source in {named}")
    source = outputs(load_source, dtype)
    stage(f"the converted model in {named}")
    converted = outputs(load_converted, dtype)
    stage("the converted model in float64")
    rounding = outputs(load_converted, torch.float64, exact=True)
    floor = max(torch.finfo(dtype).eps, FLOAT64_NOISE)
    returned = tuple(_measured(name, oracle[name], source[name], converted[name], rounding[name]) for name in oracle)
    return ReturnedReport(
        model_class=model_class,
        dtype=named,
        streamed=run.streamed,
        returned=returned,
        criteria=tuple(_criteria(returned, named, floor)),
    )


def _first_that_work(model: PreTrainedModel, calls: Sequence[Call]) -> tuple[list[Call], dict[str, Tensor]]:
    """The calls with the first alternative that works, and what they return. Methods that do not work are left out."""
    chosen: list[Call] = []
    found: dict[str, Tensor] = {}
    for call in calls:
        problems: list[Exception] = []
        for alternative in call.alternatives:
            try:
                one = Call(call.method, (alternative,))
                found |= _outputs(model, [one], torch.float64)
                chosen.append(one)
                break
            except Exception as error:  # inputs that do not fit raise anything
                problems.append(error)
        else:
            if call.method == "forward":
                why = brief(problems[0]) if problems else "none are known"
                raise NoInputsError(f"{type(model).__name__} runs on none of the inputs that are known ({why})")
    return chosen, found


def _outputs(model: PreTrainedModel, calls: Sequence[Call], dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> `[vectors, channels]`, of all that the calls return for all their arguments."""
    found: dict[str, list[Tensor]] = {}
    for call in calls:
        for arguments in call.alternatives[0]:
            for name, tensor in _tensors(call.run(model, arguments, dtype), ""):
                vectors = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
                found.setdefault(f"{call.method}: {name or 'result'}", []).append(vectors)
    if not found:
        raise ValueError("it returns no floating-point numbers")
    return {name: torch.cat(parts) for name, parts in found.items()}


def _tensors(result: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a result, each with the fields that lead to it."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield name, result
    elif isinstance(result, Mapping):
        for key, value in result.items():
            if key not in _CACHES:
                yield from _tensors(value, f"{name}.{key}".lstrip("."))
    elif isinstance(result, (list, tuple)):
        for number, value in enumerate(result):
            yield from _tensors(value, f"{name}.{number}".lstrip("."))


def _measured(name: str, oracle: Tensor, source: Tensor, converted: Tensor, rounding: Tensor) -> Returned:
    by_source, by_converted, by_rounding = (vector_errors(oracle, run) for run in (source, converted, rounding))
    spread = float(by_source.std(correction=0)) / math.sqrt(len(by_source))
    at_source, at_converted, at_rounding = (float(errors.mean()) for errors in (by_source, by_converted, by_rounding))
    return Returned(name, oracle.numel(), at_source, at_converted, at_rounding, spread)


def _criteria(returned: Sequence[Returned], dtype: str, floor: float) -> Iterator[Criterion]:
    def limit(one: Returned, ratio: float) -> float:
        return ratio * max(one.source, floor) + CHANCE * math.hypot(1, ratio) * one.spread

    def worst(asked: str, found: Sequence[tuple[str, float, float]]) -> Criterion:
        name, error, most = max(found, key=lambda one: one[1] / one[2] if math.isfinite(one[1]) else math.inf)
        return Criterion(
            asked,
            f"the nearest to its limit of {len(found)} is {name}: {error:.3g}, at most {most:.3g}",
            all(error <= most for _, error, most in found),
        )

    yield worst(
        f"in float64, the converted one is no farther from the reference than {dtype} takes the source",
        [(one.name, one.rounding, limit(one, 1.0) if one.judged else CHANGED) for one in returned],
    )
    if judged := [one for one in returned if one.judged]:
        yield worst(
            f"in {dtype}, it is at most {MAX_RATIO:g} times as far as the source",
            [(one.name, one.converted, limit(one, MAX_RATIO)) for one in judged],
        )
