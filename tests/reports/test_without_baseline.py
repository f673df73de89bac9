"""Reports of folders whose uncompressed model was left out, or evaluated elsewhere: said, and nothing is dropped."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from harness.records.store import RecordStore
from reports.claims.report import write_claims
from reports.cli import write_report
from reports.numbers.load import load_panels
from reports.numbers.measures import evaluate
from reports.page.data import page_data
from reports.tables.scores import cost_table, difference_table, domain_table, main_table
from reports.tables.summary import cell_table
from reports.wandb.media import cell_media
from reports.wandb.report import main as wandb_main
from reports.wandb.report import stored_cells
from reports.wandb.tracker import cell_config
from tests.reports.synthetic import RIGHT, make_cell, write_sweep

SENTENCE = "There is no record of the uncompressed model (left out by baseline=skip)"
WHY = "it needs the uncompressed model, which baseline=skip does not open"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, without a baseline; the cells say what they could not measure."""
    folder = tmp_path_factory.mktemp("alone")
    write_sweep(folder, ("mixed", "code"))
    shutil.rmtree(folder / "baseline")
    store = RecordStore(folder)
    for name in store.ids():
        record = store.read(name)
        told = replace(record, config=record.config | {"baseline": "skip"}, not_measured={"drift": WHY})
        store.write(told, store.read_samples(name) or [])
    return folder


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taken")
    write_sweep(folder, methods=("reap",))
    store = RecordStore(folder, "baseline")
    (name,) = store.ids()
    store.write(replace(store.read(name), taken_from="/elsewhere/runs"), store.read_samples(name) or [])
    return folder


def test_the_report_says_so_and_shows_every_cell(alone, tmp_path):
    text = write_report(alone, tmp_path).read_text()
    opening = text.split("\n## ")[0]
    assert f"24 cells and 0 uncompressed baselines: model tiny, suite reference, backend hf. {SENTENCE}" in opening
    assert "Differences from the baseline" not in text and "Tests against the baseline" not in text
    assert "### Tests against the best of each ratio" in text
    assert text.count(SENTENCE) == 1 + 2 * 2 + 1  # opening; scores and scores by domain of each corpus; sizes
    assert f"Not measured: frequency at 0.25: drift ({WHY}); hc_smoe at 0.25: drift ({WHY})" in text
    assert "without perplexity, which is shown as a multiple of the baseline's, of which there is no record" in text
    for name in ("score_against_ratio_mixed", "score_against_ratio_code", "corpus_by_domain_reap", "expert_usage"):
        assert (tmp_path / f"{name}.png").is_file() and f"({name}.png)" in text
    assert SENTENCE in (tmp_path / "table.tex").read_text()


def test_scores_are_those_that_stand_beside_a_baseline(alone, sweep):
    """With and without the baseline the rows have the same scores; no difference is shown."""
    (without,), (beside,) = (map(evaluate, load_panels(folder)) for folder in (alone, sweep))
    ours, theirs = main_table(without, "mixed"), main_table(beside, "mixed")
    assert theirs.rows[0][1] == "baseline" and ours.rows == theirs.rows[1:] and ours.header == theirs.header
    assert difference_table(without, "mixed") is None
    tables = (ours, domain_table(without, "mixed"), cost_table(without.panel))
    assert all(SENTENCE in table.note for table in tables)
    assert all("record of the uncompressed" not in table.note for table in (theirs, cost_table(beside.panel)))


def test_the_csv_has_every_cell_and_no_differences(alone, tmp_path):
    write_report(alone, tmp_path)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert len(lines) == 16 and not any(line["method"] == "baseline" for line in lines)
    assert all(line["code_value"] and not line["code_difference"] for line in lines)


def test_claims_say_so_and_are_tested_as_far_as_they_can(alone, sweep, tmp_path):
    printed = write_claims([alone], tmp_path / "claims")
    assert f"model tiny, suite reference, backend hf: {SENTENCE}" in printed
    assert SENTENCE in (tmp_path / "claims.md").read_text()
    write_claims([sweep], tmp_path / "beside")
    verdicts, beside = (
        {one["id"]: (one["verdict"], one["p"]) for one in json.loads((tmp_path / f"{name}.json").read_text())}
        for name in ("claims", "beside")
    )
    assert (
        verdicts["reap_beats_frequency_half_mixed"] == beside["reap_beats_frequency_half_mixed"] != ("not tested", None)
    )
    lines = {one["id"]: one for one in json.loads((tmp_path / "claims.json").read_text())}
    drift = lines["merged_logits_drift_faster"]
    assert {"cell": "method=reap ratio=0.5 calibration=mixed", "why": f"not measured ({WHY})"} in drift["missing"]
    assert any("method=hc_smoe,reap,m_smoe" in command and "baseline=" not in command for command in drift["commands"])


