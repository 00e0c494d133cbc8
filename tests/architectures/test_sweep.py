"""Model types that transformers knows, examined again: `docs/architectures.md` says what is so.

All causal language models, and of the other families one type in five: a whole sweep takes as long as all other tests
together. `make architectures` makes one, and what it changes in the table is what has changed.

With another transformers than the table's, types may have come and gone; then only a wrong fold fails.
"""

import resource
from collections.abc import Iterator

import pytest
import transformers

from architectures import sweep

COMMITTED, VERSION = sweep.read_document(sweep.TABLE.read_text())
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
    if transformers.__version__ != VERSION:
        return
    expected = COMMITTED[name, model_type]
    for cells in (found, expected):
        cells[sweep.ERROR] = ""  # differs between machines, up to the limit that makes a type wrong
    assert found == expected, "run `make architectures`"


@pytest.mark.skipif(transformers.__version__ != VERSION, reason="another transformers than the table's")
def test_the_table_has_every_type_and_right_totals() -> None:
    assert COMMITTED.keys() == set(TYPES)
    text = sweep.TABLE.read_text()
    for name, family in sweep.FAMILIES.items():
        rows = [cells for (of, _), cells in COMMITTED.items() if of == name]
        counts = [sum(cells[sweep.STATUS] == status for cells in rows) for status in sweep.STATUSES]
        assert sweep.line([family.title, str(len(rows)), *map(str, counts)]) in text
