"""The kinds of adapters (PEFT) as data: which of their tensors reads the inputs of a linear layer, and what is refused.

A linear layer that takes a gain `g` reads `x` in the folded model where it read `g * x` before. An adapter's change of
the layer's weight must therefore become `D diag(g)`. A kind can be converted if its form of `D` allows that:

* LoRA, AdaLoRA: `D = s B A` (with AdaLoRA's `diag(E)` between), so `A* = A diag(g)`.
* LoHa: `D = s (B1 A1) * (B2 A2)`, element by element, so that one of the factors takes the gain: `A1* = A1 diag(g)`.
* LoKr: `D = s kron(C, D2)`; only if `C` has one column, `D2* = D2 diag(g)`.
* IA3 scales the layer's outputs or its inputs, which commutes with `diag(g)`: nothing changes.
* Prompts are read before the first norm, or as keys and values: nothing changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashnorm.errors import InputError

WAY_ON = "merge the adapter into the source (PEFT's merge_and_unload) and convert that model instead"


@dataclass(frozen=True)
class AdapterKind:
    """One of PEFT's kinds of adapters.

    Attributes:
        inputs: ending of a tensor's name -> its axis that belongs to the input channels of the layer, which takes the
            gain.
        others: endings of tensors that take no gain.
        shared: tensors that belong to no layer.
        stuck: why the kind cannot be converted if one of its layers takes a gain; None if it can.
        constants: whether the kind can add a constant to a layer's output (LoRA's `lora_bias`).
        commutes: whether it works on inputs or outputs of a layer, and not on its weight.
    """

    inputs: Mapping[str, int] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    stuck: str | None = None
    constants: bool = False
    commutes: bool = False

    def ending(self, tensor: str) -> str | None:
        """The ending of a tensor's name that says what it is; None if it is a parameter of the model itself."""
        return next((end for end in (*self.inputs, *self.others) if tensor.endswith(f".{end}")), None)


_PROMPT = AdapterKind(shared=("prompt_embeddings",))
_TOKENS = "trainable_tokens_delta"
_TOKEN_ADAPTER = (f"token_adapter.{_TOKENS}", _TOKENS)

KINDS: Mapping[str, AdapterKind] = {
    "LORA": AdapterKind(
        inputs={"lora_A.weight": 1},
        others=(
            *("lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
            *("lora_magnitude_vector", "lora_magnitude_vector.weight", *_TOKEN_ADAPTER),
        ),
        constants=True,
    ),
    "ADALORA": AdapterKind(inputs={"lora_A": 1}, others=("lora_B", "lora_E", "ranknum", *_TOKEN_ADAPTER)),
    "LOHA": AdapterKind(inputs={"hada_w1_b": 1}, others=("hada_w1_a", "hada_w2_a", "hada_w2_b")),
    "LOKR": AdapterKind(
        inputs={"lokr_w2": 1, "lokr_w2_b": 1}, others=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a")
    ),
    "IA3": AdapterKind(others=("ia3_l",), commutes=True),
    "VERA": AdapterKind(
        others=("vera_lambda_b", "vera_lambda_d"),
        shared=("base_model.vera_A", "base_model.vera_B"),
        stuck="its layers share their factors, and each layer has a gain of its own",
    ),
    "LN_TUNING": AdapterKind(others=("ln_tuning_layers.weight", "ln_tuning_layers.bias")),
    "TRAINABLE_TOKENS": AdapterKind(others=(_TOKENS,)),
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": AdapterKind(
        shared=("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"),
    ),
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
}

# Why other kinds are refused.
_REFUSED = {
    "XLORA": "its classifier reads the last hidden state, which lacks the final norm's gain in a folded model, and the "
    "adapters that it mixes are folders of their own",
    "ADAPTION_PROMPT": "its prompts pass the linear layers of the attention without their norm",
    "OFT": "it rotates the inputs of a layer, which does not commute with a gain",
    "HRA": "it reflects the inputs of a layer, which does not commute with a gain",
}

# Keys of adapter_config.json that say nothing about which gain a tensor takes.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "r", "lora_alpha", "alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora"),
    *("init_lora_weights", "init_weights", "init_ia3_weights", "rank_pattern", "alpha_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "alora_invocation_tokens"),
    *("qalora_group_size", "runtime_config", "lora_bias", "target_parameters", "ensure_weight_tying"),
    *("trainable_token_indices", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
    *("orth_reg_weight", "total_step", "feedforward_modules", "rank_dropout", "module_dropout"),
    *("use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale", "projection_prng_key"),
    *("save_projection", "vera_dropout", "d_initial", "token_indices"),
}

# Prompts know many settings of how they were trained; only the result is read.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")

# Key of LoRA's config -> why an adapter with it is refused.
_STUCK_KEYS = {
    "use_qalora": "QA-LoRA's factor reads means over groups of input channels, which have different gains",
    "layer_replication": "layer_replication makes another model of the source",
    "arrow_config": "Arrow chooses adapters by directions in the space of the layer's inputs",
    "use_bdlora": "BD-LoRA's factors are blocks",
    "kasa_config": "KaSA changes the weights of the source",
    "megatron_config": "Megatron's layers are others than the model's",
}

# Initialisations that also change the weight of the source, whenever the adapter is loaded.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_kind(config: Mapping[str, Any], where: object) -> AdapterKind:
    """The kind of an adapter, given its adapter_config.json.

    Args:
        config: the parsed file.
        where: its path, for messages.

    Raises:
        InputError: the adapter cannot be converted, whatever its tensors are.
    """
    name = config.get("peft_type")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        why = _REFUSED.get(str(name), "how its weights read the inputs of a layer is not known here")
        raise InputError(f"{where}: expected a kind of adapter that can be converted, found {name}: {why}; {WAY_ON}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise InputError(
            f'{where}: expected an adapter for the source as it is, found one initialised by "{init}", which changes '
            "the source's weights when the adapter is loaded; save it as a LoRA first, with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or " + WAY_ON
        )
    for key, value in config.items():
        if key in _HARMLESS or not value or name in _PROMPTS:
            continue
        why = _STUCK_KEYS.get(key, "what this does is not known here")
        raise InputError(f'{where}: expected an adapter that can be converted, found "{key}": {why}; {WAY_ON}')
    return kind
