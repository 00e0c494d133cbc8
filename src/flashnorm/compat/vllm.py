"""What FlashNorm relies on in vLLM beyond its documented interface. Only the functions import vLLM.

There are no functions here for the fields of vLLM's configs (`VllmConfig` and those in it), which vLLM documents.
"""

# Types are also checked in environments without vLLM.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def version() -> str:
    """The installed version of vLLM."""
    import vllm

    return vllm.__version__


# --- functions that the plugin wraps


@dataclass(frozen=True)
class Function:
    """A function of vLLM.

    Attributes:
        place: the module or class where vLLM looks the function up when it calls it.
        name: the function's name there.
        parameters: names of the parameters whose meaning is known.
        needed: names of the parameters that a wrapper needs.
    """

    place: str
    name: str
    parameters: tuple[str, ...]
    needed: tuple[str, ...] = ()

    def owner(self) -> Any:
        """The module or class at `place`. Raises `ImportError` or `AttributeError` if there is none."""
        return pkgutil.resolve_name(self.place)

    def lacks(self) -> str | None:
        """Why the function cannot be wrapped (it does not exist, or lacks a needed parameter); None if it can."""
        try:
            found = inspect.signature(getattr(self.owner(), self.name)).parameters
        except (ImportError, AttributeError) as error:
            return str(error)
        absent = [name for name in self.needed if name not in found]
        return f"{self.name} without the parameter {absent[0]}" if absent else None


_LOADERS = "vllm.model_executor.model_loader."

# Runs in the first process: makes a `VllmConfig` of all arguments.
CREATE_CONFIG = Function(
    "vllm.engine.arg_utils:EngineArgs", "create_engine_config", ("self", "usage_context", "headless")
)
# Runs in each process: makes a model of a config, before the weights are loaded.
INITIALIZE = Function(
    _LOADERS + "base_loader",
    "initialize_model",
    ("vllm_config", "prefix", "model_class", "model_config"),
    needed=("vllm_config",),
)
# Runs in each process after all files were read; `ValueError` if no file has a parameter. `quantized`: since 0.32.
TRACK_LOADING = Function(
    _LOADERS + "default_loader:DefaultModelLoader",
    "track_weights_loading",
    ("self", "model", "loaded_weights", "quantized"),
    needed=("model",),
)
# Runs in each process when the weights have been loaded: each layer may pack its own.
PROCESS_WEIGHTS = Function(
    _LOADERS + "base_loader",
    "process_weights_after_loading",
    ("model", "model_config", "target_device"),
    needed=("model",),
)
# Runs in each process, for an adapter that is not in memory yet.
_LOADS = ("self", "lora_request")
LOAD_ADAPTER = Function("vllm.lora.worker_manager:WorkerLoRAManager", "_load_adapter", _LOADS, needed=_LOADS)
# Runs in each process, once for each step of the model.
EXECUTE_MODEL = Function("vllm.v1.worker.worker_base:WorkerWrapperBase", "execute_model", ("self", "scheduler_output"))


def base_of_adapters(manager: Any) -> nn.Module:
    """The model that a `WorkerLoRAManager` loads adapters for."""
    return manager._adapter_manager.model


def adapter_folder(request: Any) -> Path:
    """The folder with the files of a `LoRARequest`; they are fetched if it names a repository."""
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(request.lora_path))


# --- a model's parts

# Class of a norm -> its identity value. Only these exact classes, because a subclass may compute something else.
_LAYERS = "vllm.model_executor.layers."
_FUSERS = "vllm.model_executor.models.transformers.fusers.rms_norm."
NORMS = {
    _LAYERS + "layernorm.RMSNorm": 1.0,
    _FUSERS + "TPAwareRMSNorm": 1.0,
    _LAYERS + "layernorm.GemmaRMSNorm": 0.0,
    _FUSERS + "TPAwareGemmaRMSNorm": 0.0,
    "torch.nn.modules.normalization.LayerNorm": 1.0,
    _LAYERS + "layernorm.LayerNorm": 1.0,
    # The following classes keep their code, and a constant replaces the weight.
    _LAYERS + "layernorm.RMSNormGated": 1.0,
    _LAYERS + "mamba.mamba_mixer2.Mixer2RMSNormGated": 1.0,
    "vllm.model_executor.models.commandr.LayerNorm": 1.0,
    "vllm.model_executor.models.nemotron.NemotronLayerNorm1P": 0.0,
}


