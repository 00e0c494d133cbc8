"""The calls with which to trace a Transformers model; a method's arguments are chosen by the names of its parameters.

The first call is the forward, with the inputs that it needs. A model that takes more than text also has methods such as
`get_image_features`. They are called as well, and what they return counts as an output of the model: so the image tower
is traced without placing images among the tokens. Where only the base model has such a method, the forward is tried
with images first.
"""

import inspect
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from flashnorm.errors import InputError
from flashnorm.trace.inputs.layouts import Arguments, Layout, layouts_of
from flashnorm.trace.inputs.sizes import configs_in

# How many combinations of layouts are tried at most.
_MOST_ALTERNATIVES = 32

_FEATURES = re.compile(r"get_([a-z]+)_features")


@dataclass(frozen=True)
class ExampleCall:
    """A method of the model, with alternative sets of keyword arguments; the first set that works is used.

    If none works, the calls `instead` are made in its place.
    """

    method: str
    alternatives: tuple[Arguments, ...]
    positional: tuple[Any, ...] = ()
    instead: tuple["ExampleCall", ...] = ()

    def run(self, model: nn.Module, arguments: Arguments) -> Any:
        """Call the method with one of the alternatives."""
        method = model if self.method == "forward" else _method(model, self.method)
        return method(*self.positional, **arguments)


def _method(model: Any, name: str) -> Callable[..., Any]:
    """A method of the model, or of the base model if the model itself has none of that name."""
    return getattr(model, name, None) or getattr(model.base_model, name)


def example_calls(model: nn.Module) -> list[ExampleCall]:
    """The calls that together run a Transformers model's code. The first is its forward.

    Raises:
        InputError: the model is no Transformers model, or no known inputs fit its forward.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"expected a transformers model, found {type(model).__name__}: pass example_inputs, the arguments of its "
            "forward"
        )
    kinds = layouts_of(model.config, model.dtype)
    main = [model.main_input_name] if isinstance(model.main_input_name, str) else model.main_input_name
    takes = inspect.signature(model.forward).parameters
    needed = {*main, *_required(takes)}
    needs = {
        kind
        for kind, layouts in kinds.items()
        if any((needed if kind == "text" else needed - {"input_ids"}) & {*one.tensors, *one.spare} for one in layouts)
    }

    def forwards(wanted: Collection[str]) -> list[Arguments]:
        """The alternatives for the forward with inputs of some kinds besides text."""
        alternatives = _alternatives(takes, {kind: kinds[kind] for kind in kinds if kind in {"text", *wanted}})
        return _without_cache(takes, alternatives) if has_cache else alternatives

    has_cache = any(getattr(part, "use_cache", False) for _, part in configs_in(model.config))
    least, most = forwards(needs), forwards(kinds)
    if not least and not most:
        raise InputError(
            f"expected a model whose inputs are known, found {type(model).__name__}, whose forward needs "
            f"{', '.join(sorted(needed))}: pass example_inputs"
        )
    methods = _feature_methods(model)
    calls = [ExampleCall("forward", (*least, *most)), *(_features(model, name, kinds) for name in methods)]
    shown = {"text", *needs, *map(_kind, methods)}
    given = {*most[0]} - {"input_ids"} if most else set()
    hidden = {kind for kind in kinds if any(given & {*one.tensors} for one in kinds[kind])} - shown
    if hidden:
        # No other call shows what the forward does with inputs of these kinds (cross-attention, say).
        inner = [name for name in _feature_methods(model.base_model) if _kind(name) in hidden]
        instead = [_features(model, name, kinds) for name in inner] if {*map(_kind, inner)} == hidden else []
        calls.append(ExampleCall("forward", tuple(forwards({*needs, *hidden})), instead=tuple(instead)))
    return calls


def _feature_methods(model: nn.Module) -> list[str]:
    return [name for name in dir(type(model)) if _FEATURES.fullmatch(name)]


def _kind(method: str) -> str:
    """The kind of input that a method such as `get_image_features` is for."""
    return method.split("_")[1]


def _features(model: PreTrainedModel, method: str, kinds: Mapping[str, Sequence[Layout]]) -> ExampleCall:
    return ExampleCall(method, tuple(_alternatives(_parameters(model, method), kinds)))


def _parameters(model: PreTrainedModel, name: str) -> Mapping[str, inspect.Parameter]:
    """A method's parameters; with those of the base model's method, if the model's own hands on whatever it gets."""
    own = inspect.signature(_method(model, name)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()) and hasattr(model.base_model, name):
        return {**inspect.signature(getattr(model.base_model, name)).parameters, **own}
    return own


def _required(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    return {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def _alternatives(names: Mapping[str, inspect.Parameter], kinds: Mapping[str, Sequence[Layout]]) -> list[Arguments]:
    """Every combination of layouts, one of each kind, that provides every argument that a method requires.

    Args:
        names: the method's parameters.
        kinds: the layouts of each kind of input.
    """
    required = _required(names)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    options: list[list[Arguments]] = []
    for kind, layouts in kinds.items():
        fitting: list[Arguments] = []
        for one in layouts:
            if not names.keys() & (one.marks or one.tensors.keys()):
                continue
            given = {name: tensor for name, tensor in one.tensors.items() if name in names}
            # If the method takes token ids, `attention_mask` belongs to them.
            spares = one.spare.keys() - ({"attention_mask"} if kind != "text" and "input_ids" in names else set())
            for spare in (required, names, spares if open_ended and kind != "text" else ()):
                fitting.append(given | {name: one.spare[name] for name in one.spare if name in spares & {*spare}})
        # Without token ids, embeddings may stand for something else (an image's features, say).
        optional = kind == "text" and "input_ids" not in names
        options.append([*fitting, {}] if optional or not fitting else fitting)
    found: dict[frozenset[tuple[str, int]], Arguments] = {}
    for parts in itertools.islice(itertools.product(*options), _MOST_ALTERNATIVES * 8):
        arguments = {name: tensor for part in parts for name, tensor in part.items()}
        if required <= arguments.keys():
            found.setdefault(frozenset((name, id(tensor)) for name, tensor in arguments.items()), arguments)
    return list(itertools.islice(found.values(), _MOST_ALTERNATIVES))


def _without_cache(parameters: Mapping[str, inspect.Parameter], alternatives: list[Arguments]) -> list[Arguments]:
    """The alternatives without a cache: a cache would hide what becomes of the tensors that are written into it.

    A forward that takes any keyword may pass `use_cache` on to a module that knows it, or to one that does not. So the
    unchanged alternatives follow.
    """
    without: list[Arguments] = [{**arguments, "use_cache": False} for arguments in alternatives]
    if "use_cache" in parameters:
        return without
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return without + alternatives if takes_any else alternatives
