"""Adapters (PEFT) on folded models: those of the model before it was folded are refused, as they would be wrong.

An adapter reads the norms' outputs. Those of a folded model lack the gains, so one that was trained with them gives
other results, without any error. One that was trained on the folded model is right, and so is any that reads no folded
norm (prompts; LoRA of other linears; IA3 where it scales a linear's outputs, or inputs that are no folded norm's).

* Who trained it is told by its `base_model_name_or_path`, which PEFT takes from the model. A model that was folded in
  memory has no checkpoint to name; its name gets an ending, so that its adapters are not taken for the source's.
* PEFT and Transformers have no place to object to an adapter. But they set the mode of the model (`train`, `eval`) once
  it is loaded, and before they train it; what comes without that is noticed by the folded norms, which run in every
  forward that is not fused, and nothing is fused that has an adapter.
"""

import copy
import inspect
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashnorm.compat import peft
from flashnorm.errors import InputError
from flashnorm.trace.models import on_meta

# The ending of the name of a model that was folded in memory. No path and no hub id ends so.
FOLDED = "#flashnorm"


# Arguments of `load_adapter` that tell where the adapter's files are.
_WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
_TRIED = "tried"


def adapter_refusal(adapter: Mapping[str, Any], model: str) -> str | None:
    """Why an adapter cannot be used with a folded model, or None.

    It must have been trained on this model, or have been folded itself.

    Args:
        adapter: its `adapter_config.json`.
        model: the checkpoint's folder or hub id, or the name of a model that was folded in memory.
    """
    base = adapter.get("base_model_name_or_path")
    if adapter.get("flashnorm"):
        return None
    if isinstance(base, str) and (base.endswith(FOLDED) or _same_place(base, model)):
        return None
    return (
        f"expected an adapter for {model}, found one for {base!r}; one that was trained on the model before its "
        "conversion gives wrong results here, as its inputs lack the norms' gains: use that model, or train the "
        f'adapter on this one. If it was, set "base_model_name_or_path" to "{model}" in its adapter_config.json, or '
        f'end it with "{FOLDED}"'
    )


def _same_place(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters of another model that read a folded norm. Costs next to nothing where there is no new adapter.

    Args:
        model: any; nothing is checked if it was not folded by `flashnorm.load` or `flashnorm.fold_`.

    Raises:
        InputError: there is one.
    """
    if (guard := getattr(vars(model).get("train"), "__self__", None)) is not None:
        guard.check()


def guard_adapters(model: nn.Module, norms: Collection[str], linears: Collection[str]) -> None:
    """Have a folded model refuse adapters that were trained on the model before.

    Args:
        model: in memory, folded.
        norms: names of the parameters that were folded.
        linears: names of the parameters that took them.
    """
    owners = [name.rpartition(".")[0] for name in norms]
    guard = _Guard(model, {*owners, *(name.rpartition(".")[0] for name in linears)})
    vars(model)["train"] = guard.train
    if hasattr(model, "load_adapter"):
        vars(model)["load_adapter"] = guard.load_adapter
    stacks: set[str] = set()
    for name in owners:
        norm: Any = model.get_submodule(name)
        if hasattr(norm, "guard"):
            norm.guard = guard.check
        elif (stack := re.split(r"\.\d+\.", name)[0]) not in stacks:
            # Such models are never fused, so the first norm of a stack of layers runs in every forward.
            stacks.add(stack)
            norm.register_forward_pre_hook(guard)


class _Guard:
    """Looks at the adapters of a model; stands in for its `train` and its `load_adapter`."""

    def __init__(self, model: nn.Module, folded: set[str]):
        self._model: Any = model
        self._folded = folded
        self._inner = getattr(model, "base_model_prefix", "")
        self._accepted: dict[str, Any] = {}
        self._vouched = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Guard":
        """A copy of the model has a guard of its own; PEFT's copy of a norm (`modules_to_save`) keeps this one."""
        if id(self._model) not in memo:
            return self
        copied = memo[id(self)] = copy.copy(self)
        copied._model, copied._accepted = memo[id(self._model)], {}
        return copied

    def __call__(self, *args: Any) -> None:
        """As a hook before a norm's forward."""
        if not torch.compiler.is_compiling():
            self.check()

    def train(self, mode: bool = True) -> Any:
        """`nn.Module.train`, which `eval` calls as well, as PEFT does when an adapter is loaded."""
        self.check()
        return type(self._model).train(self._model, mode)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `load_adapter`. Raises `InputError` before it is in the model, if it would be wrong."""
        load = type(self._model).load_adapter
        given = inspect.signature(load).bind_partial(self._model, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        config, self._vouched = given.get("peft_config"), False
        if config is None and given.get("peft_model_id") is not None:
            config, self._vouched = _read_config(given)
        try:
            if config is not None:
                self._try(config)
            return load(self._model, *args, **kwargs)
        finally:
            self._vouched = False

    def _try(self, config: Any) -> None:
        """Refuse an adapter before it is in the model: which modules it takes is seen on a copy without values."""
        from peft import inject_adapter_in_model

        if self._vouched or not (refusal := self._refusal(config)):
            return
        memo: dict[int, Any] = {id(t): on_meta(t) for t in (*self._model.parameters(), *self._model.buffers())}
        blank = copy.deepcopy(self._model, memo)
        inject_adapter_in_model(copy.deepcopy(config), blank, _TRIED)
        if self._reads_folded(blank, _TRIED, config):
            raise InputError(f"adapter: {refusal}")

    def check(self) -> None:
        """Raise `InputError` if there is an adapter that would be wrong."""
        for name, config in self._configs().items():
            if self._accepted.get(name) is not config:
                refusal = None if self._vouched else self._refusal(config)
                if refusal and self._reads_folded(self._model, name, config):
                    raise InputError(f"adapter {name!r}: {refusal}")
                self._accepted[name] = config

    def _configs(self) -> Mapping[str, Any]:
        """PEFT's configs of the adapters that are in the model, or in the model without its head."""
        own = self._model.__dict__
        if (found := own.get("peft_config")) is None:
            inner = own["_modules"].get(self._inner)
            found = None if inner is None else inner.__dict__.get("peft_config")
        return found or {}

    def _refusal(self, config: Any) -> str | None:
        base = config.base_model_name_or_path
        if base is None and not config.inference_mode:  # made here, to be trained
            return None
        name = getattr(self._model, "name_or_path", "") or type(self._model).__name__
        return adapter_refusal({"base_model_name_or_path": base}, name)

    def _reads_folded(self, model: Any, name: str, config: Any) -> bool:
        """Whether an adapter changes a folded norm, or a linear that took a gain, in more than the linear's scale."""
        if getattr(config, "bias", "none") == "all":  # some may have taken a norm's bias
            return True
        return any(
            peft.holds(wrapper, name) and getattr(wrapper, "is_feedforward", True)  # IA3, where it scales outputs
            for path in self._folded
            for wrapper in peft.wrappers(model, path)
        )


def _read_config(given: Mapping[str, Any]) -> tuple[Any, bool]:
    """The config of the adapter that `load_adapter` was given, None if there is none; whether it says "flashnorm".

    PEFT's config has no place for that key.
    """
    from peft import PeftConfig

    where = {name: given[name] for name in _WHERE if given.get(name) is not None}
    found = peft.config_file(str(given["peft_model_id"]), **(where | (given.get("adapter_kwargs") or {})))
    if found is None:
        return None, False
    said = json.loads(Path(found).read_bytes())
    return PeftConfig.from_pretrained(os.path.dirname(found)), bool(said.get("flashnorm"))
