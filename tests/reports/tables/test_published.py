"""Published figures stand beside cells of the same method, ratio, weights and model, and beside no others."""

from dataclasses import replace

import pytest

from harness.contracts.record import Record, Score
from harness.records.store import RecordStore
from reports.numbers.load import load_panels
from reports.numbers.measures import Results, evaluate
from reports.tables.published import load_published, published_table
from tests.reports.synthetic import RIGHT, make_cell

QWEN = "Qwen/Qwen3-30B-A3B-Instruct-2507"


@pytest.fixture(params=[QWEN, f"/models/{QWEN}", "elsewhere/other"])
def model(request) -> str:
    return request.param


def on_model(tmp_path, path: str) -> Results:
    record, samples = make_cell("reap", 0.25, "mixed", 0, RIGHT["reap"][0.25])
    score = Score("gsm8k", "exact_match", 0.5, 100, 0.4, 0.6)
    record = replace(
        record,
        config=record.config | {"model": {"path": path}},
        scores=[*record.scores, score],
        sizes=record.sizes | {"weights_bytes": 2**34},
    )
    RecordStore(tmp_path).write(record, samples)
    return evaluate(load_panels(tmp_path)[0])


def test_figures_of_a_model_stand_beside_that_model_alone(tmp_path, model):
    table = published_table(on_model(tmp_path, model))
    of_model = {row[3]: (row[5], row[6]) for row in table.rows if row[4] == QWEN}
    if model.endswith(QWEN):
        assert of_model == {"GSM8K Platinum (%)": ("95.62", "50.0 [40.0, 60.0]"), "size (GiB)": ("43.43", "16.00")}
        assert "llm-compressor, examples" in table.note
    else:
        assert of_model == {} and "llm-compressor" not in table.note


def test_changes_averaged_over_models_stand_beside_measured_changes(results):
    table = published_table(results)
    lines = {tuple(row[:2]): row for row in table.rows if "code" in row[3]}
    assert set(lines) == {(ratio, method) for ratio in ("0.25", "0.5") for method in ("hc_smoe", "reap")}
    reap = lines["0.5", "reap"]
    assert reap[5] == "−6.9" and reap[6].startswith("−30.0 [") and reap[7] == "REAP"
    assert lines["0.5", "hc_smoe"][5] == "worse than −20"


def test_quantised_cells_take_figures_of_their_own(results):
    def quantised(record: Record) -> Record:
        return replace(record, cell=record.cell | {"quantize": "int4-sym"})

    rows = tuple(
        replace(row, records=tuple(map(quantised, row.records)), method=f"{row.method} int4-sym")
        for row in results.panel.rows
    )
    assert published_table(evaluate(replace(results.panel, rows=rows))) is None
    four = {"source": "s", "model": None, "method": "reap", "ratio": 0.5, "bits": 4, "what": "w", "value": 1.5}
    table = published_table(evaluate(replace(results.panel, rows=rows)), {"sources": {"s": "S"}, "rows": [four]})
    assert [row[1:] for row in table.rows] == [["reap int4-sym", "mixed", "w", "several", "1.5", "–", "s"]]


def test_every_published_figure_names_its_source():
    published = load_published()
    assert {row["source"] for row in published["rows"]} == set(published["sources"])
    assert len(published["rows"]) > 50
