"""What FlashNorm relies on in lm-eval: the model type `hf`, and the options of it that are known.

lm-eval documents the registry, the command and the class `HFLM` for adding a model type. What each option does, and
what `HFLM` passes to its auto class, was read from the code of version 0.4.13. Only the functions import lm-eval.
"""

# Types are also checked in environments without lm-eval.
# pyright: reportMissingImports=false

from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from typing import Any

from flashnorm.errors import InputError

# Options of `hf` that say how to evaluate, and on which device.
EVALUATING = frozenset((
    "backend", "tokenizer", "truncation", "logits_cache", "max_length", "device", "dtype", "softmax_dtype",
    "mixed_precision_dtype", "batch_size", "max_batch_size", "trust_remote_code", "use_fast_tokenizer",
    "add_bos_token", "prefix_token_id", "parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder",
    "think_end_token", "enable_thinking", "chat_template_args",
))  # fmt: skip

# Option of `hf` that changes what is loaded, or how -> the values at which it has no effect.
OTHERWISE: Mapping[str, tuple[Any, ...]] = {
    "revision": ("main", None),
    "subfolder": ("",),
    "gguf_file": (None,),
    "autogptq": (False,),
    "gptqmodel": (False,),
    "tp_plan": (None,),
    "peft": (None,),
    "delta": (None,),
}

# Arguments that `HFLM` derives from its options and passes to Transformers' `from_pretrained`.
LOADING = frozenset((
    "dtype", "trust_remote_code", "quantization_config", "device_map", "max_memory", "offload_folder",
    "attn_implementation", "experts_implementation",
))  # fmt: skip


def hf_type() -> Any:
    """The class behind lm-eval's type `hf`, whose `AUTO_MODEL_CLASS.from_pretrained` loads the model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM


def register(name: str) -> Callable[[type], type]:
    """A decorator that makes a class a model type of this name."""
    from lm_eval.api.registry import register_model

    return register_model(name)


def command() -> Callable[[], Any]:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    return cli_evaluate


def check_options(options: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse unknown options, and options that change what is loaded.

    Args:
        options: what was passed to `HFLM`, or what `HFLM` passes to its auto class.
        known: the options that are accepted there. Those in `OTHERWISE` are accepted if they have no effect.

    Raises:
        InputError: an option is refused.
    """
    if used := [name for name, unused in OTHERWISE.items() if name in options and options[name] not in unused]:
        raise InputError(
            f"expected model arguments that fit a FlashNorm checkpoint, found {', '.join(used)}; leave them out, "
            "fetch the checkpoint into a folder first, or see whether --model hf does what you need"
        )
    if unknown := [name for name in options if name not in known and name not in OTHERWISE]:
        raise InputError(
            f"expected model arguments that flashnorm knows, found {', '.join(unknown)}, with lm-eval "
            f"{version('lm_eval')}; leave them out, use lm-eval 0.4.13 if they are new, or see whether --model hf does "
            "what you need"
        )
