"""What is asked of vLLM beyond its documented interface. Nothing of it is imported before a function here is called.

Used elsewhere without a function here: the fields of vLLM's configs (`VllmConfig` and those in it), which it documents.
"""

# Types are checked where vLLM is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def version() -> str:
    """The version that is installed."""
    import vllm

    return vllm.__version__


# --- functions that the plugin is wrapped around


@dataclass(frozen=True)
class Function:
    """A function of vLLM.

    Attributes:
        place: the module or the class where vLLM looks it up when it calls it.
        name: its name there.
        parameters: those whose meaning is known.
        needed: those without which a wrapper is of no use.
    """

    place: str
    name: str
    parameters: tuple[str, ...]
    needed: tuple[str, ...] = ()

    def owner(self) -> Any:
        """The module or the class. Raises `ImportError` or `AttributeError` where there is none."""
        return pkgutil.resolve_name(self.place)

    def lacks(self) -> str | None:
        """Why it cannot be wrapped: it is not there, or has no parameter of a name that is needed. None if it can."""
        try:
            found = inspect.signature(getattr(self.owner(), self.name)).parameters
        except (ImportError, AttributeError) as error:
            return str(error)
        absent = [name for name in self.needed if name not in found]
        return f"{self.name} without the parameter {absent[0]}" if absent else None


_LOADERS = "vllm.model_executor.model_loader."

# In the first process: from all arguments to a `VllmConfig`.
CREATE_CONFIG = Function(
    "vllm.engine.arg_utils:EngineArgs", "create_engine_config", ("self", "usage_context", "headless")
)
# In each: from a config to a model without its weights' values.
INITIALIZE = Function(
    _LOADERS + "base_loader",
    "initialize_model",
    ("vllm_config", "prefix", "model_class", "model_config"),
    needed=("vllm_config",),
)
# In each, when all files were read: `ValueError` if a parameter was in none of them. `quantized`: not before 0.32.
TRACK_LOADING = Function(
    _LOADERS + "default_loader:DefaultModelLoader",
    "track_weights_loading",
    ("self", "model", "loaded_weights", "quantized"),
    needed=("model",),
)
# In each, for an adapter that is not in memory.
_LOADS = ("self", "lora_request")
LOAD_ADAPTER = Function("vllm.lora.worker_manager:WorkerLoRAManager", "_load_adapter", _LOADS, needed=_LOADS)


def base_of_adapters(manager: Any) -> nn.Module:
    """The model that a `WorkerLoRAManager` loads adapters for."""
    return manager._adapter_manager.model


def adapter_folder(request: Any) -> Path:
    """Where the files of a `LoRARequest` are; fetched, if it names a repository."""
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(request.lora_path))


# --- a model's parts

# Its norms: class -> the weight that multiplies by one. Exact classes: a subclass may compute something else.
_LAYERS = "vllm.model_executor.layers."
_FUSERS = "vllm.model_executor.models.transformers.fusers.rms_norm."
NORMS = {
    _LAYERS + "layernorm.RMSNorm": 1.0,
    _FUSERS + "TPAwareRMSNorm": 1.0,
    _LAYERS + "layernorm.GemmaRMSNorm": 0.0,
    _FUSERS + "TPAwareGemmaRMSNorm": 0.0,
    "torch.nn.modules.normalization.LayerNorm": 1.0,
    _LAYERS + "layernorm.LayerNorm": 1.0,
    # These keep their code, with a constant for the weight.
    _LAYERS + "layernorm.RMSNormGated": 1.0,
    _LAYERS + "mamba.mamba_mixer2.Mixer2RMSNormGated": 1.0,
    "vllm.model_executor.models.commandr.LayerNorm": 1.0,
    "vllm.model_executor.models.nemotron.NemotronLayerNorm1P": 0.0,
}


def changed_part() -> str | None:
    """What is needed to build norms without weight, and is not there as it must be; None if all is."""
    try:
        from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm  # noqa: F401
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # noqa: F401
        from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta  # noqa: F401
        from vllm.model_executor.models.utils import get_pp_missing_layer_names  # noqa: F401

        names = RMSNorm.forward_native.__code__.co_names
    except (ImportError, AttributeError) as error:
        return str(error)
    if not {"pass_weight", "pass_weight_add"} <= {*names}:
        return "RMSNorm.pass_weight"
    return INITIALIZE.lacks() or TRACK_LOADING.lacks()


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is vLLM's RMSNorm, which calls its operator without weight where its flags say so (0.25)."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    return isinstance(module, RMSNorm)


def is_gemma_norm(module: nn.Module) -> bool:
    """Whether a module is vLLM's norm that multiplies by `1 + w`, which has no such flags."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    return isinstance(module, GemmaRMSNorm)


def pass_no_weight(norm: Any) -> None:
    """Let an RMSNorm call its operators without weight, as one that was built with `has_weight=False` does."""
    norm.has_weight = norm.pass_weight = norm.pass_weight_add = False


def change_class(operator: Any, new: type) -> None:
    """Make a vLLM `CustomOp` one of another class: it keeps the method that was chosen for the class that it had."""
    operator.__class__ = new
    method = operator._forward_method
    operator._forward_method = getattr(operator, method.__name__) if hasattr(method, "__self__") else method


def weightless_operators() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """`rms_norm(x, weight, eps)` and `fused_add_rms_norm(x, residual, weight, eps)`, whose weight may be None."""
    from vllm import ir

    return ir.ops.rms_norm, ir.ops.fused_add_rms_norm


def nothing_to_reload(buffer: Tensor) -> None:
    """Let vLLM not wait for a value for this buffer when weights are reloaded."""
    buffer.weight_loader_numel = 0  # type: ignore[attr-defined]


def note_for_reloading(module: nn.Module) -> None:
    """Let vLLM take what the module holds now for what it was built with, which it restores before a reload."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta

    get_layerwise_info(module).restore_metadata = capture_layer_to_meta(module)


def renaming(model: nn.Module) -> Callable[[str], str | None]:
    """From the checkpoint's names to the model's, before parts are merged; None for a tensor that is not loaded."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    # `_map_name` in 0.27.
    return getattr(mapper, "map_name", None) or getattr(mapper, "_map_name", None) or (lambda name: name)


def on_other_stages(model: nn.Module) -> list[str]:
    """The names of the modules that other stages of a pipeline have."""
    from vllm.model_executor.models.utils import get_pp_missing_layer_names

    return get_pp_missing_layer_names(model)


def is_compiled(vllm_config: Any) -> bool:
    """Whether vLLM's compiler runs, with its passes."""
    from vllm.config import CompilationMode

    return vllm_config.compilation_config.mode == CompilationMode.VLLM_COMPILE


# --- a checkpoint's files


def reads_files(load_config: Any) -> bool:
    """Whether the loader that a `LoadConfig` chooses reads the checkpoint's own files."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    return isinstance(get_model_loader(load_config), DefaultModelLoader)


def download(load_config: Any, model_config: Any) -> None:
    """vLLM's own download of a model from the hub, under its own lock."""
    from vllm.model_executor.model_loader import get_model_loader

    get_model_loader(load_config).download_model(model_config)
