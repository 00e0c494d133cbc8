"""Parses JSON of unknown origin: only an object that all readers understand alike, of harmless size and depth.

* A key that comes twice is refused: readers differ in which one they take, so another value might be used than checked.
* NaN and infinity are no JSON, but Python writes them and some configs have them (`time_step_limit`): they pass.
"""

import json
from typing import Any

# The safetensors library refuses larger headers. The same limit serves for other files.
MAX_BYTES = 100_000_000

# Python's recursion limit is some hundreds of levels, which our copies and comparisons should never come near.
MAX_DEPTH = 100


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the bytes are no JSON object, or not one that the module's docstring allows.
    """
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_twins)
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__} instead of a JSON object")
        _check_depth(data)
        # Lone surrogates are valid in JSON but not in text: a name with one could not be written again.
        json.dumps(data, ensure_ascii=False).encode()
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"nested too deeply, or too large ({type(error).__name__})") from error
    return data


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twin[:80]!r} twice in an object")
    return entries


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        values = (value for part in level for value in (part.values() if isinstance(part, dict) else part))
        level = [value for value in values if isinstance(value, (dict, list))]
