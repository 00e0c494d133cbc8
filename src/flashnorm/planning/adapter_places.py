"""Where the parts of an adapter belong in a planned model: which parameter, which gain on which axis."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flashnorm.compat.transformers import prefix_of_base
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import BiasFold, ShiftUse, TensorFold, by_parameter
from flashnorm.trace.solve import names_by_parameter
from flashnorm.trace.values import View


@dataclass(frozen=True)
class Place:
    """A parameter of the model, or a stored tensor of the source, that a part of an adapter belongs to.

    Attributes:
        name: its name.
        shape: its shape.
        fold: the gains that it takes, named by tensors of the source; None if it takes none.
        shifts: the norm biases that the layer's bias takes and that are not zero, named by tensors of the source.
        sums: for a layer's bias that takes norm biases, which ones and through which weight, a place of this model.
        leaves: whether it is a norm's parameter that the folded model lacks, or holds at another value.
        module: the module that holds it, on the meta device; None for a stored tensor that is no parameter.
    """

    name: str
    shape: tuple[int, ...]
    fold: TensorFold | None = None
    shifts: tuple[ShiftUse, ...] = ()
    sums: BiasFold | None = None
    leaves: bool = False
    module: Any = None


class Places:
    """The places in a planned model, by the names that adapters use: those of its modules, or of its stored tensors."""

    def __init__(self, planned: PlannedCheckpoint):
        self.planned = planned
        self._folds = by_parameter(planned.plan)
        self._own = {alias: name for name, all_ in names_by_parameter(planned.model).items() for alias in all_}
        self._prefix = prefix_of_base(planned.model)
        self._shapes = planned.stored.shapes()
        self._zero: dict[str, bool] = {}

    def find(self, parameter: str) -> Place | None:
        """The place of a parameter; None if the model has none of this name.

        Adapters of a model without its output head name modules without the base model's prefix.
        """
        for name in (parameter, self._prefix + parameter, parameter.removeprefix(self._prefix)):
            if name in self._own:
                return self._parameter(self._own[name])
        for name in (parameter, self._prefix + parameter, parameter.removeprefix(self._prefix)):
            if name in self._shapes:
                return self._tensor(name)
        return None

    def module(self, path: str) -> nn.Module | None:
        """The module of this name; None if the model has none."""
        for name in (path, self._prefix + path, path.removeprefix(self._prefix)):
            try:
                return self.planned.model.get_submodule(name)
            except AttributeError:
                continue
        return None

    def stored(self, name: str) -> tuple[str, str] | None:
        """The tensor that holds a place's parameter in its own layout, in the source and in the folded model.

        The two names differ where the folded model has untied a head. None if there is no such tensor.
        """
        stored, untied = self.planned.stored, self.planned.tensors.untied
        if name not in self._own:
            return (name, name) if stored.has(name) else None
        whole = View.of(name, self.planned.model.get_parameter(name)).coordinates
        for tensor, view in stored.views(name).items():
            alone = len(stored.parts(tensor)) == 1 and view.stored_shape == view.shape
            if alone and all(torch.equal(one, other) for one, other in zip(view.coordinates, whole, strict=True)):
                original = untied.get(tensor, tensor)
                return (original, tensor) if stored.has(original) else None
        return None

    def _parameter(self, name: str) -> Place:
        model, folds = self.planned.model, self._folds
        fold = folds.folds.get(name)
        bias = folds.biases.get(name)
        shifts = [shift for other in folds.biases.values() if other.weight == name for shift in other.shifts]
        return Place(
            name,
            tuple(model.get_parameter(name).shape),
            fold and replace(fold, gains=tuple(replace(use, norm=self._whole(use.norm)) for use in fold.gains)),
            self._in_source(shifts),
            bias and replace(bias, shifts=self._in_source(bias.shifts)),
            name in folds.norms or name in folds.divided,
            model.get_submodule(name.rpartition(".")[0]),
        )

    def _tensor(self, name: str) -> Place:
        tensors = self.planned.tensors
        bias = tensors.biases.get(name)
        shifts = [shift for other in tensors.biases.values() if other.weight == name for shift in other.shifts]
        return Place(
            name,
            self._shapes[name],
            tensors.folds.get(name),
            self._without_zeros(shifts),
            bias and replace(bias, shifts=self._without_zeros(bias.shifts)),
            name in tensors.norms or name in tensors.divided,
        )

    def _whole(self, parameter: str) -> str:
        return self.planned.stored.copies(parameter)[0]

    def _in_source(self, shifts: Iterable[ShiftUse]) -> tuple[ShiftUse, ...]:
        return self._without_zeros([replace(shift, bias=self._whole(shift.bias)) for shift in shifts])

    def _without_zeros(self, shifts: Sequence[ShiftUse]) -> tuple[ShiftUse, ...]:
        for shift in shifts:
            if shift.bias not in self._zero:
                self._zero[shift.bias] = not self.planned.checkpoint.read_tensor(shift.bias).any()
        return tuple(shift for shift in shifts if not self._zero[shift.bias])
