"""The table in docs/runtimes.md: rows that were run replace those of the same way and form; the others stay."""

from pathlib import Path

from .compare import TOKENS, Comparison

PAGE = Path(__file__).parents[2] / "docs" / "runtimes.md"
BEGIN, END = "<!-- make runtimes -->", "<!-- end -->"
NOISE = 1e-8  # of a KL divergence between log-probabilities in float32
NOT_RUN = "not run"
FIRST = ["runtime", "form of the folder", "version"]


def cell(result: Comparison | str) -> str:
    """What is said of one model in one runtime."""
    if isinstance(result, str):
        return result.replace("|", "\\|").replace("<", "&lt;")
    words = [f"{'same' if result.ok else 'DIFFERENT'}: {result.same} of {TOKENS} tokens"]
    words += ["KL < 1e-8" if result.kl < NOISE else f"KL {result.kl:.0e}", f"{result.largest:.0e}"]
    if result.gains:
        words.append(f"gains {result.gains[0]} → {result.gains[1]}")
    return ", ".join(words)


def rows_of(page: str) -> dict[tuple[str, str], list[str]]:
    """Name and form -> cells, of the table in a page."""
    _, _, rest = page.partition(BEGIN)
    lines = [line for line in rest.partition(END)[0].splitlines() if line.startswith("| ")]
    cells = [[part.strip() for part in line[2:-2].split(" | ")] for line in lines]
    return {(row[0], row[1]): row for row in cells[1:]}


def with_rows(
    page: str, models: list[str], rows: dict[tuple[str, str], list[str]], order: list[tuple[str, str]]
) -> str:
    """A page with its table's rows in the given order. What is not in `rows` was not run; what is in no order goes."""
    before, _, rest = page.partition(BEGIN)
    table = ["| " + " | ".join([*FIRST, *models]) + " |", "|" + "---|" * (len(FIRST) + len(models))]
    nothing = ["", *[NOT_RUN] * len(models)]
    table += ["| " + " | ".join(rows.get(key, [*key, *nothing])) + " |" for key in order]
    return "\n".join([before + BEGIN, "", *table, "", END + rest.partition(END)[2]])
