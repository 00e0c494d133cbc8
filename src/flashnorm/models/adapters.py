"""Adapters (PEFT) on folded models: an adapter that was trained before the model was folded is refused.

An adapter reads the norms' outputs, and in a folded model these outputs lack the gains. An adapter that was trained
with the gains would therefore give wrong results without any error. An adapter is right if it was trained on the folded
model, or if it reads no folded norm (prompts; LoRA of other linear layers; IA3 where it scales a linear layer's
outputs, or inputs that do not come from a folded norm).

`flashnorm adapter` (`convert/adapter.py`) makes an adapter of the source fit.

* The adapter's `base_model_name_or_path`, which PEFT takes from the model, says which model it was trained on. A model
  that was folded in memory has no checkpoint to name, so an ending is added to its name: its adapters are then not
  mistaken for the source's. Where the base is a folder, the adapter's `revision` says which folds it had.
* PEFT and Transformers offer no hook that could refuse an adapter, but both set the model's mode (`train`, `eval`)
  after they load an adapter and before they train it, so the check runs there. If the mode is not set, the folded norms
  notice the adapter: they run in every forward that is not fused, and a model with an adapter is never fused.
"""

import copy
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashnorm.compat import peft
from flashnorm.errors import InputError
from flashnorm.files.reader import read_json
from flashnorm.format import (
    ADAPTER_MARK,
    CONFIG_FLAGS,
    FOLDED_BASE,
    base_revision,
    names_folds,
    other_folds,
)
from flashnorm.models.cancelled import CancelledNorm, compute_norms
from flashnorm.models.centred import CentredNorm, subtract_means
from flashnorm.plan import FoldPlan
from flashnorm.trace.build import on_meta

# Arguments of `load_adapter` that say where the adapter's files are.
_WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
_TRIED = "tried"


def adapter_refusal(adapter: Mapping[str, Any], model: str, folds_hash: str | None = None) -> str | None:
    """Why an adapter cannot be used with a folded model, or None if it can.

    An adapter can be used if it was trained on this folded model, or if its config says that it belongs to a folded
    model, with the same folds.

    Args:
        adapter: the adapter's `adapter_config.json`.
        model: the checkpoint's folder or hub id, or the name of a model that was folded in memory.
        folds_hash: `FoldPlan.folds_hash` of the model; None if it is not known.
    """
    base = adapter.get("base_model_name_or_path")
    if folds_hash is not None and other_folds(adapter, folds_hash):
        return (
            f"expected an adapter for the folds of {model}, found one for other folds ({base!r}), as other options of "
            f"the conversion make them, or another model; convert it again with `--folded {model}`"
        )
    if adapter.get(ADAPTER_MARK) or (isinstance(base, str) and _same_place(base, model)):
        return None
    # The base was folded in memory, or its folder is elsewhere now. A folder that is there is another model.
    if names_folds(adapter) and not os.path.isdir(str(base)):
        return None
    return (
        f"expected an adapter for {model}, found one for {base!r}; one that was trained on the model before its "
        "conversion gives wrong results here, as its inputs lack the norms' gains: convert it with `flashnorm adapter "
        f"ADAPTER {base or 'SOURCE'} OUT_ADAPTER`, or train the adapter on this model. If it was, set "
        f'"base_model_name_or_path" to "{model}" in its adapter_config.json, or end it with "{FOLDED_BASE}"'
    )


def of_ordinary_model(adapter: Mapping[str, Any], model: str) -> str | None:
    """Why an adapter cannot be used with a model that is not folded, or None if it can.

    Args:
        adapter: the adapter's `adapter_config.json`.
        model: the model's folder or hub id.
    """
    if not (adapter.get(ADAPTER_MARK) or names_folds(adapter)):
        return None
    return (
        f"expected an adapter for {model}, which is not folded, found one for a folded model "
        f"({adapter.get('base_model_name_or_path')!r}); use it with that model, or the adapter that it was converted "
        f'from with this one. If {model} is folded, its config.json lacks "{CONFIG_FLAGS[0]}": true'
    )


def _same_place(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))


def guard_adapters(
    model: nn.Module,
    plan: FoldPlan,
    norms: Iterable[str],
    widest: FoldPlan,
    folded_with_it: Mapping[str, Any] | None = None,
) -> None:
    """Make a folded model refuse adapters that were trained before it was folded, or belong to other folds.

    Args:
        model: the folded model, in memory.
        plan: what was folded.
        norms: the folded norms' parameters, under all their names.
        widest: what could be folded without any option that keeps norms.
        folded_with_it: PEFT's configs of the adapters that were folded together with the model, by name.
    """
    owners = [_owner(name) for name in norms]
    folded = {*owners, *_linears(plan)}
    foldable = {*folded, *_linears(widest), *map(_owner, widest.kept), *_embeddings(model)}
    guard = _Guard(model, folded, foldable, plan.folds_hash())
    guard.accept(folded_with_it or {})
    vars(model)["train"] = guard.train
    if hasattr(model, "load_adapter"):
        vars(model)["load_adapter"] = guard.load_adapter
    stacks: set[str] = set()
    owners += [name for name, module in model.named_modules() if isinstance(module, CentredNorm | CancelledNorm)]
    for name in dict.fromkeys(owners):
        norm: Any = model.get_submodule(name)
        if hasattr(norm, "guard"):
            norm.guard = guard.check
        elif (stack := re.split(r"\.\d+\.", name)[0]) not in stacks:
            # A model with such norms is never fused, so the first norm of a stack of layers runs in every forward.
            stacks.add(stack)
            norm.register_forward_pre_hook(guard)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _linears(plan: FoldPlan) -> set[str]:
    return {_owner(linear.name) for fold in plan.folds for linear in fold.linears}


