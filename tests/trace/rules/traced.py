"""What the tracer knows of the tensors that a function makes of parameters and activations, on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.plan import Kept
from flashnorm.trace.records import Records
from flashnorm.trace.tracer import Tracer
from flashnorm.trace.values import Value

META = torch.device("meta")
TOKENS, CHANNELS = 3, 4


@dataclass(frozen=True)
class Traced:
    """What is known of a function's results, and what was noted on the way."""

    values: list[Value]
    records: Records

    @property
    def value(self) -> Value:
        """Of the only result."""
        (value,) = self.values
        return value

    def channels(self, gain: str = "g") -> list[Any]:
        """The channel of a gain at every element of the result."""
        return self.value.gains[gain].tolist()

    def escapes(self, gain: str = "g") -> list[tuple[Kept, str | None]]:
        """Why a gain cannot be folded, and the operators that say so."""
        found = self.records.gains[gain].escapes
        return [(replace(kept, operator=None, where=None), kept.operator) for kept in found]


def normalised(x: Tensor) -> Tensor:
    """What every norm does before its gain."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


class Inputs:
    """Tensors that a function is traced on.

    Attributes:
        x: an activation of `[TOKENS, CHANNELS]` that carries no gain.
        h: one that carries the norm weight `g` of `[CHANNELS]`.
        parameters: `g`, and those that the test asks for.
    """

    def __init__(self, tracer: Tracer, parameters: dict[str, Tensor]):
        self.parameters = parameters
        self.x = torch.empty(TOKENS, CHANNELS, device=META)
        with tracer:
            self.h = normalised(self.x) * parameters["g"]

    def __getattr__(self, name: str) -> Tensor:
        return self.parameters[name]


def traced(function: Callable[[Inputs], Any], **shapes: tuple[int, ...]) -> Traced:
    """Trace a function of `Inputs`, with further parameters of these shapes."""
    shapes = {"g": (CHANNELS,)} | shapes
    parameters: dict[str, Tensor] = {
        name: nn.Parameter(torch.empty(shape, device=META), requires_grad=False) for name, shape in shapes.items()
    }
    tracer = Tracer(nn.Module(), parameters)
    inputs = Inputs(tracer, parameters)
    with tracer, torch.no_grad():
        results = function(inputs)
    results = results if isinstance(results, (tuple, list)) else [results]
    return Traced([tracer.value_of(result) for result in results], tracer.records)
