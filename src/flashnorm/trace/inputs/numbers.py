"""Numbers for meta tensors: what a model's code computes with numbers is evaluated while the model is traced.

A model's code computes sizes and positions (in a grid of patches, say) and branches on numbers. Meta tensors have no
numbers, so `MixedDevices` keeps numbers beside them. The numbers of a tensor are

* *certain*: they come from numbers on the CPU alone (the inputs' grids, masks and lengths, constants of the code);
* *guessed*: they depend on a comparison of unknown numbers, which is taken to be true or false everywhere;
* unknown: they depend on token ids, parameters or buffers in any other way.

Why a plan from such a trace is right:

1. The tracer does not see what is computed from certain numbers. Parameters and activations never have certain numbers,
   and neither has anything that is computed from them. So a hidden tensor carries no gain and no parameter's elements.
2. Guessed numbers stand beside a tensor whose computation the tracer has seen. They replace the tensor only where the
   code copies it off the meta device. Then `asked` is called, as it is where the tracer itself answers
   (`rules/questions.py`), and the trace is repeated with other guesses. A norm folds only if no run stops its gain.
3. A comparison of an activation that carries a gain stops that gain (it is not linear). So the code takes the same
   branches with and without the folds of other gains.
4. When memory is overwritten with unknown numbers, the numbers of every tensor that shares the memory are forgotten.

It is not proven that the guesses together reach every branch of the code, as a run has one answer for all comparisons.
So a norm is kept if a module that received its activation has parameters that no run has read (`solve.py`).

The cases that shaped this design, each with a test in `tests/trace/inputs/test_numbers.py`:

* An alias of a tensor that was overwritten still had the old numbers (4).
* A guess written into a tensor of certain numbers left it certain (4).
* A CPU tensor cannot forget its numbers, as code can read them without an operator: a write of unknown numbers into it
  is refused.
* With all comparisons true, a norm was folded although the model returns its output if they are false (2).
* A guessed mask does not tell how many elements an indexing operator selects: the tracer's answer does (2).
* A guess can be wrong: an index made from it is out of bounds for a tensor of known size. The result has no numbers.
* A function that refers to the original of a copied model reads the original's parameters. Their numbers were certain,
  so the use of a norm's weight was hidden (1). Now the copy's parameters stand in for them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashnorm.compat.torch import (
    TorchDispatchMode,
    TorchFunctionMode,
    flat,
    map_flat,
    memory_of,
    without_modes,
    written,
)

aten = torch.ops.aten

_META = torch.device("meta")
_COMPARISONS = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)


@dataclass(frozen=True)
class _Numbers:
    """The values of a tensor; if not certain, the values that it has if all comparisons turn out as guessed."""

    values: Tensor
    certain: bool = True


class ListsOfItems(TorchFunctionMode):
    """Lets code call `tolist` on meta tensors without numbers: it is `item` for each element, which the tracer answers.

    `tolist` itself reads memory, which such tensors do not have.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            if func is torch.Tensor.tolist and args[0].is_meta:
                return _items(args[0])
            raise


def _items(tensor: Tensor) -> Any:
    return [_items(row) for row in tensor.unbind()] if tensor.dim() else tensor.item()


