"""What a trace finds: every use of every parameter, and what becomes of every gain."""

import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flashnorm.plan import Kept, Kind
from flashnorm.trace.values import Value

# The code in these folders (PyTorch's and ours) is no model code, so a reason never names a line of it.
_QUIET_FOLDERS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


def unknown(detail: str = "") -> Kept:
    """A reason that does not prove that folding is impossible. Every such reason begins with the same words."""
    return Kept(f"unknown operator: {detail}" if detail else "unknown operator", kind=Kind.UNKNOWN)


@dataclass
class Use:
    """One use of a parameter.

    Attributes:
        at: a reason with the operator and the place of the use.
        axis: the axis contracted with an activation that carries gains; None for any other use.
        channels: gain -> `[axis size]`, the gain's channel for every index of the axis (-1: none).
        shifts: norm bias -> `[axis size]`, its channels likewise, for the norm biases that are in that activation.
        touched: `[axis size]`, boolean: which indices of the axis this use reads.
        bias: the parameter that is added to the product, one element for each output channel.
        adds_to: for a use as a bias: the norm's gain, or the linear layer's weight, to whose product it is added.
    """

    at: Kept
    axis: int | None = None
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    touched: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    bias: str | None = None
    adds_to: str | None = None


@dataclass
class GainRecord:
    """A parameter that multiplies an activation channel by channel.

    Attributes:
        offsets: the constants that were added to it (a single one, unless the code adds others in other places).
        biases: the parameters that were added to the product, channel by channel (LayerNorm, DyT).
        is_norm: the activation was normalised. Other gains (a layer scale, say) are left out of the plan.
        escapes: the reasons why it cannot fold, in the order in which the trace met them.
        received_by: the modules that were called with an activation that carries it.
    """

    offsets: set[float] = field(default_factory=set)
    biases: set[str] = field(default_factory=set)
    is_norm: bool = False
    escapes: list[Kept] = field(default_factory=list)
    received_by: set[str] = field(default_factory=set)


_ADDED = Kept("it is added as a bias", kind=Kind.SHARED)


class Records:
    """What was found so far.

    Attributes:
        uses: parameter -> its uses, other than as a gain.
        gains: parameter -> what is known of it as a gain, in the order in which the model uses the parameters.
        read_outside: the parameters that code outside of their module's own forward has read (for their dtype, say).
        running: the names of the modules that are running, the innermost last.
    """

    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.gains: dict[str, GainRecord] = defaultdict(GainRecord)
        self.read_outside: set[str] = set()
        self.running: list[str] = []

    def escape(self, gain: str, why: Kept, operator: str | None) -> None:
        """Note that a gain cannot be folded."""
        self.gains[gain].escapes.append(self.here(why, operator))

    def escape_all(self, values: Iterable[Value], why: Kept, operator: str | None = None) -> None:
        """Note that the gains of these values cannot fold, and that nothing may fold into the parameters they view."""
        for value in values:
            for gain in value.gains:
                self.escape(gain, why, operator)
            if value.view:
                self.uses[value.view.name].append(Use(at=self.here(why, operator)))

    def note_addition(self, parameter: str, to: str, operator: str) -> None:
        """Note the use of a parameter as a bias; `to` is the norm's gain or the linear layer's weight."""
        self.uses[parameter].append(Use(at=self.here(_ADDED, operator), adds_to=to))

    def here(self, why: Kept, operator: str | None) -> Kept:
        """A reason, with the operator, the module that is running and the innermost line of model code."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(_QUIET_FOLDERS):
            frame = frame.f_back
        line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        if not self.running:
            return replace(why, operator=operator)
        return replace(why, operator=operator, where=f"{self.running[-1] or 'the model'} ({line})")


def not_reached(modules: Collection[str], unread: Sequence[str]) -> list[Kept]:
    """A reason for each unread parameter of modules that were given an activation: they may read it elsewhere."""
    return [
        replace(unknown(f"{name} may read it, but the trace did not reach it"), where=module)
        for module in sorted(modules)
        for name in unread
        if name.startswith(f"{module}." if module else "")
    ]
