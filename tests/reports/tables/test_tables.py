"""Numbers in the tables against hand computation from the counts in synthetic.py."""

import csv
import io
import math
from dataclasses import replace

import pytest
from scipy.stats import t

from harness.contracts.intervals import wilson
from harness.contracts.record import Score
from harness.records.store import RecordStore
from reports.numbers.load import load_panels
from reports.numbers.measures import evaluate, memory_reduction
from reports.numbers.statistics import Estimate
from reports.numbers.usage import collect_usage
from reports.tables.formats import format_estimate, format_value, to_latex, to_markdown
from reports.tables.scores import cost_table, difference_table, domain_table, main_table, to_csv, usage_table
from tests.reports.synthetic import RIGHT, make_cell


def row_of(table, ratio: str, method: str) -> dict[str, str]:
    (found,) = (row for row in table.rows if row[:2] == [ratio, method])
    return dict(zip(table.header, found, strict=True))


def test_main_table_numbers(results):
    table = main_table(results, "mixed")
    assert len(table.rows) == 9 and table.rows[0][:2] == ["0", "baseline"]
    reap = row_of(table, "0.5", "reap")  # right: code 24/40, math 18/40, writing 14/20, choice 16/25 everywhere
    low, high = wilson(24, 40)
    assert reap["code (%)"] == f"60.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert reap["math (%)"].startswith("45.0 [") and reap["writing (%)"].startswith("70.0 [")
    assert reap["generative average (%)"].startswith("58.3 [")  # (60 + 45 + 70) / 3
    assert reap["multiple choice (%)"].startswith("64.0 [")
    assert reap["perplexity"].startswith("6.00 [")
    assert reap["3-gram diversity"] == "0.700 [0.670, 0.730]"
    assert reap["size (MB)"] == "12.0" and reap["expert parameters removed (%)"] == "50.0"
    assert row_of(table, "0.25", "reap")["expert parameters removed (%)"] == "25.0"
    baseline = row_of(table, "0", "baseline")
    assert baseline["generative average (%)"].startswith("86.7 [") and baseline["size (MB)"] == "20.0"


def test_main_table_averages_seeds(results):
    random = row_of(main_table(results, "mixed"), "0.25", "random")
    assert random["code (%)"].startswith("50.0 [")  # 20, 24 and 16 of 40
    assert random["perplexity"].startswith(f"{(7 * 6 * 8) ** (1 / 3):.2f} [")
    halves = [(0.5 - wilson(20, 40)[0]), (0.6 - wilson(24, 40)[0]), (0.4 - wilson(16, 40)[0])]
    low = 0.5 - math.hypot(sum(halves) / 3, t.ppf(0.975, 2) * 0.1 / math.sqrt(3))
    assert f"[{100 * low:.1f}, " in random["code (%)"]
    assert "random (3)" in main_table(results, "mixed").note


def test_difference_table_numbers(results):
    table = difference_table(results, "mixed")
    assert len(table.rows) == 8
    reap = row_of(table, "0.5", "reap")
    assert reap["Δ code (points)"].startswith("−30.0 [")  # 24/40 - 36/40
    assert reap["Δ generative average (points)"].startswith("−28.3 [")  # 58.33 - 86.67
    assert reap["Δ multiple choice (points)"].startswith("−16.0 [")
    assert reap["Δ perplexity"].startswith("+2.00 [")
    assert reap["Δ 3-gram diversity"] == "−0.100 [−0.142, −0.058]"  # 0.03 * sqrt(2) to each side
    paired, unpaired = table.note.split("and from the two recorded intervals")
    assert "paired test" in paired and "perplexity" in paired and "diversity" not in paired
    assert "diversity" in unpaired and "n: code 40, math 40, writing 20" in unpaired


def test_without_samples_differences_say_that_they_are_unpaired(corpora_results, results):
    table = difference_table(corpora_results, "mixed")
    assert "unpaired" in table.note and "paired test" not in table.note
    without, having = (row_of(one, "0.5", "reap") for one in (table, difference_table(results, "mixed")))
    assert without["Δ code (points)"].split()[0] == having["Δ code (points)"].split()[0]
    assert without["Δ code (points)"] != having["Δ code (points)"]


def test_only_what_is_significantly_the_best_of_its_ratio_is_bold(results):
    table = main_table(results, "mixed")
    bold = {(table.rows[r][0], table.rows[r][1], table.header[c]) for r, c in table.bold}
    assert {name for ratio, name, column in bold if column == "perplexity"} == {"reap"}
    # 18 of 40 against 10, 8 items that differ: McNemar's p is 2/256, times 6 pairs of 4 rows 0.047.
    assert ("0.5", "reap", "math (%)") in bold
    assert ("0.5", "reap", "code (%)") not in bold  # 24 against 20: 2/16
    assert not any((ratio, column) == ("0.25", "writing (%)") for ratio, _, column in bold)  # two with 17 of 20
    assert not any(name == "baseline" or "diversity" in column for _, name, column in bold)
    assert "**45.0 [" in to_markdown(table) and r"\textbf{45.0 [" in to_latex(table)
    assert "**60.0 [" not in to_markdown(table)


def test_domain_table(results):
    table = domain_table(results, "mixed")
    reap = row_of(table, "0.25", "reap")
    low, high = wilson(19, 25)
    assert reap["choice: knowledge (%)"] == f"76.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert reap["perplexity: real text"].startswith("4.40 [")
    assert "multiple choice knowledge 25" in table.note and "perplexity code 8" in table.note


def test_each_corpus_has_its_own_numbers(corpora_results):
    code, math_, mixed = (row_of(main_table(corpora_results, c), "0.25", "reap") for c in ("code", "math", "mixed"))
    assert [one["code (%)"].split()[0] for one in (code, math_, mixed)] == ["85.0", "55.0", "85.0"]
    assert [one["math (%)"].split()[0] for one in (code, math_, mixed)] == ["55.0", "70.0", "70.0"]


def test_cost_table(panel):
    table = cost_table(panel)
    reap, random = row_of(table, "0.25", "reap"), row_of(table, "0.25", "random")
    assert (reap["size (MB)"], reap["parameters (M)"], reap["expert parameters (M)"]) == (
        "16.0",
        "8.00",
        "6.00",
    )
    assert reap["calibration (s)"] == "3.0"
    assert random["evaluation (s)"] == "21.0"  # 20, 21 and 22
    assert "13 cells in 9 rows" in table.note


def test_usage_table(corpora_results):
    records = [record for row in corpora_results.panel.rows for record in row.records]
    table = usage_table(collect_usage(records))
    assert table.header[2:] == ["overlap with code", "overlap with math", "overlap with mixed"]
    by_source = {row[0]: row[1:] for row in table.rows}
    counts = [int(1000 * 0.8**i) for i in range(16)]
    assert by_source["code"][0] == f"{100 * sum(counts[:4]) / sum(counts):.1f}"
    # "code" and "mixed" favour the same half, "math", 8 experts away, the other.
    assert by_source["code"][1:] == ["1", "0.00", "1.00"] and by_source["math"][1:] == ["0.00", "1", "0.00"]


def test_csv_holds_plain_numbers(results):
    lines = list(csv.DictReader(io.StringIO(to_csv([results]))))
    assert len(lines) == 9
    (reap,) = (line for line in lines if (line["method"], line["ratio"]) == ("reap", "0.5"))
    assert float(reap["code_value"]) == 0.6 and reap["code_n"] == "40"
    assert float(reap["generative_value"]) == pytest.approx((0.6 + 0.45 + 0.7) / 3) and reap["generative_n"] == "100"
    assert float(reap["code_difference"]) == pytest.approx(-0.3) and reap["code_difference_paired"] == "true"
    assert float(reap["code_difference_low"]) < -0.3 < float(reap["code_difference_high"])
    assert reap["diversity_difference_paired"] == "false"
    assert (reap["weights_bytes"], reap["expert_parameters_removed"]) == ("12000000", "0.5")
    (baseline,) = (line for line in lines if line["method"] == "baseline")
    assert baseline["code_difference"] == "" and float(baseline["code_value"]) == 0.9
    (random,) = (line for line in lines if (line["method"], line["ratio"]) == ("random", "0.5"))
    assert random["seeds"] == "3"


def test_latex_is_booktabs_with_nothing_unescaped(results):
    text = to_latex(main_table(results, "mixed"))
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert text.count(r"\midrule") == 3  # after the header, the baseline and the first ratio
    assert r"hc\_smoe" in text and r"code (\%)" in text
    assert "%" not in text.replace(r"\%", "").replace("{!}{%\n", "") and "−" not in text
    body = text[text.index(r"\toprule") :].splitlines()
    assert {line.count("&") for line in body if line.endswith(r"\\")} == {10}


def test_markdown_has_the_note_below(results):
    lines = to_markdown(main_table(results, "mixed")).splitlines()
    assert {line.count("|") for line in lines[:11]} == {12} and lines[11] == ""
    assert lines[12].startswith("Each score with its 95 % interval")


def test_suite_without_some_tasks_leaves_their_columns_out(tmp_path):
    record, _ = make_cell("reap", 0.25, "code", 0, RIGHT["reap"][0.25])
    kept = [score for score in record.scores if score.task in ("math", "perplexity") and not score.part]
    RecordStore(tmp_path).write(replace(record, scores=kept, sizes={}), [])
    (panel,) = load_panels(tmp_path)
    results = evaluate(panel)
    table = main_table(results, "code")
    assert table.header[2:5] == ["generative average (%)", "math (%)", "perplexity"]
    assert table.rows[0][-2:] == ["–", "–"] and "mean of math," in table.note
    assert difference_table(results, "code") is None and domain_table(results, "code") is None


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("share", 0.6125, "61.3"),
        ("share", -0.0001, "0.0"),
        ("share", -0.05, "−5.0"),
        ("perplexity", 4.126, "4.13"),
        ("perplexity", 1234.5, "1234"),
        ("perplexity", 2.5e7, "2.5e+07"),
        ("perplexity", math.inf, "∞"),
        ("number", 0.70049, "0.700"),
    ],
)
def test_numbers_as_printed(kind, value, text):
    assert format_value(kind, value) == text


def test_estimates_as_printed():
    assert format_estimate("share", Estimate(0.05, -0.01, 0.1, 9), signed=True) == "+5.0 [−1.0, 10.0]"
    assert format_estimate("share", Estimate(0.0, -0.01, 0.1, 9), signed=True) == "0.0 [−1.0, 10.0]"
    assert format_estimate("perplexity", Estimate(math.inf, math.nan, math.nan, 9)) == "∞"


def test_memory_reduction_is_shown_where_a_cell_is_quantised(results, tmp_path):
    assert not any("memory" in name for name in main_table(results, "mixed").header)
    assert "memory_reduction" not in to_csv([results])
    store = RecordStore(tmp_path)
    plain, quantised = (make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5]) for _ in range(2))
    quantised[0].cell.update({"quantize": "int4-sym", "id": "packed"})
    quantised[0].sizes["weights_bytes"] = 4_000_000
    for cell in (plain, quantised):
        store.write(*cell)
    (panel,) = load_panels(tmp_path)
    table = main_table(evaluate(panel), "mixed")
    shown = {row[1]: row[table.header.index("memory reduction (×)")] for row in table.rows}
    assert shown == {"reap": "1.67", "reap int4-sym": "5.00"}  # 20 MB over 12 and 4
    assert "in 16 bits" in table.note
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO(to_csv([evaluate(panel)])))}
    assert float(lines["reap int4-sym"]["memory_reduction"]) == 5.0
    for record in (*panel.rows[0].records, *panel.rows[1].records):
        record.sizes["baseline_weights_bytes"] = 40_000_000  # 4 bytes a parameter: counted as 2
    assert [memory_reduction(row) for row in panel.rows] == [20 / 12, 5.0]


def test_the_note_names_what_was_counted(tmp_path):
    record, _ = make_cell("reap", 0.5, "code", 0, RIGHT["reap"][0.5])
    scores = [Score(task, "acc", 0.5, n, *wilson(n // 2, n), part, kind="choice") for task, part, n in (
        ("arc_easy", "arc_easy", 30), ("my_lm_eval", "rte", 20),
    )]  # fmt: skip
    RecordStore(tmp_path).write(replace(record, scores=scores), [])
    (panel,) = load_panels(tmp_path)
    assert "(n: arc_easy: acc 30, my lm eval rte 20)" in main_table(evaluate(panel), "code").note
