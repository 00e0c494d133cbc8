"""What a trace notes, and where."""

import torch

from flashnorm.plan import Kept, Kind
from flashnorm.trace.records import Records
from flashnorm.trace.values import Value, View

WHY = Kept("so", kind=Kind.STOPPED)


def test_an_escape_says_what_ran_where() -> None:
    records = Records()
    records.escape("g", WHY, "aten.silu")
    records.running += ["", "layers.0"]
    records.escape("g", WHY, "aten.silu")
    outside, inside = records.gains["g"].escapes
    assert (outside.reason, outside.operator, outside.where) == (WHY.reason, "aten.silu", None)
    assert inside.where is not None
    assert inside.where.startswith("layers.0 (test_records.py:")  # the innermost line that is the model's


def test_the_outermost_module_has_no_name() -> None:
    records = Records()
    records.running.append("")
    where = records.here(WHY, None).where
    assert where is not None
    assert where.startswith("the model (")


def test_values_that_are_lost_count_as_a_use_and_as_an_escape() -> None:
    records = Records()
    view = View.of("w", torch.empty(2, device="meta"))
    records.escape_all([Value(view=view), Value(gains={"g": torch.arange(2)})], WHY)
    assert [use.at.reason for use in records.uses["w"]] == [WHY.reason]
    assert [escape.reason for escape in records.gains["g"].escapes] == [WHY.reason]
    assert records.uses.keys() == {"w"}
    assert records.gains.keys() == {"g"}


def test_a_bias_is_used_where_it_is_added() -> None:
    records = Records()
    records.note_addition("b", "g", "aten.add")
    (use,) = records.uses["b"]
    assert (use.adds_to, use.at.operator, use.axis) == ("g", "aten.add", None)
