"""The table in docs/runtimes.md: cells that were run replace those of the same way, form and model; the others stay."""

import re
from pathlib import Path
from typing import Any

from .compare import TOKENS, Comparison
from .table import Way

PAGE = Path(__file__).parents[2] / "docs" / "runtimes.md"
BEGIN, END = "<!-- make runtimes -->", "<!-- end -->"
NOISE = 1e-8  # of a KL divergence between log-probabilities in float32
NOT_RUN = "not run: not tried yet"
VERSION = "version"
FIRST = ["runtime", "form of the folder", VERSION, "by", "compared"]

# Of an error: folders of this machine, and colours.
_LOCAL = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+|\x1b?\[\d+m")


def cell(result: Comparison | str) -> str:
    """What is said of one model in one runtime."""
    if isinstance(result, str):
        return _LOCAL.sub("", result).replace("|", "\\|").replace("<", "&lt;")
    words = [f"{'same' if result.ok else 'DIFFERENT'}: {result.same} of {TOKENS} tokens"]
    words += ["KL < 1e-8" if result.kl < NOISE else f"KL {result.kl:.0e}", f"{result.largest:.0e}"]
    if result.gains:
        words.append(f"gains {result.gains[0]} → {result.gains[1]}")
    source, converted = result.notes
    if converted:
        words.append(f"{source} → {converted}" if source and source != converted else converted)
    return ", ".join(words)


def table_of(page: str, begin: str) -> list[list[str]]:
    """The lines of the table between a mark and the end mark, as cells; none if the page has no such table."""
    _, _, rest = page.partition(begin)
    lines = [line for line in rest.partition(END)[0].splitlines() if line.startswith("| ")]
    return [[part.strip() for part in line[2:-2].split(" | ")] for line in lines]


def put_table(page: str, begin: str, lines: list[list[str]]) -> str:
    """A page with another table between a mark and the end mark. Its first line is the head."""
    before, mark, rest = page.partition(begin)
    if not mark:
        raise ValueError(f"the page has no line {begin!r}")
    table = ["| " + " | ".join(line) + " |" for line in lines]
    table.insert(1, "|" + "---|" * len(lines[0]))
    return "\n".join([before + begin, "", *table, "", END + rest.partition(END)[2]])


def rows_of(page: str) -> dict[tuple[str, str], dict[str, str]]:
    """Name and form -> column -> cell, of the table of runtimes in a page."""
    head, *rows = table_of(page, BEGIN) or [[]]
    return {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}


def with_results(
    page: str, models: list[str], ways: list[Way], model: str, found: dict[tuple[str, str], tuple[str, Any]]
) -> str:
    """A page with new results of one model; what its table had of other models, ways and forms stays.

    Args:
        page: the text.
        models: names of the columns.
        ways: all of them, in the order of the rows. Rows of other names go.
        model: the column that gets the results.
        found: name and form -> version, and the comparison or a sentence.
    """
    rows, lines = rows_of(page), [[*FIRST, *models]]
    for way in ways:
        for key in ((way.name, form) for form in way.forms):
            row = dict.fromkeys(models, NOT_RUN) | {VERSION: ""} | rows.get(key, {})
            row |= dict(zip(FIRST, (*key, row[VERSION], way.calls, way.compared), strict=True))
            if key in found:
                version, result = found[key]
                row |= {VERSION: version or row[VERSION], model: cell(result)}
            lines.append([row[column] for column in (*FIRST, *models)])
    return put_table(page, BEGIN, lines)