def _embeddings(model: nn.Module) -> set[str]:
    """The embedding and the output head: what folds into the head depends on whether they are tied."""
    ends: list[nn.Module] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # a plain module, or a model of images or audio
            continue
    return {name for name, module in model.named_modules() if any(module is end for end in ends)}


class _Guard:
    """Checks the adapters of a model; replaces the model's `train` and `load_adapter`.

    Args:
        model: the folded model.
        folded: paths of the modules that are folded: norms, and linear layers that took a gain.
        foldable: those that other options of the conversion could fold as well.
        folds_hash: the hash of the model's folds.
    """

    def __init__(self, model: nn.Module, folded: set[str], foldable: set[str], folds_hash: str):
        self._model: Any = model
        self._folded, self._foldable, self._hash = folded, foldable, folds_hash
        self._inner = getattr(model, "base_model_prefix", "")
        self._accepted: dict[str, Any] = {}
        self._said: Mapping[str, Any] | None = None  # the config's file of the adapter that is being loaded

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Guard":
        """A copy of the model has a guard of its own; PEFT's copy of a norm (`modules_to_save`) keeps this one."""
        if id(self._model) not in memo:
            return self
        copied = memo[id(self)] = copy.copy(self)
        copied._model, copied._accepted = memo[id(self._model)], {}
        return copied

    def accept(self, configs: Mapping[str, Any]) -> None:
        """Accept adapters that are known to be right, by their configs."""
        self._accepted |= configs

    def __call__(self, *args: Any) -> None:
        """The check, as a hook that runs before a norm's forward."""
        if not torch.compiler.is_compiling():
            self.check()

    def train(self, mode: bool = True) -> Any:
        """`nn.Module.train` after a check. `eval` calls it as well, and PEFT calls `eval` when it loads an adapter."""
        self.check()
        return type(self._model).train(self._model, mode)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `load_adapter`. Raises `InputError` before a wrong adapter is put into the model."""
        load = type(self._model).load_adapter
        given = inspect.signature(load).bind_partial(self._model, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        config = given.get("peft_config")
        if config is None and given.get("peft_model_id") is not None:
            config, self._said = _read_config(given)
        try:
            if config is not None:
                self._try(config)
            return load(self._model, *args, **kwargs)
        finally:
            self._said = None

    def _try(self, config: Any) -> None:
        """Refuse an adapter before it is in the model: a copy without values shows which modules it would change."""
        from peft import inject_adapter_in_model

        if (refused := self._refusal(config)) is None:
            return
        memo: dict[int, Any] = {id(t): on_meta(t) for t in (*self._model.parameters(), *self._model.buffers())}
        blank = copy.deepcopy(self._model, memo)
        inject_adapter_in_model(copy.deepcopy(config), blank, _TRIED)
        refusal, modules = refused
        if _changes(blank, _TRIED, config, modules):
            raise InputError(f"adapter: {refusal}")

    def check(self) -> None:
        """Raise `InputError` if the model has an adapter that would give wrong results."""
        for name, config in self._configs().items():
            if self._accepted.get(name) is not config:
                if (refused := self._refusal(config)) is not None:
                    refusal, modules = refused
                    if _changes(self._model, name, config, modules):
                        raise InputError(f"adapter {name!r}: {refusal}")
                # What an adapter writes is not centred, and may have biases.
                subtract_means(self._model)
                compute_norms(self._model)
                self._mark(config)
                self._accepted[name] = config

    def _mark(self, config: Any) -> None:
        """Write into the config of an adapter that is trained here which folds the model has, for when it is saved."""
        if not config.inference_mode and config.revision is None and config.base_model_name_or_path == self._name:
            config.revision = base_revision(self._name, self._hash)

    @property
    def _name(self) -> str:
        return getattr(self._model, "name_or_path", "") or type(self._model).__name__

    def _configs(self) -> Mapping[str, Any]:
        """PEFT's configs of the adapters in the model or, if it has none, in its base model (without the head)."""
        own = self._model.__dict__
        if (found := own.get("peft_config")) is None:
            inner = own["_modules"].get(self._inner)
            found = None if inner is None else inner.__dict__.get("peft_config")
        return found or {}

    def _refusal(self, config: Any) -> tuple[str, set[str]] | None:
        """Why an adapter is refused, and the modules of which it must change one for that; None if it is right."""
        base = config.base_model_name_or_path
        if base is None and not config.inference_mode:  # a new adapter, made here to be trained
            return None
        said = self._said or {"base_model_name_or_path": base, "revision": config.revision}
        if (refusal := adapter_refusal(said, self._name, self._hash)) is None:
            return None
        # What other options have folded is not known, so the adapter may be wrong in any module that they can fold.
        return refusal, self._foldable if other_folds(said, self._hash) else self._folded


def _changes(model: Any, name: str, config: Any, modules: Iterable[str]) -> bool:
    """Whether an adapter changes one of some norms and linear layers (scaling a layer's outputs is fine)."""
    if getattr(config, "bias", "none") == "all":  # some biases may have taken a norm's bias
        return True
    return any(
        peft.holds(wrapper, name) and getattr(wrapper, "is_feedforward", True)  # False: IA3 on outputs
        for path in modules
        for wrapper in peft.wrappers(model, path)
    )


def _read_config(given: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any] | None]:
    """The config of the adapter that `load_adapter` was given, and its file's content; (None, None) if there is none.

    The file has keys of ours, which PEFT's config object drops.
    """
    from peft import PeftConfig

    where = {name: given[name] for name in _WHERE if given.get(name) is not None}
    found = peft.config_file(str(given["peft_model_id"]), **(where | (given.get("adapter_kwargs") or {})))
    if found is None:
        return None, None
    said = read_json(Path(found))
    return PeftConfig.from_pretrained(os.path.dirname(found)), said
