"""Cells that were not made from the same things stand in the tables with a mark, outside differences and tests."""

from dataclasses import replace

import pytest

from harness.records.store import RecordStore
from reports.claims.evaluate import evaluate_claims
from reports.claims.list import MEASURES
from reports.claims.selection import Cell
from reports.claims.vocabulary import Claim, Contrast, Contrasts
from reports.numbers.comparable import differing, odd_ones
from reports.numbers.contrasts import Comparer
from reports.numbers.load import Panel, load_panels
from reports.numbers.measures import evaluate
from reports.tables.comparisons import baseline_tests
from reports.tables.scores import difference_table, main_table
from tests.reports.synthetic import write_sweep

USUAL = {"model": "m", "tokenizer": "t", "items/code": "c"}


def sweep(folder, changed: str, to: str = "another") -> Panel:
    """A sweep of REAP, frequency and HC-SMoE in which the frequency cells were made from something else."""
    write_sweep(folder, methods=("reap", "frequency", "hc_smoe"))
    for kind in ("records", "baseline"):
        store = RecordStore(folder, kind)
        for name in store.ids():
            record = store.read(name)
            prints = USUAL | ({} if kind == "baseline" else {"corpus": record.cell["calibration"]})
            if record.cell["method"] == "frequency":
                prints[changed] = to
            store.write(replace(record, fingerprints=prints), store.read_samples(name))
    (panel,) = load_panels(folder)
    return panel


@pytest.mark.parametrize(
    ("changed", "said"),
    [("model", "model"), ("tokenizer", "tokenizer"), ("corpus", "calibration text"), ("items/code", "items of code")],
)
def test_an_odd_row_is_marked_and_in_no_test(tmp_path, changed: str, said: str):
    panel = sweep(tmp_path, changed)
    corpus = panel.corpora()[0]
    results, comparer = evaluate(panel), Comparer()
    labels = {row.method: row.label for row in panel.of_corpus(corpus)}
    assert labels["frequency"] == f"frequency (other {said})" and labels["reap"] == "reap"
    assert f"made from something else: frequency at 0.25 (other {said})" in main_table(results, corpus).note
    rows = {(row.method, row.ratio): row for row in panel.of_corpus(corpus)}
    code = next(measure for measure in results.main if measure.name == "code")
    assert comparer.difference(code, rows["reap", 0.5], rows["frequency", 0.5]) is None
    assert comparer.difference(code, rows["reap", 0.5], rows["hc_smoe", 0.5]) is not None
    table = difference_table(results, corpus)
    column = table.header.index("Δ code (points)")
    of_baseline = changed != "corpus"  # the uncompressed model was calibrated on nothing
    for row in table.rows:
        assert (row[column] == "–") == (of_baseline and row[1].startswith("frequency"))
    tested = baseline_tests(results, corpus, comparer)
    assert any(row[1] == labels["frequency"] for row in tested.rows)

    contrast = Contrast("reap - frequency", ((1, "code", Cell("reap")), (-1, "code", Cell("frequency"))), 0.02)
    (found,) = evaluate_claims([Claim("it", "It is so.", "a test", "mixed", Contrasts((contrast,)))], [panel], MEASURES)
    assert found.verdict == "not tested"
    assert found.missing[0].why == f"was made from another {said} than the other cells"


def test_what_one_of_two_does_not_say_makes_no_difference(tmp_path):
    panel = sweep(tmp_path, "model")
    one, other = (row.records[0] for row in panel.rows[:2])
    assert differing(replace(one, fingerprints={}), other) == []
    assert odd_ones([replace(one, fingerprints={})], panel.baseline.records[0]) == {}


def test_items_of_other_tasks_do_not_keep_a_task_from_its_test(tmp_path):
    panel = sweep(tmp_path, "items/code")
    results, comparer = evaluate(panel), Comparer()
    rows = {(row.method, row.ratio): row for row in panel.of_corpus(panel.corpora()[0])}
    math = next(measure for measure in results.main if measure.name == "math")
    assert comparer.difference(math, rows["reap", 0.5], rows["frequency", 0.5]) is not None
    average = results.averages.generative
    assert comparer.difference(average, rows["reap", 0.5], rows["frequency", 0.5]) is None


def test_corpora_of_different_names_are_compared(tmp_path):
    panel = sweep(tmp_path, "corpus", to="mixed")
    one = panel.rows[0].records[0]
    other = replace(one, cell=one.cell | {"calibration": "other"}, fingerprints=one.fingerprints | {"corpus": "x"})
    assert differing(one, other) == []
