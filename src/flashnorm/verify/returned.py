"""Compares all that source and converted model return, for models other than causal language models.

Encoders, classifiers, encoder-decoders, vision and audio models are run on the numbers of `inputs.py`. Nothing is known
of what their outputs mean, so the distance of two runs is the length of the error of a vector (the last axis of a
tensor), relative to the length of the vectors in the reference run, the source in float64.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashnorm.errors import InputError, brief
from flashnorm.verify.divergence import standard_error, typical_kl, vector_errors
from flashnorm.verify.inputs import CallWithNumbers, NotRunError
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
class Errors:
    """How far a run is from the reference run, in one output.

    Attributes:
        mean: mean relative error of a vector.
        typical: their geometric mean, where errors below the dtype's epsilon count as epsilon.
    """

    mean: float
    typical: float


@dataclass(frozen=True)
class Returned:
    """One tensor that a call returns, and how far runs are from the reference run, the source in float64.

    Attributes:
        name: call and field, such as "forward: last_hidden_state".
        numbers: how many numbers were compared.
        source, converted: the runs in the checkpoint's dtype.
        rounding: that of the converted model in float64, which shows only the rounding of the folded weights.
        limits: the most that `rounding` and `converted` may be.
    """

    name: str
    numbers: int
    source: Errors
    converted: Errors
    rounding: Errors
    limits: tuple[Errors, Errors]

    @property
    def judged(self) -> bool:
        """Whether the output can be compared in the checkpoint's dtype: whether the source repeats it there."""
        return self.source.mean <= MOST_ERROR


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
    calls: Sequence[CallWithNumbers],
    dtype: torch.dtype,
    *,
    model_class: str,
    stage: Callable[[str], object],
) -> ReturnedReport:
    """Run source and converted model, and compare both with the reference run, the source in float64.

    The models count as the same if two criteria hold for every tensor that they return: criteria 1 and 2 of
    `verify_outputs`, with the relative error of a vector in the place of the KL divergence. They must hold for the
    mean, with a tolerance of 3 standard errors, and for the typical error, which is the geometric mean, with 3 standard
    errors of the source's. An error below the dtype's epsilon counts as epsilon. The second criterion cannot be asked
    of an output that the source itself does not repeat in its dtype, such as one that depends on random numbers; in
    float64, the mean error of such an output may be `CHANGED`.

    Args:
        run: how models are run.
        load_source, load_converted: load the two models.
        calls: what to call, see `calls_with_numbers`.
        dtype: the checkpoint's dtype.
        model_class: the class of the models, for the report.
        stage: called with a few words before each run.

    Raises:
        NotRunError: the source's forward works with none of the inputs.
        InputError: another run returns other tensors than the reference run.
    """
    named = str(dtype).removeprefix("torch.")

    def wide(model: PreTrainedModel) -> PreTrainedModel:
        """The model with all parts in float64, also those that its class loads in float32."""
        return model if run.streamed else model.double()

    stage("the source in float64, as the reference")
    chosen, reference = run.use(
        load_source, torch.float64, lambda model: _first_that_work(wide(model), calls), exact=True
    )

    def outputs(load: Loader, dtype: torch.dtype, exact: bool = False) -> dict[str, Tensor]:
        def returned(model: PreTrainedModel) -> dict[str, Tensor]:
            try:
                found = _outputs(wide(model) if exact else model, chosen, dtype)
            except Exception as error:  # code for tensors that are not what it expects raises anything
                who = f"{model_class} {'in float64' if exact else f'in {named}'}"
                if load is load_source:
                    raise NotRunError(f"{who} does not run ({brief(error)})") from error
                raise InputError(
                    f"expected the converted model to run as its source does, found that {who} fails: {brief(error)}"
                ) from error
            if found.keys() != reference.keys():
                raise InputError(f"expected that all runs return {', '.join(reference)}, found {', '.join(found)}")
            return found

        return run.use(load, dtype, returned, exact=exact)

    stage(f"the source in {named}")
    source = outputs(load_source, dtype)
    stage(f"the converted model in {named}")
    converted = outputs(load_converted, dtype)
    stage("the converted model in float64")
    rounding = outputs(load_converted, torch.float64, exact=True)
    floor = max(torch.finfo(dtype).eps, FLOAT64_NOISE)
    returned = tuple(
        _measured(name, reference[name], source[name], converted[name], rounding[name], floor) for name in reference
    )
    return ReturnedReport(
        model_class=model_class,
        dtype=named,
        streamed=run.streamed,
        returned=returned,
        criteria=tuple(_criteria(returned, named)),
    )


