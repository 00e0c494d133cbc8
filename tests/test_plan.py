"""The plan as data."""

import pytest

from flashnorm.errors import InputError
from flashnorm.plan import Fold, FoldPlan, Kept, Linear

PLAN = FoldPlan(
    model_type="test",
    folds=(
        *(Fold(f"layers.{i}.norm.weight", 1.0, (Linear(f"layers.{i}.up.weight", 1),)) for i in range(12)),
        Fold("norm.weight", 0.0, (Linear("head.weight", 0, ((0, 2, 3), (4, 0, 1))),)),
    ),
    kept={f"layers.{i}.q_norm.weight": Kept("it rotates", "aten.add", f"layers.{i} (m.py:7)") for i in range(12)},
)


def test_json_and_back() -> None:
    assert FoldPlan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.to_dict()["folds"][0] == {
        "norm": "layers.0.norm.weight",
        "offset": 1.0,
        "bias": None,
        "linears": [{"name": "layers.0.up.weight", "axis": 1}],
    }


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1}', '{"version": 1, "folds": 3, "kept": {}}', "{"])
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a fold plan"):
        FoldPlan.from_json(text)


def test_another_version_is_refused_by_its_number() -> None:
    with pytest.raises(InputError, match="version 2"):
        FoldPlan.from_json(PLAN.to_json().replace('"version": 1', '"version": 2'))


def test_rows_that_repeat_over_layers_are_one() -> None:
    rows = PLAN.rows()
    assert [(row.norm, row.count, row.gain) for row in rows] == [
        ("layers.*.norm.weight", 12, "1 + w"),
        ("norm.weight", 1, "w"),
        ("layers.*.q_norm.weight", 12, ""),
    ]
    assert rows[0].what == "folds into layers.*.up.weight (axis 1)"
    assert rows[2].what == "kept: it rotates [aten.add at layers.* (m.py:7)]"
    assert PLAN.summary() == "test: 25 norms, 13 folded into 13 linears, 12 kept"


def test_keep_moves_a_fold_to_the_kept() -> None:
    plan = PLAN.keep({"norm.weight": Kept("why not")})
    assert (len(plan.folds), plan.kept["norm.weight"].reason, plan.norms) == (12, "why not", PLAN.norms)
