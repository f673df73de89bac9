"""What a corpus costs on each domain and which experts it keeps: the numbers drawn, from plans and diagnostics."""

import json
from pathlib import Path

import numpy as np
import pytest

from harness.errors import WinnowError
from reports.figures.corpora import corpus_transfer, overlaps
from reports.numbers.kept import kept_experts
from reports.numbers.load import Panel, load_panels
from reports.numbers.measures import evaluate
from reports.tables.layers import kept_of, overlap_table
from tests.reports.synthetic import BASELINE, RIGHT, write_sweep

# Layer -> the experts of 8 that stay.
KEPT = {"mixed": {"2": [0, 1, 2, 3], "4": [0, 1, 2, 3]}, "code": {"2": [2, 3, 4, 5], "4": [0, 1, 2, 3]}}


def write_plan(folder: Path, cell: str, kept: dict[str, list[int]], together: int = 1) -> None:
    layers = []
    for layer, experts in kept.items():
        route = [experts.index(old) if old in experts else None for old in range(8)]
        new = [{"sources": [{"expert": old, "weight": 1.0}] * together, "channels": None} for old in experts]
        layers.append({"layer": int(layer), "experts": new, "route": route})
    path = folder / "cells" / cell / "plan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"layers": layers}))


@pytest.fixture
def panel(tmp_path: Path) -> Panel:
    write_sweep(tmp_path, ("mixed", "code"), methods=("reap", "hc_smoe"))
    (found,) = load_panels(tmp_path)
    for row in found.rows:
        if row.ratio == 0.5:
            write_plan(tmp_path, row.records[0].cell["id"], KEPT[row.calibration], 1 if row.method == "reap" else 2)
    return found


def test_points_lost_and_experts_shared(tmp_path: Path, panel: Panel) -> None:
    kept = {(row.ratio, row.calibration): kept_of(tmp_path, row) for row in panel.rows if row.method == "reap"}
    figure = corpus_transfer(evaluate(panel), "reap", kept)
    assert figure is not None
    lost, first, second = figure.axes
    assert [label.get_text() for label in lost.get_yticklabels()] == [
        "code",
        "mixed",
    ] and lost.get_ylabel() == "ratio 0.5"
    table = np.asarray(lost.images[0].get_array())
    right = RIGHT["reap"][0.5]
    domains = [label.get_text() for label in lost.get_xticklabels()]
    items = {"code": 40, "math": 40}
    for domain, count in items.items():
        expected = 100 * (BASELINE[domain] - right[domain]) / count
        assert table[1, domains.index(domain)] == pytest.approx(expected)
    assert table[0, domains.index("math")] == pytest.approx(100 * (BASELINE["math"] - right["math"] + 6) / 40)
    assert first.get_title() == "kept in both, layer 2" and second.get_title() == "kept in both, layer 4"
    assert np.asarray(first.images[0].get_array()) == pytest.approx(np.array([[1, 1 / 3], [1 / 3, 1]]))
    assert np.asarray(second.images[0].get_array()) == pytest.approx(np.ones((2, 2)))


def test_many_layers_are_one_square() -> None:
    one = {str(layer): ([0, 1], 4) for layer in range(6)}
    other = {str(layer): ([0, 1] if layer else [2, 3], 4) for layer in range(5)}
    assert overlaps([one, other], list(one))[0, 1] == pytest.approx(4 / 5), "over the layers that both have"
    assert np.isnan(overlaps([one, {}], list(one))[0, 1])


def test_merging_keeps_no_set_of_experts_and_a_damaged_plan_is_an_error(tmp_path: Path, panel: Panel) -> None:
    cells = {row.method: row.records[0].cell["id"] for row in panel.rows if row.ratio == 0.5}
    assert kept_experts(tmp_path, cells["hc_smoe"]) == {} and kept_experts(tmp_path, "absent") == {}
    kept = {(row.ratio, row.calibration): kept_of(tmp_path, row) for row in panel.rows if row.method == "hc_smoe"}
    assert corpus_transfer(evaluate(panel), "hc_smoe", kept) is None
    table = overlap_table(tmp_path, panel)
    assert table is not None
    assert table.rows == [["0.5", "reap", "code, mixed", "0.67 [0.33, 1.00]", "0.33"]]
    (tmp_path / "cells" / cells["reap"] / "plan.json").write_text('{"layers": [1')
    with pytest.raises(WinnowError, match=r"plan\.json is damaged"):
        kept_experts(tmp_path, cells["reap"])
    assert overlap_table(tmp_path, panel) is None


def test_a_constant_in_the_place_of_an_expert_is_not_kept(tmp_path: Path) -> None:
    write_plan(tmp_path, "cell", {"2": [0, 1, 2]})
    path = tmp_path / "cells/cell/plan.json"
    plan = json.loads(path.read_text())
    plan["layers"][0]["experts"].append({"sources": [], "channels": None, "constant": "layers.2.experts.3.constant"})
    plan["layers"][0]["route"][7] = 3
    path.write_text(json.dumps(plan))
    assert kept_experts(tmp_path, "cell") == {"2": ([0, 1, 2], 8)}