def _first_that_work(
    model: PreTrainedModel, calls: Sequence[CallWithNumbers]
) -> tuple[list[CallWithNumbers], dict[str, Tensor]]:
    """The calls with the first alternative that works, and what they return. Methods that do not work are left out."""
    chosen: list[CallWithNumbers] = []
    found: dict[str, Tensor] = {}
    for call in calls:
        problems: list[Exception] = []
        for alternative in call.alternatives:
            try:
                one = replace(call, alternatives=(alternative,))
                found |= _outputs(model, [one], torch.float64)
                chosen.append(one)
                break
            except Exception as error:  # inputs that do not fit raise anything
                problems.append(error)
        else:
            if call.method == "forward":
                why = brief(problems[0]) if problems else "none are known"
                raise NotRunError(f"{type(model).__name__} runs on none of the inputs that are known ({why})")
    return chosen, found


def _outputs(model: PreTrainedModel, calls: Sequence[CallWithNumbers], dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> `[vectors, channels]`, of all that the calls return for all their arguments."""
    found: dict[str, list[Tensor]] = {}
    for call in calls:
        for arguments in call.alternatives[0]:
            for name, tensor in _tensors(call.run(model, arguments, dtype), ""):
                vectors = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
                found.setdefault(f"{call.name}: {name or 'result'}", []).append(vectors)
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


def _measured(
    name: str, reference: Tensor, source: Tensor, converted: Tensor, rounding: Tensor, floor: float
) -> Returned:
    by_source, by_converted, by_rounding = (vector_errors(reference, run) for run in (source, converted, rounding))
    return Returned(
        name,
        reference.numel(),
        *(Errors(float(one.mean()), typical_kl(one.tolist(), floor)) for one in (by_source, by_converted, by_rounding)),
        limits=(_limit(by_source, by_rounding, 1.0, floor), _limit(by_source, by_converted, MAX_RATIO, floor)),
    )


def _limit(source: Tensor, run: Tensor, ratio: float, floor: float) -> Errors:
    """The most that a run's errors may be, if they are chance like the source's, and `ratio` times as large."""
    if not source.mean() <= MOST_ERROR:
        return Errors(CHANGED, math.inf)
    chance = CHANCE * standard_error(run.tolist(), source.tolist(), ratio)
    logs = source.clamp_min(floor).log()
    typical = CHANCE * math.sqrt(2 / len(logs)) * float(logs.std(correction=0))
    return Errors(
        ratio * max(float(source.mean()), floor) + (chance if math.isfinite(chance) else 0.0),
        ratio * typical_kl(source.tolist(), floor) * math.exp(typical),
    )


def _criteria(returned: Sequence[Returned], dtype: str) -> Iterator[Criterion]:
    def worst(asked: str, found: Sequence[tuple[str, Errors, Errors]]) -> Criterion:
        pairs = [
            (name, kind, getattr(errors, kind), getattr(limit, kind))
            for name, errors, limit in found
            for kind in ("mean", "typical")
        ]
        name, kind, error, most = max(pairs, key=lambda one: one[2] / one[3] if math.isfinite(one[2]) else math.inf)
        return Criterion(
            asked,
            f"of {len(found)} outputs, the {kind} error of {name} is the nearest to its limit: {error:.3g}, at most "
            f"{most:.3g}",
            all(error <= most for _, _, error, most in pairs),
        )

    yield worst(
        f"in float64, the converted one is no farther from the reference than {dtype} takes the source",
        [(one.name, one.rounding, one.limits[0]) for one in returned],
    )
    if judged := [one for one in returned if one.judged]:
        yield worst(
            f"in {dtype}, it is at most {MAX_RATIO:g} times as far as the source",
            [(one.name, one.converted, one.limits[1]) for one in judged],
        )
