"""The tables and the figure of drift, from records whose numbers are typed in."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.contracts.record import Score
from harness.records.store import RecordStore
from reports.cli import write_report
from reports.figures.drift import curve, drift_by_position
from reports.numbers.load import load_panels
from reports.numbers.measures import Results, evaluate, main_measures
from reports.tables.diagnostics import drift_table, generation_table
from reports.tables.summary import cell_table
from tests.reports.synthetic import BASELINE, RIGHT, make_cell, write_sweep

STRETCHES = ("position 1-1", "position 2-2", "position 3-4")


def diagnostics(drift: float, mass: float = 0.0) -> list[Score]:
    """Scores of a model that drifts by ``drift``, more from stretch to stretch."""

    def score(metric: str, value: float, domain: str = "", task: str = "drift") -> Score:
        return Score(task, metric, value, 64, value * 0.9, value * 1.1, domain, kind="probe")

    found = [
        *(score(name, drift) for name in ("js", "free_js", "kl_from_baseline", "kl_to_baseline")),
        score("esap", 1 - drift), score("top1_agreement", 0.9), score("entropy", 1.25), score("parting_position", 17.0),
        score("same_text", 0.25), score("truncated_mass", mass), score("cross_perplexity", 1.5 + drift),
        *(score(name, drift * i, where) for name in ("js", "free_js") for i, where in enumerate(STRETCHES, 1)),
        *(score("running_cross_perplexity", 2.0 + i * drift, f"position 1-{end}") for i, end in enumerate((1, 2, 4))),
        score("degenerate", drift, task="generation"), score("empty", 0.0, task="generation"),
        score("length", 42.0, task="generation"), score("self_repetition", 0.3, task="generation"),
    ]  # fmt: skip
    return found


def write(folder: Path, mass: float = 0.0, without: tuple[str, float] | None = None) -> None:
    """The synthetic sweep of three methods; the one ``without`` was run before there was drift."""
    RecordStore(folder, "baseline").write(*_with(make_cell("none", 0.0, "none", 0, BASELINE), diagnostics(0.0, mass)))
    for number, (method, ratios) in enumerate(RIGHT.items(), 1):
        for ratio, right in ratios.items():
            cell = make_cell(method, ratio, "mixed", 0, right)
            added = [] if (method, ratio) == without else diagnostics(number * ratio / 10, mass)
            RecordStore(folder).write(*_with(cell, added))


def _with(cell, scores: list[Score]):
    return replace(cell[0], scores=[*cell[0].scores, *scores]), cell[1]


def load(folder: Path) -> Results:
    (panel,) = load_panels(folder)
    return evaluate(panel)


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("drifting")
    write(folder, without=("hc_smoe", 0.5))
    return load(folder)


def test_drift_table(drifting: Results) -> None:
    table = drift_table(drifting, "mixed")
    assert table is not None
    rows = {(row[0], row[1]): dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["0", "baseline"]["JS divergence"] == "0.000 [0.000, 0.000]"
    assert rows["0.5", "reap"]["JS divergence"] == "0.050 [0.045, 0.055]"  # reap is the first method: 0.5 / 10
    assert rows["0.5", "reap"]["ESAP (%)"].startswith("95.0 ")
    assert rows["0.25", "reap"]["parting position"].startswith("17.0 ")
    assert rows["0.5", "hc_smoe"]["JS divergence"] == "–", "a record from before has none"
    column = table.header.index("JS divergence")
    assert {table.rows[place][1] for place, where in table.bold if where == column} == {"reap"}
    assert not any(where == table.header.index("cross-perplexity") for _, where in table.bold)
    assert "first 4 tokens" in table.note and "n: 64 texts" in table.note and "likeliest" not in table.note


def test_generation_table(drifting: Results) -> None:
    table = generation_table(drifting, "mixed")
    assert table is not None
    rows = {(row[0], row[1]): dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["0.5", "frequency"]["in a loop (%)"] == "10.0 [9.0, 11.0]"
    assert rows["0.5", "frequency"]["length"].startswith("42.0 ")
    assert rows["0", "baseline"]["diversity-3"].startswith("0.800 ")
    assert "diversity-2" not in table.header, "the synthetic records have no 2-grams"


def test_neither_shows_where_nothing_was_diagnosed(results: Results) -> None:
    assert drift_table(results, "mixed") is None and generation_table(results, "mixed") is None
    assert drift_by_position(results, "mixed") is None


def test_the_main_table_stays_as_it_is(drifting: Results, results: Results) -> None:
    def columns(found: Results) -> list[str]:
        return [m.name for m in main_measures([r for row in found.panel.all_rows() for r in row.records])]

    assert columns(drifting) == columns(results)


def test_truncation_is_told(tmp_path: Path) -> None:
    write(tmp_path, mass=0.015)
    table = drift_table(load(tmp_path), "mixed")
    assert table is not None and "up to 1.50 % of the mass" in table.note


def test_the_figure_shows_drift_by_position(drifting: Results) -> None:
    figure = drift_by_position(drifting, "mixed")
    assert figure is not None and len(figure.axes) == 6
    panel = figure.axes[0]
    assert panel.get_title() == "JS divergence (nats)" and panel.get_ylabel() == "ratio 0.25"
    lines = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    assert set(lines) == {"baseline", "reap", "frequency", "hc_smoe"}
    values, _, (bars,) = lines["frequency"].lines
    assert values.get_xdata().tolist() == [1, 2, 4]
    assert values.get_ydata() == pytest.approx([0.05, 0.1, 0.15])
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.045, 0.055])
    assert "hc_smoe" not in figure.axes[3].get_legend_handles_labels()[1]
    running = figure.axes[2].get_legend_handles_labels()
    assert running[0][running[1].index("baseline")].lines[0].get_ydata().tolist() == [2.0, 2.0, 2.0]


def test_a_curve_is_of_the_stretches_that_every_seed_has(drifting: Results) -> None:
    row = next(row for row in drifting.panel.rows if (row.method, row.ratio) == ("reap", 0.5))
    shorter = replace(row.records[0], scores=[s for s in row.records[0].scores if s.part != STRETCHES[1]])
    both = replace(row, records=(row.records[0], shorter))
    assert [place for place, _ in curve(row, "js", "number")] == [1, 2, 4]
    assert [place for place, _ in curve(both, "js", "number")] == [1, 4]


def test_the_report_and_the_cell_table_show_both(tmp_path: Path) -> None:
    write(tmp_path / "with")
    text = write_report(tmp_path / "with", tmp_path / "out").read_text()
    assert "Drift from the uncompressed model" in text and "### Texts" in text
    assert (tmp_path / "out" / "drift_by_position_mixed.png").stat().st_size > 1000
    record, _ = _with(make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5]), diagnostics(0.1))
    shown = cell_table(replace(record, broken={"perplexity": "not finite"}))
    assert "JS divergence" in shown and "in a loop (%)" in shown
    assert "broken: perplexity: not finite" in shown
    write_sweep(tmp_path / "without", methods=("reap",))
    assert "Drift" not in write_report(tmp_path / "without", tmp_path / "out2").read_text()
