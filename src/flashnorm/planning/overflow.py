"""Products that are too large for their dtype: which norms must be kept because of them, and why.

* A conversion finds such products as it folds the weights: it does not read the weights ahead to look for them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashnorm.arithmetic import exceeds_one, gain_of
from flashnorm.files.reader import Checkpoint
from flashnorm.plan import Kept, Kind
from flashnorm.planning.tensors import GainUse, TensorPlan


class Overflows:
    """Collects weights that became infinite while tensors were folded: at most one for each channel."""

    def __init__(self, checkpoint: Checkpoint, tensors: TensorPlan) -> None:
        self._checkpoint = checkpoint
        self._tensors = tensors
        self._weights: dict[str, Tensor] = {}

    def add(self, tensor: str, channels: slice, weights: Tensor) -> None:
        """Take what `overflowed` found in some channels of a tensor."""
        if tensor not in self._weights:
            shape = self._checkpoint.tensors[self._tensors.untied.get(tensor, tensor)].shape
            self._weights[tensor] = torch.zeros(shape[self._tensors.folds[tensor].axis], dtype=weights.dtype)
        known = self._weights[tensor][channels]
        known.copy_(torch.where(known == 0, weights, known))

    def reasons(self, norms: Mapping[str, Tensor]) -> dict[str, Kept]:
        """Norm tensor -> why the norm must be kept. `norms` holds the stored weight of each norm, `[n]`."""
        reasons: dict[str, Kept] = {}
        for tensor, weights in self._weights.items():
            reasons = too_large(tensor, self._tensors.folds[tensor].gains, norms, weights) | reasons
        return reasons


def too_large(name: str, uses: Sequence[GainUse], norms: Mapping[str, Tensor], weights: Tensor) -> dict[str, Kept]:
    """Which norms must be kept because their products with a linear layer's weight do not fit its dtype, and why.

    If several gains multiply a channel, the norms whose gains enlarge its weights are kept: without these gains, no
    product is larger than its weight.

    Args:
        name: the linear layer's weight.
        uses: the gains that it takes.
        norms: the stored weight of each norm, `[n]`.
        weights: for each channel, a weight that becomes infinite, else 0, as `overflowed` gives them.
    """
    reasons: dict[str, Kept] = {}
    for use in uses:
        gain = gain_of(norms[use.norm].flatten(), use.offset)
        larger = exceeds_one(gain)
        for axis_start, gain_start, count in use.segments or ((0, 0, len(weights)),):
            bad = (weights[axis_start:][:count] != 0) & larger[gain_start:][:count]
            if bad.any():
                at = int(bad.nonzero()[0])
                value, weight = gain.high[gain_start + at].item(), weights[axis_start + at].item()
                reason = too_large_reason(value, axis_start + at, weight, name, weights.dtype)
                reasons.setdefault(use.norm, Kept(reason, kind=Kind.VALUES))
    return reasons


def too_large_reason(gain: float, channel: int, weight: float, name: str, dtype: torch.dtype) -> str:
    """Why a norm must be kept: a weight in an input channel of `name`, times the norm's gain, is too large."""
    named = str(dtype).removeprefix("torch.")
    return f"its gain of {gain:g} times a weight of {weight:g} in channel {channel} of {name} is too large for {named}"
