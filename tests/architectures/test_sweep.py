"""Model types that transformers knows, examined again: `docs/architectures.md` says what is so.

All causal language models, and of the other families one type in five: a whole sweep takes as long as all other tests
together. `make architectures` makes one, and what it changes in the table is what has changed.

With another transformers than a table's, types may have come and gone; then only a wrong fold fails.
"""

import resource
from collections.abc import Iterator

import pytest

from architectures import sweep

COMMITTED = sweep.read_document(sweep.TABLE.read_text())[0]
TYPES = [(name, model_type) for name in sweep.FAMILIES for model_type in sweep.FAMILIES[name].model_types()]
CAUSAL = [(name, model_type) for name, model_type in TYPES if name == "causal-lm"]
EXAMINED = CAUSAL + [pair for pair in TYPES if pair not in CAUSAL][::5]


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """As in the sweep's own processes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (sweep.MOST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(("name", "model_type"), EXAMINED)
def test_the_table_says_what_is_found(name: str, model_type: str) -> None:
    row = sweep.examine(name, model_type)
    found = row.cells()
    assert row.status != sweep.WRONG, found
    if COMMITTED[name].made_with != sweep.MADE_WITH:
        return
    expected = next(row for row in COMMITTED[name].rows if row[0] == model_type)
    for cells in (found, expected):
        cells[sweep.ERROR] = ""  # differs between machines, up to the limit that makes a type wrong
    assert found == expected, "run `make architectures`"


@pytest.mark.parametrize("name", sweep.FAMILIES)
def test_the_table_has_every_type_and_right_totals(name: str) -> None:
    family, table = sweep.FAMILIES[name], COMMITTED[name]
    if table.made_with != sweep.MADE_WITH:
        pytest.skip(f"the table was made with {table.made_with}")
    assert [row[0] for row in table.rows] == family.model_types()
    counts = [sum(row[sweep.STATUS] == status for row in table.rows) for status in sweep.STATUSES]
    assert sweep.line([family.title, str(len(table.rows)), *map(str, counts)]) in sweep.TABLE.read_text()


def test_the_document_is_read_as_it_is_written() -> None:
    text = sweep.TABLE.read_text()
    assert sweep.document(*sweep.read_document(text)) == text
