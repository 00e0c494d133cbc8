"""Takes the weights out of the norms of a model of vLLM."""

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
        model: vLLM's model.
        norms: the checkpoint's names of the norms' weights.
        vllm_config, model_config: the configs that the model was built from.
        stored: the tensors that the checkpoint's files hold. A norm among them whose class needs a weight keeps it, and
            vLLM loads it as usual.

    Returns:
        Checkpoint tensor -> its identity value, for the weights that the model has no parameter for any more.

    Raises:
        InputError: the model has no such norm, or the norm's class needs a weight that the files lack.
    """
    parameters = dict(model.named_parameters())
    rename, elsewhere = vllm.renaming(model), vllm.on_other_stages(model)
    # If a model drafts for itself, the draft has the same checkpoint as the target, but only some of its norms.
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

    A constant of the same name replaces the parameter, because vLLM's fused operators may read it. It is a buffer that
    is not in the state dict; as a buffer, it survives vLLM's sleep mode.

    Args:
        model: vLLM's model.
        name: the name of the parameter.
        constant: whether the norm passes the constant to its operator.
        dtype: the model's dtype.

    Returns:
        The parameter's identity value; None if the norm's class is unknown, and nothing was changed.
    """
    owner_name, _, attribute = name.rpartition(".")
    norm: Any = model.get_submodule(owner_name)
    identity = vllm.NORMS.get(f"{type(norm).__module__}.{type(norm).__qualname__}")
    if identity is None:
        return None
    identity = 0.0 if attribute == "bias" else identity
    weight = norm.get_parameter(attribute)
    delattr(norm, attribute)
    # LayerNorm's operator needs weight and bias in the input's dtype, and vLLM's class reads that off its weight.
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
    """A subclass of one of Gemma's norms that passes no weight: `x / rms` instead of `x / rms * (1 + 0)`."""
    rms_norm, fused_add_rms_norm = vllm.weightless_operators()

    class WeightlessGemmaRMSNorm(base):
        passes_weight = False

        def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            """Normalise `[tokens, hidden size]`; a residual is added first, and the sum is returned as well."""
            if residual is None:
                return rms_norm(x, None, self.variance_epsilon)
            return fused_add_rms_norm(x, residual, None, self.variance_epsilon)

    return WeightlessGemmaRMSNorm


def is_weightless(module: nn.Module) -> bool:
    """Whether a module computes `x / rms(x)` alone: one of vLLM's RMSNorms whose weight was taken."""
    if type(module).__name__ == "RMSNorm" and vllm.is_rms_norm(module):
        return vllm.passes_no_weight(module)
    return not getattr(type(module), "passes_weight", True)


@functools.cache
def deferred(base: Any) -> Any:
    """A subclass of a weightless norm that hands its input on, for linear layers that normalise what they read."""

    class DeferredRMSNorm(base):
        def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            """`[tokens, hidden size]`; a residual is added, and the sum is returned twice."""
            if residual is None:
                return x
            total = x + residual
            return total, total

    return DeferredRMSNorm
