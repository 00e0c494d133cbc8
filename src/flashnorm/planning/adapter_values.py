"""The new values of an adapter's tensors, given its plan.

A factor that takes a gain is the exact product, rounded once to its dtype. Sums and ratios are computed in float64 or
exactly, and rounded once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flashnorm.arithmetic import Gain, add_products, axis_shift, fold_weight, overflowed
from flashnorm.errors import InputError
from flashnorm.files.adapter import ADAPTER_WEIGHTS
from flashnorm.files.header import TORCH_DTYPES
from flashnorm.files.reader import Checkpoint
from flashnorm.planning.adapter import AdapterPlan, Constant, Magnitude, SavedBias
from flashnorm.planning.tensors import TensorFold

_BLOCK_BYTES = 1 << 23


class AdapterValues:
    """The values of the tensors that an adapter has for the folded model.

    Args:
        adapter: the adapter of the source.
        source: the source.
        plan: what becomes of the adapter's tensors.
        dtypes: tensor, new ones among them -> the dtype that it will have, as safetensors names it.
    """

    def __init__(self, adapter: Checkpoint, source: Checkpoint, plan: AdapterPlan, dtypes: Mapping[str, str]) -> None:
        self._adapter, self._source, self._plan, self._dtypes = adapter, source, plan, dtypes
        self._norms: dict[str, Tensor] = {}

    def value(self, name: str) -> Tensor:
        """The new value of a tensor.

        Raises:
            InputError: products do not fit the dtype, or something cannot be read.
        """
        if (fold := self._plan.folds.get(name)) is not None:
            return self._product(name, fold)
        if (constant := self._plan.constants.get(name)) is not None:
            return self._constant(name, constant)
        if (saved := self._plan.biases.get(name)) is not None:
            return self._bias(name, saved)
        if (magnitude := self._plan.magnitudes.get(name)) is not None:
            return self._magnitude(name, magnitude)
        return self._old(name)

    def _old(self, name: str) -> Tensor:
        """A tensor of the source's adapter, widened if that was asked for."""
        return self._adapter.read_tensor(name).to(TORCH_DTYPES[self._dtypes[name]])

    def _product(self, name: str, fold: TensorFold) -> Tensor:
        old = self._old(name)
        gain = self._gain(old.shape[fold.axis], fold)
        folded = fold_weight(old, gain, fold.axis)
        if (bad := overflowed(old, folded, gain, fold.axis)).any():
            channel = int(bad.nonzero()[0])
            raise InputError(
                f"{self._adapter.folder / ADAPTER_WEIGHTS}: expected products that fit {self._dtypes[name]}, found "
                f"{bad[channel].item():g} times a gain of {gain.high[channel].item():g} in {name}; choose a wider "
                "dtype with --dtype float32"
            )
        return folded

    def _constant(self, name: str, constant: Constant) -> Tensor:
        """`B A beta`, computed in float64 and rounded once, added to the bias that `B` has already."""
        a, b = self._old(constant.a).double(), self._old(constant.b).double()
        total = torch.zeros(len(b), dtype=torch.float64)
        for shift in constant.shifts:
            total += b @ (a @ axis_shift(a.shape[1], self._norm(shift.bias).double(), shift.segments))
        dtype = TORCH_DTYPES[self._dtypes[name]]
        if constant.before is None:
            return total.to(dtype)
        return (self._old(constant.before).double() + total).to(dtype)

    def _bias(self, name: str, saved: SavedBias) -> Tensor:
        holder = self._adapter if saved.in_adapter else self._source
        inputs = holder.tensors[saved.weight].shape[saved.axis]
        betas = [axis_shift(inputs, self._norm(shift.bias), shift.segments) for shift in saved.shifts]
        return add_products(self._old(name), holder.read_outputs(saved.weight, saved.axis, _BLOCK_BYTES), betas)

    def _magnitude(self, name: str, magnitude: Magnitude) -> Tensor:
        """`m * norm(W* + s B A*) / norm(W + s B A)` for each output, in float64, with the rounded `W*` and `A*`."""
        a, b = self._old(magnitude.a), self._old(magnitude.b).double()
        new_a = self._product(magnitude.a, self._plan.folds[magnitude.a])
        axis = magnitude.fold.axis
        gain = self._gain(self._source.tensors[magnitude.weight].shape[axis], magnitude.fold)
        ratios, first = [], 0
        for block in self._source.read_outputs(magnitude.weight, axis, _BLOCK_BYTES):
            rows = magnitude.scale * b[first : first + len(block)]
            before = (block.double() + rows @ a.double()).norm(dim=1)
            after = (fold_weight(block.contiguous(), gain, 1).double() + rows @ new_a.double()).norm(dim=1)
            ratios.append(torch.where(before > 0, after / before, 1.0))
            first += len(block)
        old = self._old(name)
        return (old.double() * torch.cat(ratios).view_as(old)).to(old.dtype)

    def _gain(self, length: int, fold: TensorFold) -> Gain:
        return fold.gain(length, {use.norm: self._norm(use.norm) for use in fold.gains})

    def _norm(self, name: str) -> Tensor:
        if name not in self._norms:
            self._norms[name] = self._source.read_tensor(name).flatten()
        return self._norms[name]
