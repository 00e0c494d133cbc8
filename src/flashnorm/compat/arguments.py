"""The arguments of an upstream's function that FlashNorm wraps or replaces."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any


def bound(
    function: Callable[..., Any], known: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A call's arguments under the names that the function itself gives them, by position or by name.

    Args:
        function: the upstream's function, whose signature is used.
        known: names of the parameters that the caller understands.
        args, kwargs: the arguments of the call.

    Returns:
        The known arguments that were given; and the names of the unknown ones. An unknown argument that is given its
        default value is left out, because it changes nothing.

    Raises:
        TypeError: the function does not accept these arguments.
    """
    signature = inspect.signature(function)
    arguments: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= {key: given for key, given in value.items() if key in known}
            unknown += [key for key in value if key not in known]
        elif parameter.kind is parameter.VAR_POSITIONAL:
            unknown += [f"*{name}"]
        elif name in known:
            arguments[name] = value
        elif value is not parameter.default:
            unknown.append(name)
    return arguments, unknown
