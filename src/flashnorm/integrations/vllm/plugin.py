"""The wrappers around functions of vLLM, in each of its processes."""

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from flashnorm.compat import vllm
from flashnorm.compat.arguments import bound
from flashnorm.errors import InputError
from flashnorm.files.reader import CONFIG_FILE, Checkpoint, read_json
from flashnorm.format import CONFIG_FLAGS, CONFIG_KEY, is_marked, listed_centred, listed_norms
from flashnorm.integrations.vllm import fused
from flashnorm.integrations.vllm.files import check_complete, folded_norms, open_files, planned
from flashnorm.integrations.vllm.norms import make_weightless
from flashnorm.integrations.vllm.rules import differs, refusal, unsupported, without_folded
from flashnorm.models.adapters import adapter_refusal, of_ordinary_model
from flashnorm.plan import Kept
from flashnorm.planning.checks import quantizations
from flashnorm.planning.planned import PlannedCheckpoint

_log = logging.getLogger("vllm.flashnorm")

# Size of a Python frame in slots of 8 bytes: CPython makes a chunk of 128 KB for it, of which the frame leaves 62 KB.
_LARGE_FRAME = 8192


@dataclass
class _Built:
    """What is known about a model that vLLM built.

    Attributes:
        vllm_config, model_config: the configs that it was built from.
        norms: checkpoint tensor -> its identity value, for the weights that the model has no parameter for any more.
        folds_hash: the hash of the model's folds, which adapters may name; None without adapters, or if it is unknown.
    """

    vllm_config: Any
    model_config: Any
    norms: dict[str, float] = field(default_factory=dict)
    folds_hash: str | None = None


_BUILT: "weakref.WeakKeyDictionary[nn.Module, _Built]" = weakref.WeakKeyDictionary()


def register() -> None:
    """Prepare vLLM for FlashNorm checkpoints. vLLM calls this in each of its processes; a second call does nothing."""
    problem = unsupported(vllm.version()) or _differs(vllm.changed_part())
    if (part := vllm.CREATE_CONFIG.lacks()) is not None:  # then nothing can be wrapped
        _log.warning("FlashNorm: %s", problem or _differs(part))
        return
    _wrap(vllm.CREATE_CONFIG, functools.partial(_with_check, problem))
    if problem is None:
        _wrap(vllm.INITIALIZE, _with_weightless_norms)
        _wrap(vllm.TRACK_LOADING, _with_second_look)
        if vllm.PROCESS_WEIGHTS.lacks() is None:
            _wrap(vllm.PROCESS_WEIGHTS, _with_kernels)
    if vllm.EXECUTE_MODEL.lacks() is None:
        _wrap(vllm.EXECUTE_MODEL, _with_room)


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
    """The error for unknown arguments: they may matter, and vLLM cannot load a FlashNorm checkpoint by itself."""
    part = f"{function} is given {', '.join(arguments)}"
    return InputError(f"{model}: a FlashNorm checkpoint: {differs(vllm.version(), part)}")


