import re
from dataclasses import replace

from harness.contracts.intervals import wilson
from harness.contracts.record import Record, Sample, Score
from reports.tables.summary import cell_table
from tests.reports.synthetic import BASELINE, RIGHT, make_cell

CELL, SAMPLES = make_cell("reap", 0.5, "code", 0, RIGHT["reap"][0.5])
BASE, BASE_SAMPLES = make_cell("none", 0.0, "none", 0, BASELINE)


def line_of(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return re.split(r" {2,}", line)


def test_shows_score_interval_baseline_and_difference():
    text = cell_table(CELL, BASE, SAMPLES, BASE_SAMPLES)
    assert text.startswith("model=tiny method=reap ratio=0.5 calibration=code seed=0\n")
    name, score, n, baseline, change = line_of(text, "code (%)")
    assert (score, n, baseline) == ("60.0 [44.6, 73.7]", "40", "90.0 [76.9, 96.0]")
    assert change.startswith("−30.0 [")
    assert line_of(text, "generative average")[1].startswith("58.3 [")
    assert "weights on disk: 12.0 MB (baseline 20.0 MB)" in text
    assert "routed-expert parameters removed: 50.0 %" in text


def test_the_difference_is_the_reports(results):
    from reports.tables.scores import difference_table

    change = line_of(cell_table(CELL, BASE, SAMPLES, BASE_SAMPLES), "code (%)")[4]
    (row,) = (row for row in difference_table(results, "mixed").rows if row[:2] == ["0.5", "reap"])
    assert change in row
    assert line_of(cell_table(CELL, BASE), "code (%)")[4] not in row


def test_baseline_and_lone_cells_have_no_differences():
    for text in (cell_table(CELL), cell_table(BASE, BASE)):
        assert "difference" not in text and len(line_of(text, "code (%)")) == 3


def test_cell_without_scores():
    bare = Record(CELL.cell, {}, {}, {}, [], {}, {})
    assert "no scores" in cell_table(bare, BASE)


def test_tasks_without_a_column_of_their_own_show_their_first_metric():
    def cell(whole, right):
        outcomes = [1.0] * right + [0.0] * (20 - right)
        samples = [Sample("my_lm_eval", f"q{i}", outcome, domain="arc_easy") for i, outcome in enumerate(outcomes)]
        interval = wilson(right, 20)
        scores = [
            Score("my_lm_eval", metric, right / 20, 20, *interval, "arc_easy", kind="choice")
            for metric in ("acc", "acc_norm")
        ]
        return replace(whole, scores=scores), samples

    (record, samples), (baseline, baseline_samples) = cell(CELL, 12), cell(BASE, 16)
    table = cell_table(record, baseline, samples, baseline_samples)
    assert "acc_norm" not in table
    name, score, n, before, change = line_of(table, "arc_easy")
    assert (name, n) == ("arc_easy: acc (%)", "20")
    assert score.startswith("60.0 [") and before.startswith("80.0 [") and change.startswith("−20.0 [")


def test_a_quantised_baseline_is_compared_and_its_memory_told():
    cell = CELL.cell | {"method": "none", "quantize": "int4-sym", "id": "packed"}
    text = cell_table(Record(cell, {}, {}, {}, CELL.scores, CELL.sizes | {"weights_bytes": 4_000_000}, {}), BASE)
    assert "difference" in text and "quantize=int4-sym" in text
    assert "memory reduction: 5.00x" in text and "memory reduction" not in cell_table(CELL, BASE)


def test_the_parts_of_a_group_that_is_scored_have_no_line():
    def lines(**items):
        scores = [Score("choice", "acc", 0.5, n, *wilson(n // 2, n), part, kind="choice") for part, n in items.items()]
        scores.append(Score("other", "acc", 0.5, 20, *wilson(10, 20), "mmlu_like", kind="choice"))
        table = cell_table(replace(CELL, scores=scores))
        return [name for name in (*items, "mmlu_like") if f"{name}: acc" in table]

    assert lines(mmlu=20, mmlu_astronomy=12, mmlu_physics=8, arc_easy=20) == ["mmlu", "arc_easy", "mmlu_like"]
    # Tasks of their own: a single one, and some that are not the group's items.
    assert lines(gsm8k=20, gsm8k_cot=20) == ["gsm8k", "gsm8k_cot", "mmlu_like"]
    assert lines(mmlu=20, mmlu_pro=40, mmlu_redux=20) == ["mmlu", "mmlu_pro", "mmlu_redux", "mmlu_like"]
