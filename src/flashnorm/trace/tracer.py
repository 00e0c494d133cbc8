"""Runs a model's own forward on the meta device and records how every norm weight is used.

* A `TorchDispatchMode` sees every operator; `rules` says how a gain travels through it.
* Sound by construction: at an operator without a rule, every gain that it reads escapes (cannot fold), and nothing may
  fold into any parameter that it reads.
* A parameter is recorded with all its uses, so a second use of any kind is seen.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch import TorchDispatchMode, flat, is_mutable, memory_of, note_reads, tree_leaves
from flashnorm.plan import Kept, Kind
from flashnorm.trace.records import Records, unknown
from flashnorm.trace.rules import ANSWERS, GUESSES, Call, fitting_sizes, propagate
from flashnorm.trace.values import PLAIN, Value, View

_OUTPUT = Kept("it is an output of the model", kind=Kind.STOPPED)


class Tracer(TorchDispatchMode):
    """Records the uses of a model's parameters while its forward runs on meta tensors.

    Args:
        model: the model.
        parameters: the parameters to follow, by name.
        records: where to note what is found.
        propagate: what is known of the results of an operator: by the rules for gains, or by those of another table.

    Attributes:
        records: what was found.
        guess: the answers to questions about the values of tensors.
        guessed, guess_matters: such a question was asked; it was asked after the first gain.
        operators: each operator with the numbers among its arguments -> how often it ran.
        model: the model.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        records: Records | None = None,
        propagate: Callable[[Call], list[Value]] = propagate,
    ):
        super().__init__()
        self.records = Records() if records is None else records
        self.guess = GUESSES[0]
        self.guessed = self.guess_matters = False
        self.operators: Counter[str] = Counter()
        self.model = model
        self._propagate = propagate
        self._values: dict[int, Value] = {}
        # Every tensor seen, by storage: those in one list share memory. Holding them keeps their ids from being reused.
        self._storages: dict[int, list[Tensor]] = defaultdict(list)
        for name, parameter in parameters.items():
            self._set(parameter, Value(view=View.of(name, parameter)))

    def run(self, forward: Callable[[], Any]) -> None:
        """Run the forward under the tracer. What it returns is the model's output: a gain that reaches it escapes."""
        hooks: list[Any] = []
        for name, module in self.model.named_modules():
            note_reads(module, partial(self._read, name))
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
                self.records.escape(gain, _OUTPUT, operator=None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.guessed:
            args = fitting_sizes(func, args)
        answer = ANSWERS.get(func.overloadpacket)
        if answer is None:
            out = func(*args, **kwargs)
        else:
            self.note_guess()
            out = answer(self.guess, *args)
        self._record(Call(self.records, self.value_of, func, args, kwargs, out))
        return out

    def _record(self, call: Call) -> None:
        numbers = [leaf for leaf in flat((call.args, call.kwargs)) if isinstance(leaf, (int, float))]
        self.operators[f"{call.func} {numbers}"] += 1
        values = self._propagate(call)
        outputs = [leaf for leaf in flat(call.out) if isinstance(leaf, Tensor)]
        mutable = is_mutable(call.func)
        if mutable:
            self._no_longer_zero(call)
        for tensor, value in zip(outputs, values, strict=True):
            before = self.value_of(tensor) if mutable else PLAIN
            if mutable and (before.tracked or value.tracked) and len(self._storages[memory_of(tensor)]) > 1:
                # Another tensor sees this write, and it is not known which of its elements change.
                why = unknown("a write into memory that other tensors share")
                self.records.escape_all((before, value), why, call.operator)
                value = PLAIN
            self._set(tensor, value)

    def _no_longer_zero(self, call: Call) -> None:
        """Note that the operands of a write, and all tensors that share their memory, may not be zero any more."""
        for leaf in flat((call.args, call.kwargs)):
            for alias in self._storages.get(memory_of(leaf), ()) if isinstance(leaf, Tensor) else ():
                if self._values[id(alias)].zero:
                    self._values[id(alias)] = replace(self._values[id(alias)], zero=False)

    def value_of(self, tensor: Tensor) -> Value:
        """What is known of a tensor. An unseen tensor is a constant, unless it shares memory with one that was seen."""
        value = self._values.get(id(tensor))
        if value is not None:
            return value
        if not (aliases := self._storages.get(memory_of(tensor))):
            return PLAIN
        for alias in aliases:  # the same tensor as another object, such as `parameter.data`
            if alias.shape == tensor.shape and alias.stride() == tensor.stride():
                return self._values[id(alias)]
        self.records.escape_all([self._values[id(alias)] for alias in aliases], unknown("an untraced view of it"))
        return PLAIN

    def note_guess(self) -> None:
        """Note that the model's code was given a guess in the place of a value."""
        self.guessed = True
        self.guess_matters |= bool(self.records.gains)

    def _set(self, tensor: Tensor, value: Value) -> None:
        if id(tensor) not in self._values:
            self._storages[memory_of(tensor)].append(tensor)
        self._values[id(tensor)] = value

    def _read(self, owner: str, attribute: str) -> None:
        if self.records.running[-1:] != [owner]:
            self.records.read_outside.add(f"{owner}.{attribute}")

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.records.running.append(name)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                for gain in self.value_of(leaf).gains:
                    self.records.gains[gain].received_by.add(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.records.running.pop()


def _tensors_in(outputs: Any, depth: int = 4) -> list[Tensor]:
    """Every tensor in a forward's result, inside objects as well."""
    found: list[Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += _tensors_in(list(vars(leaf).values()), depth - 1)
    return found
