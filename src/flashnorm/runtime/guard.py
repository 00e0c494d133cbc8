"""Whether a model still is what was proven, asked before each use of the fused kernels.

* A fast path passes over the modules that it stands for. So what they are is written down when they are proven: their
  classes, settings and submodules. Anything replaced, added, hooked, patched or put into training mode is a change.
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
from flashnorm.compat.torch import children, forward_hooks, has_hooks, surroundings

_log = logging.getLogger("flashnorm")
_said: set[tuple[str, str]] = set()

# The `forward` of each class when a module of that class was first proven in this process.
_forwards: dict[type[nn.Module], Any] = {}

_PLAIN = (bool, int, float, str, type(None))
_MISSING = object()


def remark(what: str, reason: str) -> None:
    """Log a warning that a model's own code runs where the kernels were meant to; once for each reason."""
    if (what, reason) not in _said:
        _said.add((what, reason))
        _log.warning("flashnorm: %s: %s", what, reason)


class Substitute:
    """What this package puts into the place of a model's method."""


@dataclass(frozen=True)
class _Part:
    """A module as it was.

    Attributes:
        name: within the module that is guarded.
        module, kind: itself and its class.
        keys: the names of all that was set on it, and of what this package sets.
        plain: its settings that are numbers, words or flags.
        others: its other attributes, but for what `nn.Module` keeps for itself.
        children: its submodules by name.
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
        """What is not as it was; None if nothing is."""
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
        """Whether someone wants to see or change what the module computes."""
        hooks = forward_hooks(self.module)
        if has_hooks(self.module) or (hooks and not all(map(_is_idle, hooks.values()))):
            return f"there is a hook on {self.called}"
        return None

    @property
    def called(self) -> str:
        """Its name without numbers, so that a remark about every layer is one."""
        parts = [part for part in self.name.split(".") if not part.isdigit()]
        return ".".join(parts) or f"the {self.kind.__name__}"


_OURS = Substitute()


def _is_idle(hook: object) -> bool:
    """Transformers leaves its own hooks where they are.

    What layers return can be recorded of any forward; an embedding has no gradients where nothing has, as in a loop.
    """
    if generation.only_wants_gradients(hook):
        return True
    if not generation.is_recording(hook):
        return False
    return all(name.lstrip("_").startswith("hidden_states") for name in generation.recorded())


class Guard:
    """A module, with all below it, as it was when something was proven of it.

    Args:
        module: as it is proven.
        calls_root: whether the fast path stands for the module's `forward`, which is then called as ever, hooks
            included; else for something that would call the module.
        config: a Transformers config that the proof relied on, if any.
    """

    def __init__(self, module: nn.Module, *, calls_root: bool, config: Any = None):
        self._parts = [_Part.of(name, part) for name, part in module.named_modules()]
        self._hooked = self._parts[1:] if calls_root else self._parts
        self._config, self._settings = config, copy.deepcopy(_settings(config))
        self._versions = _versions()
        self._trust_classes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model may have been pickled by another version of what it was proven with."""
        vars(self).update(state)
        self._trust_classes()

    def change(self) -> str | None:
        """Why what was proven may not hold, or may not be used just now; None if it holds."""
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
