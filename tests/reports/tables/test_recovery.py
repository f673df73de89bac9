"""Refitted cells in reports: a row of their own, among themselves, with the errors of their layers."""

from dataclasses import replace

import pytest

from reports.numbers.best import clearly_best
from reports.numbers.contrasts import Comparer
from reports.numbers.load import load_panels
from reports.numbers.measures import evaluate
from reports.tables.comparisons import best_tests
from reports.tables.recovery import recovery_table
from tests.reports.synthetic import BASELINE, RIGHT, RecordStore, make_cell

FIT = {
    "heldout": "another draw of the corpus",
    "refit": {
        "fits": [{"objective": "routed", "alpha": 0.01}], "tokens": 900, "heldout_tokens": 80,
        "layers": {
            "0": {"calibration": [0.3, 0.1], "heldout": [0.4, 0.2]},
            "1": {"calibration": [0.5, 0.2], "heldout": [0.6, 0.4]},
        },
    },
}  # fmt: skip
ROUTER = {
    "heldout": "not measured: the corpus has no other text",
    "router": {
        "alpha": 0.01, "tokens": 900, "heldout_tokens": 0,
        "layers": {
            "0": {
                "calibration": [0.02, 0.01], "heldout": None,
                "gate_mass": {"intact": 0.8, "as_is": 0.95, "recalibrated": 0.9},
            }
        },
    },
}  # fmt: skip


@pytest.fixture
def repaired(tmp_path):
    store = RecordStore(tmp_path)
    store.write(*make_cell("none", 0.0, "none", 0, BASELINE))
    for method, at in RIGHT.items():
        store.write(*make_cell(method, 0.5, "mixed", 0, at[0.5]))
    for stage, word, told in (("refit", "routed-refit", FIT), ("router", "recalibrated-router", ROUTER)):
        for method in ("reap", "hc_smoe"):
            record, samples = make_cell(method, 0.5, "mixed", 0, BASELINE | {"code": 35 if method == "reap" else 12})
            cell = record.cell | {stage: word, "id": f"{method}-{word}"}
            store.write(replace(record, cell=cell, recovery=told), samples)
    (found,) = load_panels(tmp_path)
    return found


def test_refitted_rows_are_named_and_compete_among_themselves(repaired):
    results = evaluate(repaired)
    rows = repaired.of_corpus("mixed")
    assert {"reap", "hc_smoe", "reap routed-refit", "hc_smoe recalibrated-router"} <= {row.label for row in rows}
    table = best_tests(results, "mixed", Comparer())
    code = {row[1]: row[2] for row in table.rows}
    assert [code[f"reap{what}"] for what in ("", " routed-refit", " recalibrated-router")] == ["best"] * 3
    # 3 pairs of bare rows, and one of each kind of repaired ones
    assert f"for the {5 * (len(table.header) - 2)} tests between all pairs" in table.note
    measure = next(measure for measure in results.measures if measure.name == "code")
    bold = {rows[place].label for place in clearly_best(results, rows, measure, Comparer())}
    assert {"reap routed-refit", "reap recalibrated-router"} <= bold and not bold & {"hc_smoe routed-refit"}


def test_the_table_has_errors_before_and_after_on_both_texts(repaired):
    table = recovery_table(repaired, "mixed")
    named = {row[1]: row[2:] for row in table.rows}
    assert set(named) == {f"{m} {w}" for m in ("reap", "hc_smoe") for w in ("routed-refit", "recalibrated-router")}
    assert named["reap routed-refit"] == [
        "routed (α 0.01)", "40.0 [30.0, 50.0] → 15.0 [10.0, 20.0]", "50.0 [40.0, 60.0] → 30.0 [20.0, 40.0]",
        "–", "–", "–",
    ]  # fmt: skip
    assert named["hc_smoe recalibrated-router"] == [
        "–", "–", "–", "2.0 [2.0, 2.0] → 1.0 [1.0, 1.0]", "–", "0.800 → 0.950 → 0.900",
    ]  # fmt: skip
    assert "(900 tokens)" in table.note and "(n: 1–2)" in table.note
    assert "Held-out text: not measured: the corpus has no other text." in table.note


def test_without_recovery_there_is_no_table(results):
    assert recovery_table(results.panel, "mixed") is None
