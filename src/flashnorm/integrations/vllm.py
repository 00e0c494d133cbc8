"""vLLM plugin: a FlashNorm checkpoint loads as any other does (entry point `vllm.general_plugins`).

* Ordinary models: two wrapped functions of vLLM look for a key in the config, find none, and that is all.
* The norms that the config names are built without weight, and nothing else changes: what vLLM requires, it still
  requires. What vLLM itself does not notice is checked here: a linear that is absent from the files.
* A checkpoint without our key is looked at when vLLM has refused it: are exactly the norms absent that can be folded?
* vLLM loads plugins in each of its processes; all that is done here is done in each of them.
"""

# Types are checked where vLLM is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import functools
import json
import logging
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

from flashnorm.checkpoint.names import StoredNames
from flashnorm.checkpoint.reader import CONFIG_FILE, Checkpoint
from flashnorm.checkpoint.state import listed_norms, weightless_norms
from flashnorm.errors import InputError
from flashnorm.planning import plan_checkpoint
from flashnorm.trace.models import load_config, meta_model

# The first release for the PyTorch that flashnorm needs.
OLDEST = "0.27.0"

# vLLM's norms: class -> the weight that multiplies by one. Exact classes: a subclass may compute something else.
_LAYERS = "vllm.model_executor.layers."
_FUSERS = "vllm.model_executor.models.transformers.fusers.rms_norm."
IDENTITIES = {
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

# Compiler passes whose fused operators take a norm's weight, or look for one. The first is for quantised linears.
_PASSES_WITH_WEIGHT = (
    "fuse_norm_quant",
    "fuse_allreduce_rms",
    "enable_sp",
    "fuse_gemm_comms",
    "fuse_act_padding",
    "fuse_mla_dual_rms_norm",
)

# Draft methods that do not read the target's hidden states.
_INDEPENDENT_DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model")

# Loaders that build models or take weights in ways of their own.
_OTHER_LOADERS = ("tensorizer", "ipc_cache", "modelexpress")

_log = logging.getLogger("vllm.flashnorm")


@dataclass
class _Built:
    """A model that was built, and what it was built from.

    Attributes:
        vllm_config, model_config: vLLM's.
        norms: checkpoint tensor -> its identity value, of what has no place in the model any more.
    """

    vllm_config: Any
    model_config: Any
    norms: dict[str, float] = field(default_factory=dict)


_BUILT: "weakref.WeakKeyDictionary[nn.Module, _Built]" = weakref.WeakKeyDictionary()


# What is decided, without vLLM.


def unsupported(version: str) -> str | None:
    """Why a version of vLLM cannot be used, or None. Versions that are no numbers are builds of someone's own."""
    try:
        known = Version(version)
    except InvalidVersion:
        return None
    if known.release < Version(OLDEST).release and known.release > (0, 1):
        return f"expected vLLM {OLDEST} or newer, found {version}; install a newer vLLM, or use Transformers"
    return None


def parameter_of(tensor: str, parameters: Collection[str]) -> str | None:
    """The parameter of a vLLM model that a checkpoint tensor is loaded into, told by its name.

    Args:
        tensor: the tensor's name, after the model's own renaming.
        parameters: names of the model's parameters; a prefix may be more or less than in the checkpoint.

    Returns:
        The one of this name; else the only one that has the name as its end, or is its end; else None.
    """
    if tensor in parameters:
        return tensor
    found = [name for name in parameters if name.endswith("." + tensor) or tensor.endswith("." + name)]
    return found[0] if len(found) == 1 else None


def on_other_stage(tensor: str, missing: Iterable[str]) -> bool:
    """Whether a tensor belongs to a module that another stage of the pipeline has; `missing` are their names."""
    parts = tensor.split(".")
    prefixes = {".".join(parts[:count]) for count in range(1, len(parts))}
    return any(
        layer.rstrip(".") in prefixes or any(layer.rstrip(".").endswith("." + prefix) for prefix in prefixes)
        for layer in missing
    )


def outside_layers(norms: Iterable[str]) -> list[str]:
    """The norms that are in no numbered layer: the final norm, in particular."""
    return [name for name in norms if not any(part.isdigit() for part in name.split("."))]


def refusal(norms: Iterable[str], *, runner: str, draft: str | None, load_format: str) -> str | None:
    """Why vLLM cannot use a FlashNorm checkpoint in this way, or None.

    Args:
        norms: the weightless norms.
        runner: vLLM's runner: "generate", "pooling", "draft".
        draft: the method of speculative decoding.
        load_format: vLLM's load format.
    """
    final = outside_layers(norms)
    if load_format in _OTHER_LOADERS:
        return f"expected a loader that reads the checkpoint's files, found --load-format {load_format}; leave it out"
    if final and draft is not None and draft not in _INDEPENDENT_DRAFTS:
        return (
            f"expected a draft that does not read the model's hidden states, found the method {draft}; the gain of "
            f"{final[0]}, whose output it would read, is in the output head: use {', '.join(_INDEPENDENT_DRAFTS[2:])} "
            "or ngram, or the model before its conversion"
        )
    if final and runner == "pooling":
        return (
            f"expected a model that generates, found one that pools hidden states; the gain of {final[0]}, whose "
            "output would be pooled, is in the output head: use the model before its conversion"
        )
    return None


def fused_with_weight(passes: Any, *, compiled: bool, quantized: bool) -> bool:
    """Whether norms should pass a constant weight, since without one they would not be fused with what is around them.

    Args:
        passes: vLLM's `PassConfig`.
        compiled: whether vLLM's compiler runs, whose passes these are.
        quantized: whether the linears are.
    """
    chosen = [name for name in _PASSES_WITH_WEIGHT if getattr(passes, name, None)]
    return compiled and bool(chosen) and (quantized or chosen != ["fuse_norm_quant"])


def adapter_refusal(adapter: Mapping[str, Any], model: str) -> str | None:
    """Why a LoRA adapter cannot be used with a FlashNorm checkpoint, or None.

    An adapter reads the norms' outputs as the model that it was trained on computes them, so it must have been trained
    on this one, or been folded itself.

    Args:
        adapter: its `adapter_config.json`.
        model: the checkpoint, as vLLM was given it.
    """
    base = adapter.get("base_model_name_or_path")
    if adapter.get("flashnorm") or (isinstance(base, str) and _same_place(base, model)):
        return None
    return (
        f"expected an adapter for {model}, found one for {base!r}; one that was trained on the model before its "
        "conversion gives wrong results here, as its inputs lack the norms' gains: serve that model, or train the "
        'adapter on this one. If it was, set base_model_name_or_path, or put "flashnorm": true into its '
        "adapter_config.json"
    )


def _same_place(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))