def test_a_claim_that_lacks_the_uncompressed_model_alone_has_a_command(tmp_path):
    from reports.claims.selection import Cell, commands

    write_sweep(tmp_path, methods=("reap",))
    shutil.rmtree(tmp_path / "baseline")
    (panel,) = load_panels(tmp_path)
    (command,) = commands([Cell("none", 0.0)], panel, "", tmp_path)
    assert "method=none ratio=0 " in command and command.endswith(f"output_dir={tmp_path}")
    (other,) = commands([Cell("none", 0.0), Cell("hc_smoe")], panel, "", tmp_path)
    assert "method=hc_smoe" in other and "none" not in other


def test_the_page_says_so(alone):
    data = page_data(alone, [evaluate(panel) for panel in load_panels(alone)], "")
    assert not any(cell["baseline"] for cell in data["cells"]) and len(data["cells"]) == 16
    assert "uncompressed" not in data["note"] and data["note"].startswith("Scores with 95 % intervals;")
    assert all(cell["notes"][0].startswith("not measured: ") and SENTENCE in cell["notes"][1] for cell in data["cells"])
    assert data["items"][0] and all(cell["texts"] for cell in data["cells"])


def test_the_table_of_a_run_says_so(alone):
    record, samples = make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5])
    text = cell_table(replace(record, not_measured={"drift": WHY}), None, samples)
    assert f"\nnot measured: drift: {WHY}\n" in text
    assert "\nno baseline: there is no record of the uncompressed model to compare with\n" in text
    assert "no baseline" not in cell_table(replace(record, scores=[]))


def test_runs_of_weights_and_biases_say_so(alone, tmp_path, monkeypatch, capsys):
    cells = stored_cells(alone)
    first = cells[0]
    media = cell_media(first.record, first.samples(), first.root, first.folder, 2)
    columns, rows = media.tables["generations"]
    assert {row[columns.index("baseline output")] for row in rows} == {None}
    assert cell_config(first.record)["not_measured"] == {"drift": WHY}
    monkeypatch.setenv("WANDB_MODE", "offline")
    one = tmp_path / "one"
    RecordStore(one).write(first.record, first.samples())
    assert wandb_main([str(one), "--log"]) == 0
    assert "there is no record of the uncompressed model" in capsys.readouterr().out


def test_where_a_baseline_was_measured_is_said(taken, tmp_path):
    told = "The uncompressed model was evaluated elsewhere: its record is taken from /elsewhere/runs."
    text = write_report(taken, tmp_path / "report").read_text()
    assert told in text.split("\n## ")[0]
    (panel,) = load_panels(taken)
    results = evaluate(panel)
    for table in (main_table(results, "mixed"), difference_table(results, "mixed"), cost_table(panel)):
        assert table is not None and told in table.note
    assert told in write_claims([taken], tmp_path / "claims")
    data = page_data(taken, [results], "")
    assert all(cell["notes"] == [told] for cell in data["cells"])
    baseline = panel.baseline_record()
    record, samples = make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5])
    assert "\nbaseline: evaluated elsewhere, taken from /elsewhere/runs\n" in cell_table(record, baseline, samples)
    assert baseline is not None and cell_config(baseline)["taken_from"] == "/elsewhere/runs"


def test_of_several_panels_the_one_without_is_named(alone, taken, tmp_path):
    both = tmp_path / "both"
    for name in RecordStore(taken).ids():
        record = RecordStore(taken).read(name)
        other = replace(record, cell=record.cell | {"id": f"x{name}", "model": "other"}, fingerprints={"model": "def"})
        RecordStore(both).write(other, [])
    for kind in ("records", "baseline"):
        for name in RecordStore(taken, kind).ids():
            store = RecordStore(taken, kind)
            RecordStore(both, kind).write(store.read(name), store.read_samples(name) or [])
    opening = write_report(both, tmp_path / "report").read_text().split("\n# ")[0]
    assert "model other, suite reference, backend hf: There is no record of the uncompressed model (not kept" in opening
    assert "model tiny, suite reference, backend hf: The uncompressed model was evaluated elsewhere" in opening
