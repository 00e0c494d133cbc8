"""Which way imports run in src/flashnorm: one way only, imports for types and inside functions among them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import flashnorm

ROOT = Path(flashnorm.__file__).parent

# Each room knows the rooms above it and itself, and no other.
ROOMS = [
    {"version", "errors", "progress", "arithmetic"},
    {"compat", "means", "plan", "workers"},
    {"removable"},
    {"format"},
    {"files", "hub"},
    {"trace"},
    {"planning"},
    {"decoding"},
    {"cpu"},
    {"gpu"},
    {"models"},
    {"verify"},
    {"convert"},
    {"integrations"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
# What speeds up any model of Transformers knows nothing of folded ones.
_OF_CHECKPOINTS = {"plan", "removable", "format", "files", "hub", "trace", "planning"}
STRANGERS = {
    "decoding": _OF_CHECKPOINTS,
    "cpu": _OF_CHECKPOINTS,
    "gpu": _OF_CHECKPOINTS,
    "files": {"plan", "removable", "arithmetic", "means"},
}


def modules() -> dict[str, Path]:
    """`flashnorm.plan` -> its file; a package by its own name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in MODULES else str(node.module) for one in names}
    return (found & MODULES.keys()) - {name}


def room(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def test_every_module_is_in_a_room() -> None:
    known = set().union(*ROOMS)
    assert {room(name) for name in MODULES} == known


def test_imports_run_one_way() -> None:
    order = {name: number for number, names in enumerate(ROOMS) for name in names}
    upwards = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name)
        if room(name) != room(other)
        and (order[room(other)] >= order[room(name)] or room(other) in STRANGERS.get(room(name), ()))
    ]
    assert not upwards


def test_there_are_no_circles() -> None:
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()