def without_folded(weights: Iterable[tuple[str, Tensor]], norms: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors without those of the folded norms (`--keep-norms` writes them).

    Args:
        weights: name and value of each.
        norms: checkpoint tensor -> its identity value.

    Raises:
        InputError: one of them is not at its identity value.
    """
    for name, tensor in weights:
        if name not in norms:
            yield name, tensor
        elif not bool((tensor == norms[name]).all()):
            raise InputError(
                f"expected {name} at {norms[name]:g}, because config.json says that it is folded, found other values; "
                "are these the weights of this model? Convert it again"
            )


# What is done, with vLLM.


def register() -> None:
    """Prepare vLLM for FlashNorm checkpoints. vLLM calls this in each of its processes; twice does no harm."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    problem = unsupported(vllm.__version__) or _changed_parts(vllm.__version__)
    _wrap(EngineArgs, "create_engine_config", functools.partial(_with_check, problem))
    if problem is not None:
        return
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    _wrap(base_loader, "initialize_model", _with_weightless_norms)
    _wrap(DefaultModelLoader, "track_weights_loading", _with_second_look)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "flashnorm"):
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped.flashnorm = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _changed_parts(version: str) -> str | None:
    """Why this vLLM cannot be used, though its version says nothing against it: a part that is needed is not there."""
    try:
        from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm  # noqa: F401
        from vllm.model_executor.model_loader.base_loader import initialize_model  # noqa: F401
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # noqa: F401
        from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta  # noqa: F401
        from vllm.model_executor.models.utils import get_pp_missing_layer_names  # noqa: F401

        names = RMSNorm.forward_native.__code__.co_names
        if {"pass_weight", "pass_weight_add"} <= set(names) and hasattr(DefaultModelLoader, "track_weights_loading"):
            return None
        part = "RMSNorm.pass_weight"
    except (ImportError, AttributeError) as error:
        part = str(error)
    return (
        f"expected a vLLM whose norms can be built without weight, found version {version}, which differs ({part}); "
        "use another release of vLLM, or of flashnorm"
    )


