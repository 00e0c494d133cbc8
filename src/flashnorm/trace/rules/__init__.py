"""How a gain travels through each operator: one table. At an operator that is not in the table, every gain escapes.

The rules are in the modules of this package, by kind of operator; each is a function of a `Call`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashnorm.compat.torch import flat, is_mutable
from flashnorm.trace.rules import contraction, elementwise, joining, movement, nonlinear, norms, reductions
from flashnorm.trace.rules.call import Call, Rule, UnknownError
from flashnorm.trace.rules.questions import ANSWERS, GUESSES, Guess, fitting_sizes
from flashnorm.trace.rules.reasons import UNKNOWN_OPERATOR
from flashnorm.trace.values import LOST, PLAIN, Value

__all__ = ["ANSWERS", "GUESSES", "RULES", "Call", "Guess", "fitting_sizes", "propagate"]

aten = torch.ops.aten

_moves = partial(Rule, keeps_shifts=True, keeps_parts=True)

# Rule -> the ATen operators that it is for.
_TABLE: dict[Rule, str] = {
    # Elements are moved.
    _moves(movement.same): "clone alias detach _to_copy lift_fresh",
    Rule(movement.same): "neg",
    _moves(movement.view): "view _unsafe_view reshape",
    _moves(movement.move): (
        "expand permute transpose t squeeze unsqueeze slice select split split_with_sizes unbind chunk narrow unfold "
        "diagonal movedim"
    ),
    _moves(movement.move_written): "repeat flip roll",
    Rule(joining.join, keeps_parts=True): "cat stack",
    Rule(movement.pad): "constant_pad_nd",
    Rule(movement.patches): "im2col",
    Rule(movement.index): "index",
    Rule(movement.index_select): "index_select",
    Rule(movement.gather): "gather",
    Rule(movement.embedding): "embedding",
    # Elements are scaled, added up, or averaged.
    Rule(elementwise.multiply): "mul",
    Rule(elementwise.divide): "div",
    Rule(elementwise.add, keeps_shifts=True): "add",
    Rule(elementwise.add): "sub",
    Rule(elementwise.masked_fill): "masked_fill",
    Rule(reductions.reduce): "sum mean",
    Rule(reductions.cumulate): "cumsum",
    Rule(partial(reductions.resample, count=1)): "avg_pool1d upsample_nearest1d upsample_linear1d",
    Rule(partial(reductions.resample, count=2)): (
        "avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
    ),
    Rule(partial(reductions.resample, count=3)): "avg_pool3d",
    # Activations meet a weight.
    Rule(norms.layer_norm, keeps_shifts=True): "native_layer_norm",
    Rule(norms.rms_norm): "_fused_rms_norm",
    Rule(contraction.matmul): "mm bmm",
    Rule(contraction.add_matmul): "addmm baddbmm",
    Rule(contraction.convolution): "convolution",
    # No gain passes.
    Rule(nonlinear.statistic): "rsqrt sqrt linalg_vector_norm norm",
    Rule(nonlinear.power): "pow",
    Rule(nonlinear.tanh): "tanh",
    Rule(nonlinear.stop): (
        "silu gelu sigmoid exp exp2 log log1p softplus elu celu selu mish hardswish hardsigmoid log_sigmoid_forward "
        "_softmax _log_softmax _safe_softmax square reciprocal cos sin erf clamp clamp_min clamp_max maximum minimum "
        "amax amin max min argmax argmin topk sort argsort floor ceil round var var_mean std eq ne lt le gt ge isnan "
        "isinf"
    ),
    Rule(nonlinear.independent): "ones_like full_like empty_like rand_like randn_like new_ones new_full new_empty",
    Rule(nonlinear.zeros): "zeros zeros_like new_zeros",
}

# ATen operator -> its rule, for the operators that the installed PyTorch has.
RULES: dict[Any, Rule] = {
    getattr(aten, name): rule for rule, names in _TABLE.items() for name in names.split() if hasattr(aten, name)
}


def propagate(call: Call, rules: Mapping[Any, Rule] = RULES) -> list[Value]:
    """What is known of each result of an operator. Records uses and escapes on the way; `rules` is the table to use."""
    operands = [call.value(leaf) for leaf in flat((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    count = sum(isinstance(leaf, Tensor) for leaf in flat(call.out))
    packet = call.func.overloadpacket
    rule = rules.get(_out_of_place(call.func))
    if rule is not None:
        try:
            # A tensor that is written in place loses its parts.
            values = rule.apply(replace(call, keeps_parts=rule.keeps_parts and packet in rules))
        except UnknownError:
            pass
        else:
            values = [values] if isinstance(values, Value) else list(values)
            if not rule.keeps_shifts:
                values = [replace(value, shifts={}) for value in values]
            return values + [PLAIN] * (count - len(values))
    call.records.escape_all(operands, UNKNOWN_OPERATOR, call.operator)
    return [LOST if any(value.tracked or value.unknown for value in operands) else PLAIN] * count


def _out_of_place(operator: Any) -> Any:
    """For an operator that writes in place, the one that returns a new tensor (`add` for `add_`); else the operator."""
    packet = operator.overloadpacket
    name = packet.__name__
    return getattr(aten, name.rstrip("_"), packet) if is_mutable(operator) and name.endswith("_") else packet
