"""Norms that are kept because a linear layer that reads them is stored quantised.

* Each tensor decides, not the config's word: the output head, or the attention beside quantised experts, is often
  stored as plain floats, and takes its gain.
* A norm whose gain has gone already (the checkpoint was converted, then quantised) has nothing left to fold, and stays
  in the plan.
"""

from collections.abc import Iterator, Mapping

from flashnorm.errors import InputError
from flashnorm.files.reader import CONFIG_FILE, Checkpoint
from flashnorm.format import listed_norms
from flashnorm.plan import Fold, FoldPlan, Kept, Kind
from flashnorm.planning.checks import is_plain, quantizations
from flashnorm.planning.names import StoredNames


def quantised_tensors(checkpoint: Checkpoint, names: StoredNames) -> dict[str, str]:
    """The tensors of the model that the checkpoint stores quantised -> how, in words.

    A tensor is stored quantised if it is absent but for pieces of other names, or if it is a matrix of another dtype
    than plain floats. Where the config declares a quantisation, so is a matrix of plain floats that has pieces (scales)
    beside it.
    """
    declared = any(quantizations(checkpoint.config))
    found: dict[str, str] = {}
    for name in names.shapes():
        info, pieces = checkpoint.tensors.get(name), names.pieces(name)
        if info is None:
            if numbers := names.numbers(name):
                kind = checkpoint.tensors[numbers[0]].dtype
                found[name] = f"{name} is stored quantised, as {numbers[0]} ({kind})"
        elif len(info.shape) > 1 and not is_plain(info.dtype):
            found[name] = f"{name} is stored quantised, as {info.dtype}"
        elif declared and pieces:
            found[name] = f"{name} is stored quantised, with {pieces[0]}"
    return found


def keep_quantised(
    plan: FoldPlan,
    names: StoredNames,
    checkpoint: Checkpoint,
    quantised: Mapping[str, str],
    tied: Mapping[str, str],
) -> FoldPlan:
    """The plan without the folds into tensors that are stored quantised.

    Args:
        plan: the plan, made without the checkpoint's tensors.
        names: how the checkpoint stores the model.
        checkpoint: the files.
        quantised: what `quantised_tensors` found.
        tied: what is to be untied, see `tensor_plan`.

    Raises:
        InputError: the tensor that an output head is to be untied from is stored quantised, or the config's list of
            weightless norms cannot be read.
    """
    if not quantised:
        return plan
    for stored in tied.values():
        for why in (quantised[name] for name in names.views(stored) if name in quantised):
            raise InputError(f"expected plain floats to make an output head of, found that {why}; leave out --untie")
    listed = listed_norms(checkpoint.config, checkpoint.folder / CONFIG_FILE) or ()
    reasons: dict[str, Kept] = {}
    for fold in plan.folds:
        gone = any(name in listed or not names.has(name) for name in names.views(fold.norm))
        why = next((quantised[tensor] for tensor in _takers(fold, names) if tensor in quantised), None)
        if why is not None and not gone:
            reasons[fold.norm] = Kept(why, kind=Kind.QUANTISED)
    return plan.keep(reasons)


def _takers(fold: Fold, names: StoredNames) -> Iterator[str]:
    """The tensors that change if a norm folds: the linear layers' weights, and their biases that take the norm's."""
    for linear in fold.linears:
        yield from names.views(linear.name)
        if fold.bias_removed and linear.bias is not None:
            yield from names.views(linear.bias)