def _with_check(problem: str | None, original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `EngineArgs.create_engine_config`: refuse in the first process what cannot work, before others start.

    Only the returned config is read, so the arguments do not have to be known.
    """

    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        fused.asked(config)  # an unclear answer is an error
        speculative = getattr(config, "speculative_config", None)
        for model_config in (getattr(config, "model_config", None), getattr(speculative, "draft_model_config", None)):
            if model_config is None or not _is_marked(model_config):
                continue
            if problem is not None:
                raise InputError(f"{model_config.model}: a FlashNorm checkpoint: {problem}")
            _check(config, model_config, _listed(model_config) or ())
        return config

    return create_engine_config


def _with_room(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `execute_model`: put one large Python frame below the model, whichever it is.

    CPython keeps frames in chunks of 16 KB. A call that does not fit into the current chunk maps a new one, and unmaps
    it when it returns. Where a chunk ends depends on the local variables of all frames below, so the end can fall on a
    call that each layer makes: two page faults for each layer of each token. A frame that is larger than a chunk gets
    one of its own with as much room again, where all that the model calls fits.
    """

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    execute_model.__code__ = execute_model.__code__.replace(co_stacksize=_LARGE_FRAME)
    return execute_model


def _with_weightless_norms(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Around `initialize_model`: build the norms that the config names without weight."""

    def initialize_model(*args: Any, **kwargs: Any) -> nn.Module:
        given, unknown = bound(original, vllm.INITIALIZE.parameters, args, kwargs)
        built = _Built(given["vllm_config"], given.get("model_config") or given["vllm_config"].model_config)
        marked = _is_marked(built.model_config)
        if unknown and marked:
            raise _not_understood(built.model_config.model, original.__name__, unknown)
        if marked:
            # A vLLM that reads this flag would drop weights by itself: also of the final norm, which often stays.
            vllm.hide_flag(built.model_config.hf_config)
        model = original(*args, **kwargs)
        if unknown:
            _say_once(f"{original.__name__} is given {', '.join(unknown)}")
            return model
        _BUILT[model] = built
        if getattr(built.vllm_config, "lora_config", None) is not None and vllm.LOAD_ADAPTER.lacks() is None:
            _wrap(vllm.LOAD_ADAPTER, _with_adapter_check)
        if marked:
            checkpoint = open_files(built.vllm_config.load_config, built.model_config)
            listed, plan = _listed(built.model_config), None
            # Without our key, a quantised model needs no plan: vLLM does not miss any of its weights, and absent norms
            # keep the identity value that vLLM initialises them with.
            if listed is None and checkpoint is not None and not any(quantizations(checkpoint.config)):
                plan = planned(checkpoint, built.model_config.trust_remote_code)
                listed = folded_norms(plan)
            if listed:
                _fold(model, built, listed, checkpoint, plan)
        return model

    return initialize_model


def _with_second_look(original: Callable[..., None]) -> Callable[..., None]:
    """Around `track_weights_loading`: after an error, check whether exactly the foldable norms are absent."""

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
                plan = planned(checkpoint, built.model_config.trust_remote_code)
            except InputError:
                raise error from None
            norms = folded_norms(plan)
            if not norms:
                raise
        _fold(model, built, norms, checkpoint, plan)
        return original(*args, **kwargs)

    return track_weights_loading


def _with_kernels(original: Callable[..., None]) -> Callable[..., None]:
    """Around `process_weights_after_loading`: if asked to, make folded models run on the kernels, before it packs."""

    def process_weights_after_loading(*args: Any, **kwargs: Any) -> None:
        given, _ = bound(original, vllm.PROCESS_WEIGHTS.parameters, args, kwargs)
        built = _BUILT.get(given["model"])
        if built is not None and fused.asked(built.vllm_config):
            if built.norms:
                fused.use_kernels(given["model"], built.vllm_config, built.model_config)
            else:
                _log.warning("FlashNorm: %s is set, and has no effect on a model without folded norms", fused.OPTION)
        return original(*args, **kwargs)

    return process_weights_after_loading


@functools.cache
def _say_once(part: str) -> None:
    _log.warning("FlashNorm: checkpoints without a key in their config are not looked for: %s", _differs(part))


def _is_marked(model_config: Any) -> bool:
    hf_config = getattr(model_config, "hf_config", None)
    return is_marked({key: getattr(hf_config, key, None) for key in (*CONFIG_FLAGS, CONFIG_KEY)})


def _listed(model_config: Any) -> list[str] | None:
    return listed_norms(*_entry(model_config))


def _entry(model_config: Any) -> tuple[dict[str, Any], Path]:
    """Our key in a model's config, and the config's path for messages."""
    return {CONFIG_KEY: getattr(model_config.hf_config, CONFIG_KEY, None)}, Path(model_config.model) / CONFIG_FILE


def _check(vllm_config: Any, model_config: Any, norms: Iterable[str]) -> None:
    speculative = getattr(vllm_config, "speculative_config", None)
    target = model_config is vllm_config.model_config
    why = refusal(
        norms,
        runner=model_config.runner_type,
        draft=speculative.method if speculative is not None and target else None,
        load_format=str(vllm_config.load_config.load_format),
        centred=bool(listed_centred(*_entry(model_config)).norms),
    )
    if why is not None:
        raise InputError(f"{model_config.model}: a FlashNorm checkpoint: {why}")


def _fold(
    model: nn.Module, built: _Built, norms: list[str], checkpoint: Checkpoint | None, plan: PlannedCheckpoint | None
) -> None:
    """Take the folded norms' weights out of a model of vLLM, in place; `plan` is the planned checkpoint, if known.

    Raises:
        InputError: a norm cannot be made weightless, the checkpoint lacks another tensor, or the model is to be used
            in a way that needs the gains.
    """
    _check(built.vllm_config, built.model_config, norms)
    if checkpoint is not None:
        check_complete(checkpoint, norms, built.model_config.trust_remote_code, plan and plan.names)
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
        built.folds_hash = _folds_hash(norms, built, checkpoint, plan)
    _log.info("FlashNorm: %d norms of %s have no weight", len(built.norms), built.model_config.model)


def _folds_hash(
    norms: list[str], built: _Built, checkpoint: Checkpoint | None, plan: PlannedCheckpoint | None
) -> str | None:
    if checkpoint is None:
        return None
    try:
        plan = plan or planned(checkpoint, built.model_config.trust_remote_code)
    except InputError as error:
        _log.warning(
            "FlashNorm: whether adapters belong to the folds of %s is not checked (%s)", built.model_config.model, error
        )
        return None
    return plan.keep_all_but(norms, Kept("it has its weight")).plan.folds_hash()


def _with_adapter_check(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around the loading of a LoRA adapter: refuse an adapter that was trained on the model before its conversion.

    The other way round as well: one that belongs to a folded model, on a model that is not folded.
    """

    def load_adapter(*args: Any, **kwargs: Any) -> Any:
        given, unknown = bound(original, vllm.LOAD_ADAPTER.parameters, args, kwargs)
        built = _BUILT.get(vllm.base_of_adapters(given["self"]))
        if built is not None:
            if unknown and built.norms:
                raise _not_understood(built.model_config.model, original.__name__, unknown)
            path = vllm.adapter_folder(given["lora_request"]) / "adapter_config.json"
            if path.is_file() and (why := _adapter_refusal(built, read_json(path))):
                raise InputError(f"{path}: {why}")
        return original(*args, **kwargs)

    return load_adapter


def _adapter_refusal(built: _Built, adapter: dict[str, Any]) -> str | None:
    """Why a model refuses an adapter, given its adapter_config.json; None if it does not."""
    model = built.model_config.model
    if built.norms:
        return adapter_refusal(adapter, model, built.folds_hash)
    if _is_marked(built.model_config):  # a quantised model of another tool, whose norms are at their identity value
        return None
    return of_ordinary_model(adapter, model)
