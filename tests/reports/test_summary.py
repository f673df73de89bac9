import re

from harness.records import Record
from reports.summary import cell_table
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
    from reports.tables import difference_table

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
