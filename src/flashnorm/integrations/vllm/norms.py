"""The norms of a model of vLLM, built without weight."""

import functools
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat import vllm
from flashnorm.errors import InputError
from flashnorm.integrations.vllm.rules import fused_with_weight, on_other_stage, parameter_of


def make_weightless(
    model: nn.Module, norms: Iterable[str], vllm_config: Any, model_config: Any, stored: Collection[str]
) -> dict[str, float]:
    """Take the named norms' weights out of a model of vLLM, in place.

    Args:
        model: vLLM's.
        norms: the checkpoint's names of the weights.
        vllm_config, model_config: what it was built from.
        stored: the tensors that the checkpoint's files hold. A norm among them whose class cannot be built without
            weight is left as it is, since it is loaded as ever.

    Returns:
        Checkpoint tensor -> its identity value, of what has no place in the model any more.

    Raises:
        InputError: a norm is not there, or of a class that cannot be built without weight.
    """
    parameters = dict(model.named_parameters())
    rename, elsewhere = vllm.renaming(model), vllm.on_other_stages(model)
    # A head that drafts for its own model has that one's config.
    target = vllm_config.model_config
    drafts_for_itself = model_config is not target and model_config.model == target.model
    constant = fused_with_weight(
        vllm_config.compilation_config.pass_config,
        compiled=vllm.is_compiled(vllm_config),
        quantized=model_config.quantization is not None,
    )
    taken = {}
    for tensor in norms:
        renamed = rename(tensor)
        name = None if renamed is None else parameter_of(renamed, parameters)
        if name is not None:
            identity = _take_weight(model, name, constant, model_config.dtype)
            if identity is not None:
                taken[tensor] = identity
                continue
            found = f"it in a {type(model.get_submodule(name.rpartition('.')[0])).__name__}"
        elif drafts_for_itself or on_other_stage(renamed or tensor, elsewhere):
            continue
        else:
            found = "none of this name"
        if tensor not in stored:
            raise InputError(
                f"{model_config.model}: expected the norm {tensor} in vLLM's {type(model).__name__}, found {found}, "
                "which cannot be built without weight; convert the source again with --keep-norms"
            )
    return taken


def _take_weight(model: nn.Module, name: str, constant: bool, dtype: torch.dtype) -> float | None:
    """Take a parameter out of a norm.

    Its value stays as a constant under the same name where code may read it there: vLLM's fused operators do. It is a
    buffer, so that it outlives vLLM's sleep, but is no part of the state dict.

    Args:
        model: vLLM's.
        name: the parameter.
        constant: let the norm pass the constant to its operator.
        dtype: the model's.

    Returns:
        The value at which it has no effect; None if the norm's class is not known, and nothing was done.
    """
    owner_name, _, attribute = name.rpartition(".")
    norm: Any = model.get_submodule(owner_name)
    identity = vllm.NORMS.get(f"{type(norm).__module__}.{type(norm).__qualname__}")
    if identity is None:
        return None
    identity = 0.0 if attribute == "bias" else identity
    weight = norm.get_parameter(attribute)
    delattr(norm, attribute)
    # LayerNorm's operator wants weight and bias of the input's dtype, and its classes look at the weight's for that.
    if type(norm).__name__ == "LayerNorm" and hasattr(norm, "bias") and weight.dtype == dtype:
        norm.register_parameter(attribute, None)
    else:
        value = torch.full_like(weight, identity, requires_grad=False)
        vllm.nothing_to_reload(value)
        norm.register_buffer(attribute, value, persistent=False)
    if vllm.is_rms_norm(norm) and not constant:
        vllm.pass_no_weight(norm)
    if vllm.is_gemma_norm(norm) and not constant:
        vllm.change_class(norm, _weightless_gemma(type(norm)))
    vllm.note_for_reloading(norm)
    return identity


@functools.cache
def _weightless_gemma(base: Any) -> Any:
    """A class of Gemma's norms whose operator is given no weight: `x / rms` instead of `x / rms * (1 + 0)`."""
    rms_norm, fused_add_rms_norm = vllm.weightless_operators()

    class WeightlessGemmaRMSNorm(base):
        def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            """`[tokens, hidden size]` to the same; with a residual, that is added first, and returned as well."""
            if residual is None:
                return rms_norm(x, None, self.variance_epsilon)
            return fused_add_rms_norm(x, residual, None, self.variance_epsilon)

    return WeightlessGemmaRMSNorm