def hide_flag(hf_config: Any) -> None:
    """Hide the flag that an open change of vLLM reads (41431), which builds all norms of a Llama without weight.

    The config stays marked by the other flag, which vLLM does not read.
    """
    if getattr(hf_config, "flashnorm_folded", False):
        hf_config.flashnorm_folded, hf_config.flash_norm = False, True


def changed_part() -> str | None:
    """What vLLM lacks that is needed to build norms without weight; None if nothing is missing."""
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
    """Whether a module is vLLM's RMSNorm, which has flags for calling its operator without weight (0.25)."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    return isinstance(module, RMSNorm)


def is_gemma_norm(module: nn.Module) -> bool:
    """Whether a module is vLLM's norm that multiplies by `1 + w`; it has no flags for leaving the weight out."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    return isinstance(module, GemmaRMSNorm)


def pass_no_weight(norm: Any) -> None:
    """Make an RMSNorm call its operators without weight, like a norm that was built with `has_weight=False`."""
    norm.has_weight = norm.pass_weight = norm.pass_weight_add = False


def passes_no_weight(norm: Any) -> bool:
    """Whether an RMSNorm computes `x / rms(x)`, over all channels of its input."""
    return not (norm.has_weight or norm.pass_weight or norm.pass_weight_add) and norm.variance_size_override is None


def change_class(operator: Any, new: type) -> None:
    """Change the class of a vLLM `CustomOp`, and its chosen method, which is still bound to the old class."""
    operator.__class__ = new
    method = operator._forward_method
    operator._forward_method = getattr(operator, method.__name__) if hasattr(method, "__self__") else method


def weightless_operators() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """`rms_norm(x, weight, eps)` and `fused_add_rms_norm(x, residual, weight, eps)`; the weight may be None."""
    from vllm import ir

    return ir.ops.rms_norm, ir.ops.fused_add_rms_norm


def plain_linears(model: nn.Module) -> list[nn.Module]:
    """The linear layers of a model that are not quantised."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    return [
        module
        for module in model.modules()
        if isinstance(module, LinearBase)
        and type(module.quant_method) is UnquantizedLinearMethod
        and module.get_parameter("weight").dim() == 2  # the weights of convolutions have three
    ]


def linear_method(apply: Callable[..., Tensor]) -> Any:
    """How a linear layer computes: by `apply(layer, x, bias)`, with the weight as it was loaded."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    class LinearMethod(UnquantizedLinearMethod):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """Do not pack the weight."""

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """`[..., inputs]` -> `[..., outputs]`."""
            return apply(layer, x, bias)

    return LinearMethod()


def without_attention(vllm_config: Any, tokens: int) -> Any:
    """A context in which a model runs without compiler, and attention returns memory that was not written."""
    from vllm.forward_context import set_forward_context

    return set_forward_context(None, vllm_config, num_tokens=tokens, skip_compiled=True)


def nothing_to_reload(buffer: Tensor) -> None:
    """Make vLLM not expect a value for this buffer when weights are reloaded."""
    buffer.weight_loader_numel = 0  # type: ignore[attr-defined]


def note_for_reloading(module: nn.Module) -> None:
    """Make vLLM record the module's current parameters as its original ones, which it restores before a reload."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta

    get_layerwise_info(module).restore_metadata = capture_layer_to_meta(module)


def renaming(model: nn.Module) -> Callable[[str], str | None]:
    """A function from a checkpoint's names to the model's, before parts are merged; None if not loaded."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    # 0.27 calls it `_map_name`.
    return getattr(mapper, "map_name", None) or getattr(mapper, "_map_name", None) or (lambda name: name)


def on_other_stages(model: nn.Module) -> list[str]:
    """The names of the modules that are on other stages of a pipeline."""
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
