"""What `docs/removable.md` says of model types, found again for one type in twenty."""

import pytest

from architectures import causal, removable, sweep

COMMITTED = removable.rows(removable.PAGE.read_text())
EXAMINED = [name for name in list(COMMITTED)[::20] if name != "dots3_note"]  # which takes minutes


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXAMINED)
def test_the_table_says_what_is_found(model_type: str) -> None:
    found = removable.examine(model_type).line()
    assert "WRONG" not in found
    if sweep.MADE_WITH in removable.PAGE.read_text():
        assert found == COMMITTED[model_type], "run `make removable`"


def test_nothing_in_the_table_is_wrong() -> None:
    assert COMMITTED.keys() <= {*causal.model_types()}
    assert not [line for line in COMMITTED.values() if "WRONG" in line]


def test_a_row_is_found_again() -> None:
    row = removable.examine("qwen3")
    assert (row.divisions, row.cancel, row.in_part, row.which) == ("9", "0", "2", "input_layernorm")
    assert (row.divisions_proven, row.note) == ("11 of 11", "")
    text = removable.PAGE.read_text().partition(removable.TITLE)[0] + removable.table([row.line()])
    assert removable.rows(text) == {"qwen3": row.line()}
