"""Model types that transformers knows, examined again: `docs/architectures.md` says what is so.

Of the causal language models one type in ten, and of the other families one in thirty: a whole sweep takes longer
than all other tests together. `make architectures` makes one, and what it changes in the table is what has changed.

With another transformers than a table's, types may have come and gone; then only a wrong fold fails.
"""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from architectures import sweep
from flashnorm.errors import InputError

pytestmark = pytest.mark.slow

COMMITTED = sweep.read_document(sweep.TABLE.read_text())[0]
TYPES = [(name, model_type) for name in sweep.FAMILIES for model_type in sweep.FAMILIES[name].model_types()]
CAUSAL = [(name, model_type) for name, model_type in TYPES if name == "causal-lm"]
# How the note of a row begins whose model needs a library that is not installed.
MISSING_LIBRARY = ("ImportError: ", "ModuleNotFoundError: ")
SAMPLE = CAUSAL[::10] + [pair for pair in TYPES if pair not in CAUSAL][::30]
# Each of these takes more than half a minute, and the first one twenty minutes.
LONG = {
    *("apertus1p5", "florence2", "cvt", "glm5_next", "idefics2", "muse_spark", "neucodec", "qwen4_exp", "vjepa2"),
    *("xclip", "zaya", "dia", "edgetam", "dots3_note"),
}
EXAMINED = [pair for pair in SAMPLE if pair[1] not in LONG]


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
    if COMMITTED[name].made_with.get(model_type) != sweep.MADE_WITH:
        return
    expected = list(COMMITTED[name].rows[model_type])
    if found != expected and row.status == sweep.NOT_BUILT and row.note.startswith(MISSING_LIBRARY):
        pytest.skip(row.note)  # timm, say, which the table was made with
    for cells in (found, expected):
        cells[sweep.ERROR] = ""  # differs between machines, up to the limit that makes a type wrong
    assert found == expected, "run `make architectures`"


@pytest.mark.parametrize("name", sweep.FAMILIES)
def test_the_table_has_every_type_and_right_totals(name: str) -> None:
    family, table = sweep.FAMILIES[name], COMMITTED[name]
    if {*table.made_with.values()} == {sweep.MADE_WITH}:
        assert list(table.rows) == family.model_types()
    counts = [sum(row[sweep.STATUS] == status for row in table.rows.values()) for status in sweep.STATUSES]
    assert sweep.line([family.title, str(len(table.rows)), *map(str, counts)]) in sweep.TABLE.read_text()


def test_the_document_is_read_as_it_is_written() -> None:
    text = sweep.TABLE.read_text()
    assert sweep.document(*sweep.read_document(text)) == text


def test_one_row_is_examined_and_all_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = sweep.TABLE.read_text()
    row = COMMITTED["causal-lm"].rows["llama"]
    path = tmp_path / "architectures.md"
    path.write_text(text.replace(sweep.line(row), sweep.line([row[0], *["-"] * (len(row) - 1)])))
    monkeypatch.setattr(sweep, "TABLE", path)
    monkeypatch.setattr(sys, "argv", ["sweep", "causal-lm:llama"])
    sweep.main()
    tables, full_size = sweep.read_document(path.read_text())
    found = tables["causal-lm"]
    assert found.made_with["llama"] == sweep.MADE_WITH
    assert found.rows["llama"][sweep.STATUS] == sweep.EXACT
    del found.rows["llama"]
    assert found.rows == {one: cells for one, cells in COMMITTED["causal-lm"].rows.items() if one != "llama"}
    del tables["causal-lm"]
    assert tables == {name: table for name, table in COMMITTED.items() if name != "causal-lm"}
    assert full_size == sweep.read_document(text)[1]


def test_names_are_families_or_their_types() -> None:
    family = [("seq2seq", one) for one in sweep.FAMILIES["seq2seq"].model_types()]
    assert sweep.named(["causal-lm:llama", "seq2seq", "seq2seq:t5"]) == [("causal-lm", "llama"), *family]


@pytest.mark.parametrize("name", ["llama", "causal-lm:detr", "plain:", ":llama"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected a"):
        sweep.named([name])


def test_a_table_says_which_rows_are_of_other_versions() -> None:
    older = "Transformers 5.0.0, torch 2.0.0."
    tables, full_size = sweep.read_document(sweep.TABLE.read_text())
    table = tables["seq2seq"]
    changed = table.updated(
        sweep.Table(dict.fromkeys(["t5", "bart"], older), {one: table.rows[one] for one in ("t5", "bart")})
    )
    assert f"{older} bart, t5." in changed.versions()
    text = sweep.document(tables | {"seq2seq": changed}, full_size)
    assert sweep.read_document(text)[0]["seq2seq"] == changed
    assert list(changed.rows) == list(table.rows)
