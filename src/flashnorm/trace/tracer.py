"""Runs a model's own forward on the meta device and records how every norm weight is used.

* A `TorchDispatchMode` sees every operator; `rules.py` says how a gain travels through it.
* Sound by construction: an operator without a rule is an escape of every gain it reads, and a use of every parameter it
  reads that nothing may be folded into.
* A parameter is recorded with all its uses, so a second use of any kind is seen.
"""

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch import TorchDispatchMode, is_mutable, memory_of, tree_leaves
from flashnorm.plan import Kept
from flashnorm.trace import rules
from flashnorm.trace.values import PLAIN, Value, View

aten = torch.ops.aten

_QUIET_FOLDERS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


@dataclass
class Use:
    """One use of a parameter.

    Attributes:
        at: operator and place.
        axis: the axis contracted with an activation that carries gains; None for any other use.
        channels: gain -> `[axis size]`, the gain's channel for every index of the axis (-1: none).
        shifts: norm bias -> the same, for the biases that were added to that activation.
        touched: `[axis size]`, the indices of the axis that this use reads.
        bias: the parameter that is added to the product, output channel by output channel.
        adds_to: what this parameter is added to: as a norm's bias, the norm's gain; as a linear's, the linear's weight.
    """

    at: Kept
    axis: int | None = None
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    touched: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    bias: str | None = None
    adds_to: str | None = None


@dataclass
class Gain:
    """A parameter that multiplies an activation channel by channel.

    Attributes:
        offsets: the constants that were added to it (one, unless the code does different things in different places).
        biases: the parameters that were added to the product, channel by channel (LayerNorm, DyT).
        is_norm: the activation was normalised; other gains (a layer scale, say) are none of our business.
        escapes: what stops it from folding, in the order in which it was met.
        received_by: the modules that were called with an activation that carries it.
    """

    offsets: set[float] = field(default_factory=set)
    biases: set[str] = field(default_factory=set)
    is_norm: bool = False
    escapes: list[Kept] = field(default_factory=list)
    received_by: set[str] = field(default_factory=set)


class Tracer(TorchDispatchMode):
    """Records the uses of a model's parameters while its forward runs on meta tensors.

    Attributes:
        uses: parameter -> its uses, other than as a gain.
        gains: parameter -> what is known of it as a gain, in the order in which the model uses them.
        guess: the answers to questions about values.
        guessed, guess_matters: such a question was asked; and a gain was under way.
        operators: each operator, with the numbers that it was given -> how often it ran.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.gains: dict[str, Gain] = defaultdict(Gain)
        self.guess = rules.GUESSES[0]
        self.guessed = self.guess_matters = False
        self.operators: Counter[str] = Counter()
        self._model = model
        self._stack: list[str] = []
        self._values: dict[int, Value] = {}
        # Every tensor ever seen, by storage: keeps their ids from being reused and shows who shares memory with whom.
        self._storages: dict[int, list[Tensor]] = defaultdict(list)
        for name, parameter in parameters.items():
            self._set(parameter, Value(view=View.of(name, parameter)))

    def run(self, forward: Callable[[], Any]) -> None:
        """Run the forward under the tracer; what it returns is an output of the model, where no gain may arrive."""
        hooks: list[Any] = []
        for name, module in self._model.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self, torch.no_grad():
                outputs = forward()
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in _tensors_in(outputs):
            for gain in self.value_of(tensor).gains:
                self.escape(gain, "it is an output of the model", operator=None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = rules.ANSWERS.get(func.overloadpacket)
        if answer is None:
            out = func(*args, **kwargs)
        else:
            self.note_guess()
            out = answer(self.guess, *args)
        self._record(rules.Call(self, func, args, kwargs, out))
        return out

    def _record(self, call: rules.Call) -> None:
        numbers = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, (int, float))]
        self.operators[f"{call.func} {numbers}"] += 1
        values = call.propagate()
        outputs = [leaf for leaf in tree_leaves(call.out) if isinstance(leaf, Tensor)]
        mutable = is_mutable(call.func)
        if mutable:
            self._no_longer_zero(call)
        for tensor, value in zip(outputs, values, strict=True):
            before = self.value_of(tensor) if mutable else PLAIN
            if mutable and (before.tracked or value.tracked) and len(self._storages[memory_of(tensor)]) > 1:
                # Some other tensor sees this write, and which elements of it is not known.
                self.escape_all(
                    (before, value), f"{rules.UNKNOWN_OPERATOR}: a write into memory that other tensors share", call
                )
                value = PLAIN
            self._set(tensor, value)

    def _no_longer_zero(self, call: rules.Call) -> None:
        """Whatever shares memory with what is written to."""
        for leaf in tree_leaves((call.args, call.kwargs)):
            for alias in self._storages.get(memory_of(leaf), ()) if isinstance(leaf, Tensor) else ():
                if self._values[id(alias)].zero:
                    self._values[id(alias)] = replace(self._values[id(alias)], zero=False)

    def value_of(self, tensor: Tensor) -> Value:
        """What is known of a tensor; one that the tracer has not seen is a constant, unless it shares memory."""
        value = self._values.get(id(tensor))
        if value is not None:
            return value
        if not (aliases := self._storages.get(memory_of(tensor))):
            return PLAIN
        for alias in aliases:  # such as `parameter.data`
            if alias.shape == tensor.shape and alias.stride() == tensor.stride():
                return self._values[id(alias)]
        self.escape_all(
            [self._values[id(alias)] for alias in aliases], f"{rules.UNKNOWN_OPERATOR}: an untraced view of it"
        )
        return PLAIN

    def escape(self, gain: str, reason: str, operator: str | None) -> None:
        """Note that a gain cannot be folded."""
        self.gains[gain].escapes.append(self.here(reason, operator))

    def escape_all(self, values: Any, reason: str, call: rules.Call | None = None) -> None:
        """Note that nothing may be folded of, or into, what these values hold."""
        operator = call.operator if call else None
        for value in values:
            for gain in value.gains:
                self.escape(gain, reason, operator)
            if value.view:
                self.uses[value.view.name].append(Use(at=self.here(reason, operator)))

    def note_guess(self) -> None:
        """Note that code was given an answer that depends on values."""
        self.guessed = True
        self.guess_matters |= bool(self.gains)

    def note_addition(self, parameter: str, to: str, call: rules.Call) -> None:
        """Note the use of a parameter as the bias of a gain, or of a linear."""
        self.uses[parameter].append(Use(at=self.here("it is added as a bias", call.operator), adds_to=to))

    def here(self, reason: str, operator: str | None) -> Kept:
        """A reason, with the module that is running and the innermost line of model code."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(_QUIET_FOLDERS):
            frame = frame.f_back
        line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        if not self._stack:
            return Kept(reason, operator, None)
        return Kept(reason, operator, f"{self._stack[-1] or 'the model'} ({line})")

    def _set(self, tensor: Tensor, value: Value) -> None:
        if id(tensor) not in self._values:
            self._storages[memory_of(tensor)].append(tensor)
        self._values[id(tensor)] = value

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append(name)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                for gain in self.value_of(leaf).gains:
                    self.gains[gain].received_by.add(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()


def _tensors_in(outputs: Any, depth: int = 4) -> list[Tensor]:
    """Every tensor in a forward's result, inside objects as well."""
    found: list[Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += _tensors_in(list(vars(leaf).values()), depth - 1)
    return found