class MixedDevices(TorchDispatchMode):
    """Lets code compute with CPU tensors, and with CPU and meta tensors together, on the meta device.

    Outer modes (the tracer) do not see what is computed from certain numbers, as the results are constants.

    Args:
        comparisons: the result of every comparison of unknown numbers.
        asked: called when the code receives numbers that depend on such a guess, as it may branch on them.
        stand_ins: a tensor that the code may reach -> the meta tensor that takes its place.
    """

    def __init__(self, comparisons: bool, asked: Callable[[], None], stand_ins: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._comparisons, self._asked, self._stand_ins = comparisons, asked, stand_ins
        self._known: dict[int, tuple[Tensor, _Numbers]] = {}  # by id; the held tensor keeps its id from being reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = map_flat(self._stand_in, (args, kwargs or {}))
        tensors = [leaf for leaf in flat((args, kwargs)) if isinstance(leaf, Tensor)]
        numbers = [self._numbers(tensor) for tensor in tensors]
        known = bool(tensors) and None not in numbers
        if known and all(each.certain for each in numbers if each):
            return self._evaluated(func, args, kwargs)
        if known and _leaves_meta(func, kwargs):
            self._asked()
            return self._evaluated(func, args, kwargs)
        if not known and _leaves_meta(func, kwargs):  # there are no numbers to take along: it stays
            kwargs = kwargs | {"device": _META}
        known &= not self._forget_written(func, args, known)
        result = func(*self._on_meta(func, args), **map_flat(_to_meta, kwargs))
        self._guess(func, args, kwargs, result, known)
        return result

    def _stand_in(self, leaf: Any) -> Any:
        return self._stand_ins.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf

    def _numbers(self, tensor: Tensor) -> _Numbers | None:
        if not tensor.is_meta:
            return _Numbers(tensor)
        return self._known[id(tensor)][1] if id(tensor) in self._known else None

    # --- operators on known numbers

    def _evaluated(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator on known numbers: on the meta device, with its numbers, if it belongs there."""
        result = self._compute(func, args, kwargs)
        if targets := written(func, args):
            return targets[0]
        device = kwargs.get("device", _META)
        from_meta = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in flat((args, kwargs)))
        return map_flat(self._to_known, result) if device == _META and (from_meta or "device" in kwargs) else result

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        def values(leaf: Any) -> Any:
            numbers = self._numbers(leaf) if isinstance(leaf, Tensor) else None
            return numbers.values if numbers else leaf

        args, kwargs = map_flat(values, (args, kwargs))
        kwargs = {name: "cpu" if name == "device" and value == _META else value for name, value in kwargs.items()}
        with without_modes():
            return func(*args, **kwargs)

    def _to_known(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = leaf.to(_META)
        self._known[id(tensor)] = tensor, _Numbers(leaf)
        return tensor

    # --- operators on the meta device

    def _forget_written(self, func: Any, args: Any, known: bool) -> bool:
        """Forget the numbers of what an operator writes into, unless guesses become other guesses; whether it forgot.

        Args:
            known: whether all operands have numbers, though not certain ones.
        """
        forgotten = False
        for tensor in written(func, args):
            if not tensor.is_meta:
                raise NotImplementedError(f"{func} writes a tensor without values into one with values")
            if not known or forgotten or self._known[id(tensor)][1].certain:
                self._forget(tensor)
                forgotten = True
        return forgotten

    def _forget(self, tensor: Tensor) -> None:
        """Forget the numbers of a tensor, and of all that share its memory: they are about to be overwritten."""
        if numbers := self._numbers(tensor):
            memory = memory_of(numbers.values)
            for key, (_, other) in list(self._known.items()):
                if memory_of(other.values) == memory:
                    del self._known[key]

    def _on_meta(self, func: Any, args: Any) -> Any:
        if func.overloadpacket is aten.index:
            args = (args[0], [at for index in args[1] for at in self._positions(index)], *args[2:])
        return map_flat(_to_meta, args)

    def _positions(self, index: Tensor | None) -> Sequence[Tensor | None]:
        """A mask as index tensors, one for each of its dimensions; an index tensor as it is."""
        if index is None or index.dtype != torch.bool:
            return [index]
        numbers = self._numbers(index)
        if numbers is None or not numbers.certain:
            return index.nonzero().unbind(1)
        with without_modes():
            return numbers.values.nonzero().unbind(1)

    def _guess(self, func: Any, args: Any, kwargs: Any, result: Any, computable: bool) -> None:
        """Keep the guessed numbers of a result: of a comparison, or of an operator whose operands all have numbers."""
        if func.overloadpacket in _COMPARISONS:
            guessed = torch.full(result.shape, self._comparisons, dtype=torch.bool, device="cpu")
            self._known[id(result)] = result, _Numbers(guessed, False)
        elif computable:
            try:
                guessed = self._compute(func, args, kwargs)
            except Exception:  # the guess was wrong: an index made from it is out of bounds
                return
            for tensor, values in zip(flat(result), flat(guessed), strict=True):
                if isinstance(tensor, Tensor) and tensor.shape == values.shape:
                    self._known[id(tensor)] = tensor, _Numbers(values, False)


def _leaves_meta(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator copies a tensor to another device than meta, so that the code can read its values."""
    return func.overloadpacket is aten._to_copy and torch.device(kwargs.get("device") or _META) != _META


def _to_meta(leaf: Any) -> Any:
    return leaf.to(_META) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf
