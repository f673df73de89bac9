"""The tables of calibration and consistency and the reliability diagram, from records whose numbers are typed in."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.contracts.record import Score
from harness.records.store import RecordStore
from reports.cli import write_report
from reports.figures.reliability import reliability, reliability_diagram
from reports.numbers.load import load_panels
from reports.numbers.measures import Results, evaluate, main_measures
from reports.tables.answers import calibration_table, consistency_table, shift_table
from reports.tables.summary import cell_table
from tests.reports.synthetic import BASELINE, RIGHT, make_cell, write_sweep

BINS = (("confidence 0.600-0.667", 0.65, 20), ("confidence 0.933-1.000", 0.99, 80))


def answers(error: float, same: float) -> list[Score]:
    def score(metric: str, value: float, domain: str = "", task: str = "calibration_error", n: int = 100) -> Score:
        return Score(task, metric, value, n, value - 0.01, value + 0.01, domain, task != "calibration_error", "probe")

    return [
        *(score(name, error) for name in ("ece", "ece_adaptive", "brier", "overconfidence")),
        score("ece_by_chance", 0.025),
        score("ece", error / 2, "code", n=50), score("ece", 2 * error, "knowledge", n=50),
        *(score("reliability", sure - error, where, n=n) for where, sure, n in reversed(BINS)),
        *(score("reliability_confidence", sure, where, n=n) for where, sure, n in BINS),
        score("consistent", same, "negation_code", "consistency"), score("acc", 0.75, "negation_code", "consistency"),
        score("all_right", 0.5, "negation_code", "consistency"),
        score("consistent", same, "mmlu", "mmlu_order"), score("acc", 0.5, "mmlu", "mmlu_order"),
    ]  # fmt: skip


def write(folder: Path, corpora: tuple[str, ...] = ("mixed",)) -> None:
    def put(store: RecordStore, cell, scores: list[Score]) -> None:
        store.write(replace(cell[0], scores=[*cell[0].scores, *scores]), cell[1])

    put(RecordStore(folder, "baseline"), make_cell("none", 0.0, "none", 0, BASELINE), answers(0.02, 0.9))
    for place, corpus in enumerate(corpora, 1):
        for number, method in enumerate(("reap", "hc_smoe"), 1):
            cell = make_cell(method, 0.5, corpus, 0, RIGHT[method][0.5])
            put(RecordStore(folder), cell, answers(0.1 * number + 0.01 * place, 0.8 - 0.1 * number))


def load(folder: Path) -> Results:
    (panel,) = load_panels(folder)
    return evaluate(panel)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("answered")
    write(folder, ("mixed", "code"))
    return load(folder)


def rows_of(table) -> dict[tuple[str, str], dict[str, str]]:
    return {(row[0], row[1]): dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_calibration_table(answered: Results) -> None:
    table = calibration_table(answered, "mixed")
    assert table is not None
    rows = rows_of(table)
    assert rows["0", "baseline"]["ECE"] == "0.020 [0.010, 0.030]"
    assert rows["0.5", "reap"]["ECE"] == "0.110 [0.100, 0.120]"
    assert rows["0.5", "hc_smoe"]["ECE by chance"] == "0.025 [0.015, 0.035]"
    assert "multiple choice (%)" in table.header and "n: 100 questions" in table.note
    ranked = {table.header[column] for _, column in table.bold}
    assert {"ECE", "Brier score"} <= ranked and not ranked & {"ECE by chance", "overconfidence"}
    assert {table.rows[place][1] for place, column in table.bold if table.header[column] == "ECE"} == {"reap"}


def test_consistency_table_has_the_accuracy_beside_each_rate(answered: Results) -> None:
    table = consistency_table(answered, "code")
    assert table is not None
    assert table.header[2:] == [
        "negation code: same answer (%)", "negation code: accuracy (%)",
        "mmlu order: same answer (%)", "mmlu order: accuracy (%)",
    ]  # fmt: skip
    row = rows_of(table)["0.5", "hc_smoe"]
    assert row["negation code: same answer (%)"] == "60.0 [59.0, 61.0]"
    assert row["mmlu order: accuracy (%)"] == "50.0 [49.0, 51.0]"


def test_shift_table_crosses_corpus_and_domain(answered: Results, tmp_path: Path) -> None:
    table = shift_table(answered)
    assert table is not None
    assert table.header == ["method", "corpus", "ratio", "code", "knowledge", "all"]
    rows = {(row[0], row[1]): row[3:] for row in table.rows}
    assert rows["reap", "code"][0].startswith("0.060 ") and rows["reap", "code"][1].startswith("0.240 ")
    assert rows["baseline", "–"][2].startswith("0.020 ") and len(rows) == 5
    assert "n: 50 questions a domain" in table.note
    write(tmp_path)
    assert shift_table(load(tmp_path)) is None, "one corpus is no shift"


def test_the_diagram_shows_every_bin_of_every_method(answered: Results) -> None:
    record = answered.panel.rows[0].records[0]
    points = reliability(record)
    assert [(point[0], point[4]) for point in points] == [(0.65, 20), (0.99, 80)]
    figure = reliability_diagram(answered, "mixed")
    assert figure is not None and [axes.get_title() for axes in figure.axes] == ["uncompressed", "ratio 0.5"]
    names = figure.axes[1].get_legend_handles_labels()[1]
    assert set(names) == {"reap", "hc_smoe"}
    drawn = {c.get_label(): c.get_offsets().tolist() for c in figure.axes[1].collections if c.get_label() in names}
    assert drawn["reap"] == [[0.65, pytest.approx(0.54)], [0.99, pytest.approx(0.88)]]


def test_nothing_is_shown_where_nothing_was_asked(results: Results) -> None:
    assert calibration_table(results, "mixed") is None and consistency_table(results, "mixed") is None
    assert shift_table(results) is None and reliability_diagram(results, "mixed") is None


def test_the_main_table_stays_as_it_is(answered: Results, results: Results) -> None:
    def columns(found: Results) -> list[str]:
        return [m.name for m in main_measures([r for row in found.panel.all_rows() for r in row.records])]

    assert columns(answered) == columns(results)


def test_the_report_and_the_cell_table_show_both(tmp_path: Path) -> None:
    write(tmp_path / "with", ("mixed", "code"))
    text = write_report(tmp_path / "with", tmp_path / "out").read_text()
    assert "### Calibration of answers" in text and "### Consistency of answers" in text
    assert "## Calibration error by corpus and domain" in text and "Reliability diagram" in text
    assert (tmp_path / "out" / "reliability_code.png").stat().st_size > 1000
    cell = make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5])[0]
    shown = cell_table(replace(cell, scores=[*cell.scores, *answers(0.1, 0.8)]))
    assert "adaptive ECE" in shown and "negation code: same answer (%)" in shown
    write_sweep(tmp_path / "without", methods=("reap",))
    assert "ECE" not in write_report(tmp_path / "without", tmp_path / "out2").read_text()
