"""What is wrapped around functions of vLLM, in each of its processes."""

import functools
import inspect
import json
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from flashnorm.acceptance import quantizations
from flashnorm.checkpoint.reader import CONFIG_FILE, Checkpoint
from flashnorm.checkpoint.state import listed_norms
from flashnorm.compat import vllm
from flashnorm.compat.arguments import bound
from flashnorm.errors import InputError
from flashnorm.integrations.vllm.files import check_complete, folded_norms, open_files, planned
from flashnorm.integrations.vllm.norms import make_weightless
from flashnorm.integrations.vllm.rules import differs, refusal, unsupported, without_folded
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
    problem = unsupported(vllm.version()) or _differs(vllm.changed_part())
    if (part := vllm.CREATE_CONFIG.lacks()) is not None:  # nothing can be refused early, nor anything else be done
        _log.warning("FlashNorm: %s", problem or _differs(part))
        return
    _wrap(vllm.CREATE_CONFIG, functools.partial(_with_check, problem))
    if problem is None:
        _wrap(vllm.INITIALIZE, _with_weightless_norms)
        _wrap(vllm.TRACK_LOADING, _with_second_look)


def _wrap(function: vllm.Function, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    owner = function.owner()
    original = getattr(owner, function.name)
    if not hasattr(original, "flashnorm"):
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped.flashnorm = True  # type: ignore[attr-defined]
        setattr(owner, function.name, wrapped)


def _differs(part: str | None) -> str | None:
    return None if part is None else differs(vllm.version(), part)


def _not_understood(model: Any, function: str, arguments: Iterable[str]) -> InputError:
    """What vLLM says besides what is known may matter, and it has no code of its own for a FlashNorm checkpoint."""
    part = f"{function} is given {', '.join(arguments)}"
    return InputError(f"{model}: a FlashNorm checkpoint: {differs(vllm.version(), part)}")


def _with_check(problem: str | None, original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `EngineArgs.create_engine_config`, in the first process: refuse what cannot work before others start.

    Whatever it is given is its own affair; what it returns counts.
    """

    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        speculative = getattr(config, "speculative_config", None)
        for model_config in (getattr(config, "model_config", None), getattr(speculative, "draft_model_config", None)):
            if model_config is None or not _is_marked(model_config):
                continue
            if problem is not None:
                raise InputError(f"{model_config.model}: a FlashNorm checkpoint: {problem}")
            _check(config, model_config, _listed(model_config) or ())
        return config

    return create_engine_config


def _with_weightless_norms(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Around `initialize_model`: build the norms that the config names without weight."""

    def initialize_model(*args: Any, **kwargs: Any) -> nn.Module:
        given, unknown = bound(original, vllm.INITIALIZE.parameters, args, kwargs)
        built = _Built(given["vllm_config"], given.get("model_config") or given["vllm_config"].model_config)
        marked = _is_marked(built.model_config)
        if unknown and marked:
            raise _not_understood(built.model_config.model, original.__name__, unknown)
        model = original(*args, **kwargs)
        if unknown:
            _say_once(f"{original.__name__} is given {', '.join(unknown)}")
            return model
        _BUILT[model] = built
        if marked:
            checkpoint = open_files(built.vllm_config.load_config, built.model_config)
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

    def track_weights_loading(*args: Any, **kwargs: Any) -> None:
        try:
            return original(*args, **kwargs)
        except ValueError as error:
            given, unknown = bound(original, vllm.TRACK_LOADING.parameters, args, kwargs)
            model = given["model"]
            built = _BUILT.get(model)
            if built is None or built.norms:
                raise
            if unknown:
                _say_once(f"{original.__name__} is given {', '.join(unknown)}")
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
        return original(*args, **kwargs)

    return track_weights_loading


@functools.cache
def _say_once(part: str) -> None:
    _log.warning("FlashNorm: checkpoints without a key in their config are not looked for: %s", _differs(part))


def _is_marked(model_config: Any) -> bool:
    hf_config = getattr(model_config, "hf_config", None)
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
    tensors = next(iter(inspect.signature(load_weights).parameters))  # "weights", in nearly all of vLLM's models

    def load_weights_but_norms(*args: Any, **kwargs: Any) -> Any:
        given, unknown = bound(load_weights, (tensors,), args, kwargs)
        if unknown:
            raise _not_understood(built.model_config.model, "load_weights", unknown)
        return load_weights(without_folded(given[tensors], built.norms))

    model.load_weights = load_weights_but_norms  # type: ignore[assignment]
    if built.vllm_config.lora_config is not None:
        if (why := _differs(vllm.LOAD_ADAPTER.lacks())) is not None:
            raise InputError(f"{built.model_config.model}: a FlashNorm checkpoint: {why}")
        _wrap(vllm.LOAD_ADAPTER, _with_adapter_check)
    _log.info("FlashNorm: %d norms of %s have no weight", len(built.norms), built.model_config.model)


def _with_adapter_check(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around the loading of a LoRA adapter: refuse one that was trained on the model before its conversion."""

    def load_adapter(*args: Any, **kwargs: Any) -> Any:
        given, unknown = bound(original, vllm.LOAD_ADAPTER.parameters, args, kwargs)
        built = _BUILT.get(vllm.base_of_adapters(given["self"]))
        if built is not None and built.norms:
            if unknown:
                raise _not_understood(built.model_config.model, original.__name__, unknown)
            path = vllm.adapter_folder(given["lora_request"]) / "adapter_config.json"
            if path.is_file():
                why = adapter_refusal(json.loads(path.read_text(encoding="utf-8")), built.model_config.model)
                if why is not None:
                    raise InputError(f"{path}: {why}")
        return original(*args, **kwargs)

    return load_adapter
