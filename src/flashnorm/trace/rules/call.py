"""What a rule is, and what it is given: one call of an operator."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flashnorm.plan import Kept
from flashnorm.trace.records import Records
from flashnorm.trace.rules.reasons import ANOTHER_USE
from flashnorm.trace.values import PLAIN, Value


class UnknownError(Exception):
    """The rule does not cover this form of the operator."""


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        records: where to note what becomes of gains and parameters.
        value_of: what is known of a tensor.
        func, args, kwargs, out: the operator, its arguments, and its result or results.
        keeps_parts: whether the rule handles tensors that have parts; if not, `value` leaves the parts out.
    """

    records: Records
    value_of: Callable[[Tensor], Value]
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any
    keeps_parts: bool = False

    @property
    def operator(self) -> str:
        """The operator's name, as in `aten.mul`."""
        return str(self.func.overloadpacket)

    def value(self, argument: Any) -> Value:
        """What is known of an argument (nothing, if it is not a tensor)."""
        value = self.value_of(argument) if isinstance(argument, Tensor) else PLAIN
        return value if self.keeps_parts or not value.parts else replace(value, parts=())

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def is_tensor(self, position: int) -> bool:
        """Whether the argument at a position is a tensor, and not a number."""
        return isinstance(self.args[position], Tensor)

    def spread(self, gains: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The channels of gains, broadcast to the shape of the result."""
        return {gain: index.broadcast_to(self.out.shape) for gain, index in gains.items()}

    def escape(self, gain: str, why: Kept) -> None:
        """Note that the gain ends here and cannot be folded."""
        self.records.escape(gain, why, self.operator)

    def use(self, *values: Value, why: Kept = ANOTHER_USE) -> None:
        """Note a use of parameters other than as a gain or as the place of a fold: nothing may fold into them."""
        views = [Value(view=value.view) for value in values if value.view]
        self.records.escape_all(views, why, self.operator)


@dataclass(frozen=True)
class Rule:
    """How a gain travels through an operator.

    Attributes:
        apply: returns what is known of the operator's results, of which it may leave out the last ones. It notes uses
            and escapes in the call's records, and raises `UnknownError` for a form that it does not cover.
        keeps_shifts: the results keep their shifts: the operator only moves elements, or adds the norm's bias itself.
        keeps_parts: the results keep their parts: the operator only moves elements.
    """

    apply: Callable[[Call], Value | Sequence[Value]]
    keeps_shifts: bool = False
    keeps_parts: bool = False
