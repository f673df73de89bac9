import math
from dataclasses import replace

import pytest
from scipy import stats

from harness.contracts.record import Score
from reports.numbers.broken import failed_cells, faults
from reports.numbers.contrasts import Comparer
from reports.numbers.load import load_panels
from reports.numbers.measures import evaluate
from reports.numbers.paired import Comparison
from reports.tables.comparisons import (
    baseline_tests,
    best_tests,
    compared_measures,
    detectable_text,
    effect_text,
    p_text,
    reverse,
    size_text,
)
from tests.reports.synthetic import BASELINE, RIGHT, RecordStore, make_cell


def test_single_tasks_give_way_to_their_average(results):
    assert [m.name for m in compared_measures(results)] == ["generative", "multiple_choice", "perplexity"]


def test_every_row_is_tested_against_the_baseline(results):
    table = baseline_tests(results, "mixed", Comparer())
    assert [row[:2] for row in table.rows] == [[f"{r.ratio:g}", r.method] for r in results.panel.of_corpus("mixed")]
    reap = next(row for row in table.rows if row[:2] == ["0.5", "reap"])
    # 24, 18 of 40 and 14 of 20 right against 36, 32 and 18: always fewer.
    assert reap[2].startswith("−28.3 [") and "det." not in reap[2]
    assert "corrected by Holm's rule for the 24 tests of this table" in table.note  # 8 rows x 3 measures
    assert "seeds: random 3, every other row 1" in table.note and "(n: 40, 100)" in table.note


def test_multiple_choice_is_mcnemars_and_corrected(results):
    rows = {(row.method, row.ratio): row for row in results.panel.rows}
    found = Comparer().difference(results.averages.choice, rows["reap", 0.25], results.panel.baseline)
    # In each of four domains one question less: 4 lost, none won.
    assert found.p == pytest.approx(stats.binomtest(0, 4).pvalue)
    table = baseline_tests(results, "mixed", Comparer())
    entry = next(row for row in table.rows if row[:2] == ["0.25", "reap"])[3]
    assert entry.startswith("−4.0 [") and ", det. " in entry
    assert float(entry.split("p = ")[1].split(",")[0]) > found.p


def test_the_best_of_each_ratio_is_the_yardstick(results):
    table = best_tests(results, "mixed", Comparer())
    of_name = {(row[0], row[1]): row for row in table.rows}
    assert of_name["0.5", "reap"][2:] == ["best"] * 3
    # Equally many right: the first is taken for the best, the other does not differ.
    assert of_name["0.25", "hc_smoe"][3] == "best" and of_name["0.25", "reap"][3].startswith("0.0 [")
    assert of_name["0.5", "hc_smoe"][2].startswith("−")
    assert of_name["0.5", "hc_smoe"][4].startswith("×1.17 [")  # 7.0 over 6.0
    assert "for the 36 tests between all pairs" in table.note  # 6 pairs x 2 ratios x 3 measures


def test_reverse_turns_everything_round():
    one = Comparison(0.2, 0.1, 0.4, 0.05, 9, 30, (3, 1), 0.01, True, (0.01, 0.99))
    turned = reverse(one)
    assert (turned.effect, turned.low, turned.high, turned.seeds) == (-0.2, -0.4, -0.1, (1, 3))
    assert turned.p_above() == one.p_below() and turned.p_above(0.1) == one.p_below(-0.1)
    assert reverse(turned) == one


def test_texts():
    one = Comparison(math.log(2), math.log(1.5), math.log(3), 0.1, 9, 30)
    assert effect_text("perplexity", one) == "×2.00 [1.50, 3.00]"
    assert effect_text("share", Comparison(0.05, -0.01, 0.11, 0.1, 9, 30)) == "+5.0 [−1.0, 11.0]"
    assert effect_text("perplexity", Comparison(1e4, 1, 1e5, 0.1, 9, 30)) == "×∞ [2.72, ∞]"
    assert (p_text(0.0004), p_text(0.0456), p_text(0.46)) == ("p < 0.001", "p = 0.046", "p = 0.46")
    assert (size_text("share", 0.034), size_text("perplexity", math.log(1.2))) == ("3.4", "×1.20")


def test_broken_cells_are_shown_and_not_tested(tmp_path):
    store = RecordStore(tmp_path)
    RecordStore(tmp_path, "baseline").write(*make_cell("none", 0.0, "none", 0, BASELINE))
    store.write(*make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5]))
    record, samples = make_cell("frequency", 0.5, "mixed", 0, RIGHT["frequency"][0.5])
    scores = [replace(s, value=math.nan, low=math.nan, high=math.nan) if s.task == "code" else s for s in record.scores]
    store.write(replace(record, scores=scores), samples)
    told, samples = make_cell("hc_smoe", 0.5, "mixed", 0, RIGHT["hc_smoe"][0.5])
    kept = [s for s in told.scores if s.task != "math"]
    store.write(replace(told, scores=kept, broken={"math": "the logits are not finite"}), samples)

    (panel,) = load_panels(tmp_path)
    results = evaluate(panel)
    for table in (baseline_tests(results, "mixed", Comparer()), best_tests(results, "mixed", Comparer())):
        of_name = {row[1]: row for row in table.rows}
        assert set(of_name) == {"reap", "frequency (broken)", "hc_smoe (broken)"}
        assert of_name["frequency (broken)"][2] == of_name["hc_smoe (broken)"][2] == "–"
        assert of_name["frequency (broken)"][3] != "–"  # what is sound of it is still compared
        assert "code pass@1 is nan" in table.note and "math: the logits are not finite" in table.note


def test_faults_name_what_is_wrong():
    record, _ = make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5])
    assert faults(record) == []
    odd = replace(record, scores=[Score("code", "pass@1", math.inf, 1, 0, 1, "x")], broken={"math": "NaN"})
    assert faults(odd) == ["math: NaN", "code pass@1 x is inf"] and faults(odd, "writing") == []


def test_cells_that_failed_are_listed(tmp_path):
    assert failed_cells(tmp_path) == []
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "00002.txt").write_text("method=reap: out of memory\n")
    assert failed_cells(tmp_path) == ["method=reap: out of memory"]


def test_no_table_without_a_baseline_or_a_second_row(tmp_path):
    RecordStore(tmp_path).write(*make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5]))
    results = evaluate(load_panels(tmp_path)[0])
    assert baseline_tests(results, "mixed", Comparer()) is None and best_tests(results, "mixed", Comparer()) is None


def test_what_no_difference_could_show_is_none():
    assert detectable_text("share", 8.249) == detectable_text("number", math.inf) == "none"
    assert detectable_text("share", 0.059) == "5.9" and detectable_text("share", 1.5, 2.0) == "150.0"
    assert detectable_text("perplexity", math.log(2)) == "×2.00"