def _with_check(problem: str | None, original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `EngineArgs.create_engine_config`, in the first process: refuse what cannot work before others start."""

    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        speculative = getattr(config, "speculative_config", None)
        for model_config in (config.model_config, getattr(speculative, "draft_model_config", None)):
            if model_config is None or not _is_marked(model_config.hf_config):
                continue
            if problem is not None:
                raise InputError(f"{model_config.model}: a FlashNorm checkpoint: {problem}")
            _check(config, model_config, _listed(model_config) or ())
        return config

    return create_engine_config


def _with_weightless_norms(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Around `initialize_model`: build the norms that the config names without weight."""

    def initialize_model(vllm_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = original(vllm_config, *args, **kwargs)
        built = _Built(vllm_config, kwargs.get("model_config") or vllm_config.model_config)
        _BUILT[model] = built
        if _is_marked(built.model_config.hf_config):
            checkpoint = _checkpoint(built)
            listed = _listed(built.model_config)
            if listed is None and checkpoint is not None:
                with _plainly():
                    _, names = plan_checkpoint(checkpoint, trust_remote_code=built.model_config.trust_remote_code)
                    listed = list(weightless_norms(checkpoint, names) or ())
            if listed:
                _make_weightless(model, built, listed, checkpoint)
        return model

    return initialize_model


def _with_second_look(original: Callable[..., None]) -> Callable[..., None]:
    """Around `track_weights_loading`: a checkpoint without our key may lack exactly the norms that can be folded."""

    def track_weights_loading(loader: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        try:
            return original(loader, model, *args, **kwargs)
        except ValueError as error:
            built = _BUILT.get(model)
            checkpoint = None if built is None or built.norms else _checkpoint(built)
            if built is None or checkpoint is None:
                raise
            try:
                with _plainly():
                    _, names = plan_checkpoint(checkpoint, trust_remote_code=built.model_config.trust_remote_code)
            except InputError:
                raise error from None
            norms = weightless_norms(checkpoint, names)
            if not norms:
                raise
        _make_weightless(model, built, norms, checkpoint)
        return original(loader, model, *args, **kwargs)

    return track_weights_loading


def _is_marked(hf_config: Any) -> bool:
    return bool(getattr(hf_config, "flash_norm", None)) or getattr(hf_config, "flashnorm", None) is not None


def _listed(model_config: Any) -> list[str] | None:
    entry = {"flashnorm": getattr(model_config.hf_config, "flashnorm", None)}
    return listed_norms(entry, Path(model_config.model) / CONFIG_FILE)


def _check(vllm_config: Any, model_config: Any, norms: Iterable[str]) -> None:
    speculative = getattr(vllm_config, "speculative_config", None)
    target = model_config is vllm_config.model_config
    why = refusal(
        norms,
        runner=model_config.runner_type,
        draft=speculative.method if speculative is not None and target else None,
        load_format=str(vllm_config.load_config.load_format),
    )
    if why is not None:
        raise InputError(f"{model_config.model}: a FlashNorm checkpoint: {why}")


def _checkpoint(built: _Built) -> Checkpoint | None:
    """The checkpoint's files, opened; None if vLLM does not read its weights from files (or makes them up)."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = get_model_loader(built.vllm_config.load_config)
    if not isinstance(loader, DefaultModelLoader):
        return None
    config = built.model_config
    if os.path.isdir(config.model):
        return Checkpoint.open(config.model)
    from huggingface_hub import snapshot_download

    # vLLM's own download, under its own lock.
    loader.download_model(config)
    cache = built.vllm_config.load_config.download_dir
    folder = snapshot_download(config.model, revision=config.revision, cache_dir=cache, local_files_only=True)
    return Checkpoint.open(folder)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Tensors are made on the CPU and in float32 meanwhile, whatever vLLM has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _make_weightless(model: nn.Module, built: _Built, norms: Iterable[str], checkpoint: Checkpoint | None) -> None:
    """Take the named norms' weights out of a model of vLLM, in place.

    Raises:
        InputError: a norm is not there, or of a class that cannot be built without weight; the checkpoint lacks
            anything else; or the model is to be used in a way that needs what is not there any more.
    """
    from vllm.config import CompilationMode
    from vllm.model_executor.models.utils import get_pp_missing_layer_names

    norms = list(norms)
    _check(built.vllm_config, built.model_config, norms)
    if checkpoint is not None:
        _check_complete(checkpoint, norms, built.model_config.trust_remote_code)
    parameters = dict(model.named_parameters())
    rename = getattr(getattr(model, "hf_to_vllm_mapper", None), "map_name", None) or getattr(
        getattr(model, "hf_to_vllm_mapper", None), "_map_name", lambda name: name
    )
    elsewhere = get_pp_missing_layer_names(model)
    # A head that drafts for its own model has that one's config.
    target = built.vllm_config.model_config
    drafts_for_itself = built.model_config is not target and built.model_config.model == target.model
    compilation = built.vllm_config.compilation_config
    constant = fused_with_weight(
        compilation.pass_config,
        compiled=compilation.mode == CompilationMode.VLLM_COMPILE,
        quantized=built.model_config.quantization is not None,
    )
    for tensor in norms:
        renamed = rename(tensor)
        name = None if renamed is None else parameter_of(renamed, parameters)
        if name is not None:
            identity = _take_weight(model, name, constant, built.model_config.dtype)
            if identity is not None:
                built.norms[tensor] = identity
                continue
            found = f"it in a {type(model.get_submodule(name.rpartition('.')[0])).__name__}"
        elif drafts_for_itself or on_other_stage(renamed or tensor, elsewhere):
            continue
        else:
            found = "none of this name"
        # One that the files hold, at its identity value, is loaded as ever.
        if checkpoint is None or tensor not in checkpoint.tensors:
            raise InputError(
                f"{built.model_config.model}: expected the norm {tensor} in vLLM's {type(model).__name__}, found "
                f"{found}, which cannot be built without weight; convert the source again with --keep-norms"
            )
    load_weights: Any = model.load_weights

    def load_weights_but_norms(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        return load_weights(without_folded(weights, built.norms), *args, **kwargs)

    model.load_weights = load_weights_but_norms  # type: ignore[assignment]
    if built.vllm_config.lora_config is not None:
        from vllm.lora.worker_manager import WorkerLoRAManager

        _wrap(WorkerLoRAManager, "_load_adapter", _with_adapter_check)
    _log.info("FlashNorm: %d norms of %s have no weight", len(built.norms), built.model_config.model)


def _check_complete(checkpoint: Checkpoint, norms: Collection[str], trust_remote_code: bool) -> None:
    """Raise `InputError` if the files lack a tensor that is none of these; vLLM does not notice an absent linear."""
    if any("quantization" in key or "compression" in key for key in checkpoint.config):
        return  # stored under other names
    with _plainly():
        try:
            config = load_config(checkpoint.folder, trust_remote_code)
            names = StoredNames(meta_model(config, trust_remote_code=trust_remote_code), checkpoint.tensors)
        except InputError as error:
            _log.warning("FlashNorm: whether %s is complete could not be checked (%s)", checkpoint.folder, error)
            return
    absent = [name for name in names.absent() if name not in norms]
    if absent:
        raise InputError(
            f"{checkpoint.folder}: expected every weight but those of the folded norms, found {len(absent)} absent: "
            f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}; the checkpoint is damaged: fetch or convert "
            "it again"
        )


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
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta

    owner_name, _, attribute = name.rpartition(".")
    norm: Any = model.get_submodule(owner_name)
    identity = IDENTITIES.get(f"{type(norm).__module__}.{type(norm).__qualname__}")
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
        value.weight_loader_numel = 0  # type: ignore[attr-defined]  # nothing to wait for when weights are reloaded
        norm.register_buffer(attribute, value, persistent=False)
    if isinstance(norm, RMSNorm) and not constant:
        norm.has_weight = norm.pass_weight = norm.pass_weight_add = False
    if isinstance(norm, GemmaRMSNorm) and not constant:
        norm.__class__ = _weightless_gemma(type(norm))
        # Chosen when the norm was built, of the class that it had.
        method = norm._forward_method
        norm._forward_method = getattr(norm, method.__name__) if hasattr(method, "__self__") else method
    get_layerwise_info(norm).restore_metadata = capture_layer_to_meta(norm)
    return identity


@functools.cache
def _weightless_gemma(base: Any) -> Any:
    """A class of Gemma's norms whose operator is given no weight: `x / rms` instead of `x / rms * (1 + 0)`."""
    from vllm import ir

    class WeightlessGemmaRMSNorm(base):
        def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            """`[tokens, hidden size]` to the same; with a residual, that is added first, and returned as well."""
            if residual is None:
                return ir.ops.rms_norm(x, None, self.variance_epsilon)
            return ir.ops.fused_add_rms_norm(x, residual, None, self.variance_epsilon)

    return WeightlessGemmaRMSNorm


def _with_adapter_check(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around the loading of a LoRA adapter: refuse one that was trained on the model before its conversion."""

    def _load_adapter(manager: Any, request: Any) -> Any:
        built = _BUILT.get(manager._adapter_manager.model)
        if built is not None and built.norms:
            from vllm.lora.utils import get_adapter_absolute_path

            path = Path(get_adapter_absolute_path(request.lora_path)) / "adapter_config.json"
            if path.is_file():
                why = adapter_refusal(json.loads(path.read_text(encoding="utf-8")), built.model_config.model)
                if why is not None:
                    raise InputError(f"{path}: {why}")
        return original(manager, request)

    return _load_adapter
