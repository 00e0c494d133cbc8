"""Checks before each use of the fused kernels that the model still is the one that was proven.

* The kernels bypass the modules that they replace, and so would miss a change of them. The classes, settings and
  submodules of these modules are therefore recorded when they are proven. A module that is replaced, added, hooked,
  patched or put into training mode counts as a change.
* A change is no error: the model's own code runs, and `remark` says so once.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from flashnorm.compat import generation
from flashnorm.compat.torch import children, forward_hooks, other_hooks, surroundings

_log = logging.getLogger("flashnorm")
_said: set[tuple[str, str]] = set()

# Class -> its `forward` when a module of that class was first proven in this process.
_forwards: dict[type[nn.Module], Any] = {}

_PLAIN = (bool, int, float, str, type(None))
_MISSING = object()


def remark(what: str, reason: str) -> None:
    """Log a warning, once for each reason, that a model's own code runs instead of the kernels."""
    if (what, reason) not in _said:
        _said.add((what, reason))
        _log.warning("flashnorm: %s: %s", what, reason)


class Substitute:
    """An object that this package puts in the place of a model's method."""


def restore(model: nn.Module) -> None:
    """Take all substitutes out of a model."""
    for module in model.modules():
        for name in ("forward", "generate"):
            if isinstance(vars(module).get(name), Substitute):
                del vars(module)[name]


@dataclass(frozen=True)
class _Part:
    """The record of one module at the time of the proof.

    Attributes:
        name: the module's name within the guarded module.
        module, kind: the module and its class.
        keys: names of the attributes that were set on the module, and of those that this package sets.
        plain: attributes that are numbers, strings, flags or None.
        others: all other attributes, except those of `nn.Module` itself.
        children: the submodules by name.
    """

    name: str
    module: nn.Module
    kind: type[nn.Module]
    keys: frozenset[str]
    plain: tuple[tuple[str, Any], ...]
    others: tuple[tuple[str, Any], ...]
    children: dict[str, nn.Module | None]

    @staticmethod
    def of(name: str, module: nn.Module) -> "_Part":
        ignored = {"training", "forward", "generate", *generation.INDIFFERENT_ATTRIBUTES}
        settings = [(k, v) for k, v in vars(module).items() if not k.startswith("_") and k not in ignored]
        return _Part(
            name=name,
            module=module,
            kind=type(module),
            keys=frozenset(vars(module)) | ignored,
            plain=tuple((key, value) for key, value in settings if isinstance(value, _PLAIN)),
            others=tuple((key, value) for key, value in settings if not isinstance(value, _PLAIN)),
            children=dict(children(module)),
        )

    def change(self) -> str | None:
        """What has changed since the proof, in words; None if nothing has."""
        module, kind = self.module, self.kind
        state = vars(module)
        if type(module) is not kind:
            return f"{self.called} is a {type(module).__name__} now"
        if kind.forward is not _forwards.get(kind):
            return f"the class {kind.__name__} has another forward now"
        if not isinstance(state.get("forward", _OURS), Substitute):
            return f"{self.called} has a forward of its own"
        if state["training"]:
            return "it is in training mode"
        if not state.keys() <= self.keys:
            for key in state.keys() - self.keys:
                if getattr(kind, key, state[key]) is not state[key]:
                    return f"{self.called} has a {key} of its own"
        for key, value in self.plain:
            if (setting := state.get(key, _MISSING)) is not value and setting != value:
                return f"{key} of {self.called} was changed"
        for key, value in self.others:
            if state.get(key, _MISSING) is not value:
                return f"{key} of {self.called} was replaced"
        found = children(module)
        if len(found) != len(self.children):
            return f"{self.called} has more submodules, or fewer"
        for key, child in self.children.items():
            if found.get(key, _MISSING) is not child:
                return f"{key} of {self.called} was replaced"
        return None

    def hooks(self) -> str | None:
        """The reason, if a hook may read or change what the module computes; None if there is no such hook."""
        others = other_hooks(self.module)
        if any(map(_wants_all, others)) or not all(map(_is_idle, forward_hooks(self.module).values())):
            return f"there is a hook on {self.called}"
        return None

    @property
    def called(self) -> str:
        """The module's name without numbers, so that the same remark about every layer is logged once."""
        parts = [part for part in self.name.split(".") if not part.isdigit()]
        return ".".join(parts) or f"the {self.kind.__name__}"


_OURS = Substitute()


def _wants_all(hook: object) -> bool:
    """Whether a hook on inputs or gradients may matter: not if it is for embeddings alone, which kernels never take."""
    return not getattr(hook, "for_embeddings", False)


def _is_idle(hook: object) -> bool:
    """Whether a hook does nothing that the kernels would bypass.

    Transformers does not remove its own hooks. Those that record hidden states work with any forward, and the one on
    the embedding only matters for gradients, of which there are none when the kernels run.
    """
    if generation.only_wants_gradients(hook):
        return True
    if not generation.is_recording(hook):
        return False
    return all(name.lstrip("_").startswith("hidden_states") for name in generation.recorded())


class Guard:
    """The record of a module and all its submodules at the time of the proof.

    Args:
        module: the module that was proven.
        calls_root: whether only the module's `forward` is replaced. The module is then called as usual, and its own
            hooks run; otherwise its hooks count as well.
        config: the Transformers config that the proof relied on, if any.
    """

    def __init__(self, module: nn.Module, *, calls_root: bool, config: Any = None):
        self._parts = [_Part.of(name, part) for name, part in module.named_modules()]
        self._hooked = self._parts[1:] if calls_root else self._parts
        self._config, self._settings = config, copy.deepcopy(_settings(config))
        self._versions = _versions()
        self._trust_classes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled guard; `change` notices if the model was proven with other versions."""
        vars(self).update(state)
        self._trust_classes()

    def change(self) -> str | None:
        """Why the proof may not hold any more, or the kernels may not be used at the moment; None if they may."""
        if (reason := surroundings()) is not None:
            return reason
        for part in self._parts:
            if (reason := part.change()) is not None:
                return reason
        for part in self._hooked:
            if (reason := part.hooks()) is not None:
                return reason
        settings = _settings(self._config)
        if settings != self._settings:
            names = sorted(key for key, value in settings.items() if self._settings.get(key, _MISSING) != value)
            return f"{', '.join(names) or 'something'} in its config was changed"
        if self._versions != (versions := _versions()):
            return f"it was optimized with {self._versions}, and this is {versions}; call flashnorm.optimize again"
        return None

    def _trust_classes(self) -> None:
        for part in self._parts:
            _forwards.setdefault(part.kind, part.kind.forward)


def _settings(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    return {key: value for key, value in vars(config).items() if key not in generation.INDIFFERENT_SETTINGS}


def _versions() -> str:
    return f"torch {torch.__version__} and transformers {transformers.__version__}"
