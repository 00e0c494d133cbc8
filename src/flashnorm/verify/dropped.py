"""What it changes to drop `eps` where divisions are cancelled, measured on the activations of a text."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashnorm.models.cancelled import EndingNorm
from flashnorm.models.load import Loading
from flashnorm.plan import Form
from flashnorm.verify.runs import Runner, converted_loader, outputs_of


def dropped_eps(run: Runner, loading: Loading, tokens: Tensor) -> float | None:
    """The largest relative change of what a norm gives if its `eps` stays, instead of `eps * r^power`, in float64.

    A norm gives `q / sqrt(mean(q^2) + eps * r^power)`. With `eps` in its place, all channels of a token change by the
    same factor. The norms are those behind cancelled ones, and the model is the exact one.

    Args:
        run: runs models.
        loading: the converted checkpoint.
        tokens: the text, `[tokens]`.

    Returns:
        The change, relative to the exact output; None if no `eps` was dropped.
    """
    if loading.cancelled.form is not Form.DROP:
        return None
    exact = replace(loading, cancelled=replace(loading.cancelled, form=Form.EXACT))
    return run.use(converted_loader(exact), torch.float64, lambda model: _largest_change(model, tokens), exact=True)


def _largest_change(model: PreTrainedModel, tokens: Tensor) -> float:
    largest = 0.0

    def measure(norm: EndingNorm, args: tuple[Any, ...]) -> None:
        nonlocal largest
        square = args[0].double().pow(2).mean(-1, keepdim=True)
        change = ((square + norm.eps_of(args[0].double())) / (square + norm.eps)).sqrt() - 1
        largest = max(largest, float(change.abs().max()))

    for module in model.modules():
        if isinstance(module, EndingNorm):
            module.register_forward_pre_hook(measure)
    outputs_of(model, tokens)
    return largest
