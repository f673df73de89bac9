"""The tables and the figure of layer diagnostics, and the claims that read them, from numbers that are typed in."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import WinnowError
from harness.files import write_files
from harness.records.store import RecordStore
from reports.claims.evaluate import evaluate_claims
from reports.claims.list import CLAIMS, MEASURES
from reports.cli import write_report
from reports.numbers.diagnosed import read_diagnostics
from reports.numbers.kept import jaccard, jaccard_by_chance
from reports.numbers.load import Panel, load_panels
from reports.numbers.measures import evaluate, main_measures
from reports.tables.layers import (
    errors_of,
    layer_figure,
    layer_table,
    layers_of,
    overlap_table,
)
from tests.reports.synthetic import BASELINE, RIGHT, make_cell

LAYERS = 5
MERGED = {"hc_smoe": 1.0, "m_smoe": 1.2}


def numbers(layer: int, scale: float, merged: bool, kept: list[int] | None = None) -> dict[str, Any]:
    """``scale`` is how much is lost; the predicted error is 60 % of the measured one in every layer."""
    measured, ratio = scale * (1 + layer) / 20, 0.4 + 0.01 * layer if merged else 0.9
    found: dict[str, Any] = {
        "measured_error": [measured, 0.9 * measured, 1.1 * measured],
        "predicted_error": [0.6 * measured, 0.5 * measured, 0.7 * measured],
        "spread_ratio": [ratio, ratio - 0.05, ratio + 0.05], "spread_before": 2.0, "spread_after": 2.0 * ratio,
        "explained_before": [0.3, 0.2, 0.5], "explained_after": [0.5, 0.25, 0.25],
        "load_entropy_before": 2.0, "load_entropy_after": 1.25,
        "singleton_share": 0.75 if merged else 1.0, "largest_group": 3 + layer if merged else 1,
        "rows": 8, "experts": 4, "kept": kept, "groups": [],
    }  # fmt: skip
    if merged:
        found |= {"aligned_distance": [1.2, 1.3], "average_aligned_distance": [1.3, 1.4]}
        found |= {"overlap": [0.4, 0.5], "average_overlap": [0.2, 0.3]}
    return found


def told(cell: str, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    scores = []
    for layer, own in layers.items():
        of_layer = {name: own[name][0] for name in ("measured_error", "predicted_error", "spread_ratio") if name in own}
        if "aligned_distance" in own:
            of_layer["aligned_distance"] = sum(own["aligned_distance"]) / 2 + int(layer) / 100
        for name, value in of_layer.items():
            scores.append(
                {"task": "layers", "metric": name, "value": value, "n": 4100, "low": value, "high": value}
                | {"domain": layer, "higher_is_better": False}
            )
    return {"version": 1, "cell": cell, "corpus": "mixed", "tokens": 4100, "layers": layers, "scores": scores}


def write(folder: Path, method: str, ratio: float, corpus: str, layers: dict[str, dict[str, Any]] | None) -> str:
    record, samples = make_cell(method, ratio, corpus, 0, RIGHT["reap"][0.5])
    RecordStore(folder).write(record, samples)
    cell = record.cell["id"]
    if layers is not None:
        write_files({folder / "diagnostics" / f"{cell}.json": json.dumps(told(cell, layers)).encode()})
    return cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layers")
    RecordStore(out, "baseline").write(*make_cell("none", 0.0, "none", 0, BASELINE))
    for ratio in (0.125, 0.25, 0.5):
        for method, scale in MERGED.items():
            layers = {str(i): numbers(i, ratio * scale, merged=True) for i in range(LAYERS)}
            write(out, method, ratio, "mixed", layers)
    for corpus, kept in (("mixed", [0, 1, 2, 3]), ("code", [0, 1, 2, 7])):
        write(out, "reap", 0.5, corpus, {str(i): numbers(i, 0.3 + 0.1 * i, False, kept) for i in range(LAYERS)})
    write(out, "frequency", 0.5, "mixed", None)
    return out


@pytest.fixture(scope="module")
def panel(folder: Path) -> Panel:
    (found,) = load_panels(folder)
    return found


def test_the_table_has_a_row_for_each_cell_that_was_diagnosed(folder: Path, panel: Panel) -> None:
    table = layer_table(folder, panel, "mixed")
    assert table is not None
    rows = {(row[0], row[1]): dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert set(rows) == {
        ("0.125", "hc_smoe"),
        ("0.125", "m_smoe"),
        ("0.25", "hc_smoe"),
        ("0.25", "m_smoe"),
        ("0.5", "hc_smoe"),
        ("0.5", "m_smoe"),
        ("0.5", "reap"),
    }
    merged = rows["0.5", "hc_smoe"]
    assert merged["measured error (%)"] == "7.5 [2.5, 12.5]" and merged["predicted error (%)"] == "4.5 [1.5, 7.5]"
    assert merged["ρ"].startswith("1.00 ") and merged["spread"] == "0.42 [0.40, 0.44]"
    assert merged["PC 1+2 (%)"] == "50 → 75" and merged["load entropy"] == "2.00 → 1.25"
    assert merged["distance"] == "1.25 (1.35)" and merged["overlap"] == "0.45 (0.25)"
    assert merged["groups of one (%)"] == "75 [75, 75]" and merged["largest group"] == "3–7"
    assert rows["0.5", "reap"]["distance"] == "–"
    assert "of 4100 calibration tokens" in table.note and "n: 5" in table.note


def test_errors_without_a_prediction_and_few_layers(folder: Path, tmp_path: Path) -> None:
    unpredicted = numbers(0, 1.0, False) | {"predicted_error": [0.1, 0.1, 0.1]}
    del unpredicted["predicted_error"]
    assert errors_of([unpredicted, numbers(1, 1.0, False)]) == [(0.06, 0.1)]
    write(tmp_path, "coverage", 0.5, "mixed", {"0": unpredicted})
    (panel,) = load_panels(tmp_path)
    table = layer_table(tmp_path, panel, "mixed")
    assert table is not None
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["predicted error (%)"] == row["ρ"] == "–" and row["measured error (%)"] == "5.0 [5.0, 5.0]"
    assert layer_figure(tmp_path, panel, "mixed") is not None


def test_overlap_of_kept_experts(folder: Path, panel: Panel) -> None:
    table = overlap_table(folder, panel)
    assert table is not None
    assert table.rows == [["0.5", "reap", "code, mixed", "0.60 [0.60, 0.60]", "0.33"]]
    assert jaccard([0, 1], [1, 2]) == pytest.approx(1 / 3) and jaccard([], []) == 1.0
    assert jaccard_by_chance(4, 4, 8) == pytest.approx(2 / 6) and jaccard_by_chance(8, 8, 8) == 1.0


def test_figure(folder: Path, panel: Panel) -> None:
    figure = layer_figure(folder, panel, "mixed")
    assert figure is not None
    errors, spreads = figure.axes
    drawn = [line.get_xydata().tolist() for line in errors.lines if line.get_linestyle() == "None"]
    assert len(drawn) == 7 and all(len(points) == LAYERS for points in drawn)
    assert all(y == pytest.approx(x / 0.6) for points in drawn for x, y in points)
    assert errors.get_title() == "ρ = 1.00 over 35 layers"
    labels = [line.get_label() for line in spreads.lines]
    assert labels == [
        "hc_smoe 0.125", "m_smoe 0.125", "hc_smoe 0.25", "m_smoe 0.25", "hc_smoe 0.5", "m_smoe 0.5", "reap 0.5",
    ]  # fmt: skip
    assert spreads.lines[-1].get_ydata().tolist() == [0.9] * LAYERS


def test_nothing_where_nothing_was_diagnosed(sweep: Path, panel: Panel) -> None:
    (plain,) = load_panels(sweep)
    assert layer_table(sweep, plain, "mixed") is None and layer_figure(sweep, plain, "mixed") is None
    assert overlap_table(sweep, plain) is None and layers_of(sweep, plain.rows[0]) is None


def test_the_report_shows_them_and_the_main_table_does_not(folder: Path, panel: Panel, tmp_path: Path) -> None:
    text = write_report(folder, tmp_path / "report").read_text()
    assert "### Layer by layer" in text and "layers_mixed.png" in text and "## Experts kept on two corpora" in text
    assert (tmp_path / "report" / "layers_mixed.png").is_file()
    records = [record for row in panel.rows for record in row.records]
    assert any(score.task == "layers" for record in records for score in record.scores)
    assert not any(part.task == "layers" for measure in main_measures(records) for part in measure.parts)
    assert not any("layers" in measure.name for measure in evaluate(panel).measures)


def test_claims_read_them(panel: Panel) -> None:
    names = {"merging_error_follows_prediction", "m_smoe_shrinks_spread"}
    found = evaluate_claims([claim for claim in CLAIMS if claim.id in names], [panel], MEASURES)
    assert {finding.claim.id: finding.verdict for finding in found} == dict.fromkeys(names, "holds")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cell = write(tmp_path, "reap", 0.5, "mixed", {"0": numbers(0, 1.0, False)})
    assert read_diagnostics(tmp_path, "another") is None
    path = tmp_path / "diagnostics" / f"{cell}.json"
    for damaged in ("{", "{}", "[]"):
        path.write_text(damaged)
        with pytest.raises(WinnowError, match="damaged: delete it"):
            load_panels(tmp_path)
