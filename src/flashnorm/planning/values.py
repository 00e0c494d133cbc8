"""Folds that the values of a model rule out: a bias cannot be divided by its gain, or a product is too large.

`fold_` has all values at hand; a conversion finds products that are too large only as it folds (`convert/`).
"""

from collections.abc import Callable

from torch import Tensor

from flashnorm.arithmetic import (
    PRECISION,
    exceeds_one,
    fold_weight,
    gain_of,
    is_divisible,
    largest_weights,
    overflowed,
)
from flashnorm.plan import FoldPlan, Kept, Kind
from flashnorm.planning.overflow import too_large
from flashnorm.planning.tensors import by_parameter


def keep_indivisible(plan: FoldPlan, value_of: Callable[[str], Tensor | None]) -> FoldPlan:
    """The plan without the folds whose norm bias would stay as `beta / g` but cannot be divided.

    Args:
        plan: the plan, made without values.
        value_of: the values of a norm's parameter; None if it is absent (then there is nothing to divide).

    Raises:
        InputError: a norm has a dtype that cannot be computed with.
    """
    reasons: dict[str, Kept] = {}
    for fold in plan.folds:
        if fold.bias is None or fold.bias_removed:
            continue
        weight, bias = value_of(fold.norm), value_of(fold.bias)
        if weight is None or bias is None or not {weight.dtype, bias.dtype} <= PRECISION.keys():
            continue
        possible = is_divisible(bias.flatten(), gain_of(weight.flatten(), fold.offset))
        if not possible.all():
            at = int((~possible).nonzero()[0])
            gain, beta = fold.offset + weight.flatten()[at].item(), bias.flatten()[at].item()
            reasons[fold.norm] = Kept(
                f"its bias has no linear's bias to go to, and cannot be divided by its gain: {beta:g} / {gain:g} in "
                f"channel {at}",
                kind=Kind.VALUES,
            )
    return plan.keep(reasons)


def keep_too_large(plan: FoldPlan, value_of: Callable[[str], Tensor]) -> FoldPlan:
    """The plan without the folds that would make finite weights infinite.

    Args:
        plan: the plan, made without values.
        value_of: the values of a parameter, on the CPU.
    """
    reasons: dict[str, Kept] = {}
    for name, fold in by_parameter(plan).folds.items():
        weight = value_of(name)
        norms = {use.norm: value_of(use.norm) for use in fold.gains}
        try:
            gain = fold.gain(weight.shape[fold.axis], norms)
        except ValueError:
            continue  # the fold itself will refuse this weight and say why
        if exceeds_one(gain).any():
            row = largest_weights(weight, fold.axis)[None]
            infinite = overflowed(row, fold_weight(row, gain, 1), gain, 1)
            reasons = too_large(name, fold.gains, norms, infinite) | reasons
    # A weight that takes several gains can, without one of them, become too large with another.
    return keep_too_large(plan.keep(reasons), value_of) if reasons else plan
