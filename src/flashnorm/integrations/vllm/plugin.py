"""What is wrapped around functions of vLLM, in each of its processes."""

# Types are checked where vLLM is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import functools
import json
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flashnorm.acceptance import quantizations
from flashnorm.checkpoint.reader import CONFIG_FILE, Checkpoint
from flashnorm.checkpoint.state import listed_norms
from flashnorm.errors import InputError
from flashnorm.integrations.vllm.files import check_complete, folded_norms, open_files, planned
from flashnorm.integrations.vllm.norms import make_weightless
from flashnorm.integrations.vllm.rules import refusal, unsupported, without_folded
from flashnorm.runtime.adapters import adapter_refusal

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
            checkpoint = open_files(vllm_config.load_config, built.model_config)
            listed = _listed(built.model_config)
            # There is no plan of quantised weights. vLLM does not miss any of those either: absent norms stay at the
            # identity value that it builds them with.
            if listed is None and checkpoint is not None and not any(quantizations(checkpoint.config)):
                listed = folded_norms(checkpoint, planned(checkpoint, built.model_config.trust_remote_code))
            if listed:
                _fold(model, built, listed, checkpoint)
        return model

    return initialize_model


def _with_second_look(original: Callable[..., None]) -> Callable[..., None]:
    """Around `track_weights_loading`: a checkpoint without our key may lack exactly the norms that can be folded."""

    def track_weights_loading(loader: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        try:
            return original(loader, model, *args, **kwargs)
        except ValueError as error:
            built = _BUILT.get(model)
            if built is None or built.norms:
                raise
            checkpoint = open_files(built.vllm_config.load_config, built.model_config)
            if checkpoint is None:
                raise
            try:
                names = planned(checkpoint, built.model_config.trust_remote_code)
            except InputError:
                raise error from None
            norms = folded_norms(checkpoint, names)
            if not norms:
                raise
        _fold(model, built, norms, checkpoint)
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


def _fold(model: nn.Module, built: _Built, norms: list[str], checkpoint: Checkpoint | None) -> None:
    """Make a model of vLLM a folded one, in place.

    Raises:
        InputError: `make_weightless` does; the checkpoint lacks anything else; or the model is to be used in a way that
            needs what is not there any more.
    """
    _check(built.vllm_config, built.model_config, norms)
    if checkpoint is not None:
        check_complete(checkpoint, norms, built.model_config.trust_remote_code)
    stored = () if checkpoint is None else checkpoint.tensors
    built.norms = make_weightless(model, norms, built.vllm_config, built.model_config, stored)
    load_weights: Any = model.load_weights

    def load_weights_but_norms(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        return load_weights(without_folded(weights, built.norms), *args, **kwargs)

    model.load_weights = load_weights_but_norms  # type: ignore[assignment]
    if built.vllm_config.lora_config is not None:
        from vllm.lora.worker_manager import WorkerLoRAManager

        _wrap(WorkerLoRAManager, "_load_adapter", _with_adapter_check)
    _log.info("FlashNorm: %d norms of %s have no weight", len(built.norms), built.model_config.model)


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
