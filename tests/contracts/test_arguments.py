"""`compat.arguments.bound`: a call's arguments as the wrapped function understands them."""

from typing import Any

import pytest

from flashnorm.compat.arguments import bound

KNOWN = ("a", "b")


def function(a: Any, *rest: Any, b: Any = None, c: Any = None, **others: Any) -> None:
    """What is wrapped."""


@pytest.mark.parametrize(
    ("args", "kwargs", "given", "unknown"),
    [
        ((1,), {}, {"a": 1}, []),
        ((), {"b": 2, "a": 1}, {"a": 1, "b": 2}, []),
        ((1,), {"c": None}, {"a": 1}, []),  # at its default
        ((1,), {"c": 3}, {"a": 1}, ["c"]),
        ((1, 2), {}, {"a": 1}, ["*rest"]),
        ((1,), {"d": 4, "c": 3}, {"a": 1}, ["c", "d"]),
    ],
)
def test_bound(args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any], unknown: list[str]) -> None:
    assert bound(function, KNOWN, args, kwargs) == (given, unknown)


def test_what_the_function_does_not_take() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'a'"):
        bound(function, KNOWN, (), {"b": 1})
