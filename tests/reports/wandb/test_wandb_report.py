"""The dashboard against what an offline run really logged, and the command without a network."""

import json
import sys

import pytest
import wandb

from harness.contracts.record import Record
from harness.errors import WinnowError
from harness.records.store import RecordStore
from reports.cli import main
from reports.wandb import report as wandb_report
from reports.wandb.dashboard import workspace
from reports.wandb.report import logged_names, stored_cells
from reports.wandb.tracker import run_id
from tests.wandb_log import OfflineRun, make_record, make_samples, offline_home, offline_runs, write_tracked_sweep


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    offline_home(tmp_path, monkeypatch)
    write_tracked_sweep(tmp_path / "sweep")
    return tmp_path / "sweep"


def panels_of(view) -> dict[str, list]:
    return {section.name: list(section.panels) for section in view.sections}


def names_of(view) -> tuple[set[str], set[str], set[str], set[str]]:
    """What the panels and columns read: configuration, summary, lines, and media with tables."""
    config: set[str] = set()
    summary = {column.removeprefix("summary:") for column in view.runset_settings.pinned_columns[1:]}
    lines: set[str] = set()
    media: set[str] = set()
    for panel in (panel for panels in panels_of(view).values() for panel in panels):
        kind = type(panel).__name__
        if kind == "ScatterPlot":
            for axis in (panel.x, panel.y):
                (config if type(axis).__name__ == "Config" else summary).add(axis.name)
        elif kind == "LinePlot":
            lines |= {panel.x, *panel.y}
        elif kind == "MediaBrowser":
            media |= set(panel.media_keys)
        elif kind == "WeavePanelSummaryTable":
            media.add(panel.table_name)
        else:
            assert kind == "RunComparer"
    return config, summary, lines, media


def test_log_writes_every_stored_cell_and_the_panels_read_only_what_was_logged(sweep, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["wandb", str(sweep), "--log", "--project", "p"]) == 0
    told = capsys.readouterr().out
    assert "2 runs written" in told and f"wandb sync {sweep}/wandb/offline-run-*" in told
    runs = offline_runs(sweep)
    assert set(runs) == {"base", make_record().cell["id"]} and runs["base"].run.job_type == "baseline"
    assert all((one.run.project, one.run.run_group) == ("p", "sweep") for one in runs.values())
    assert set(runs[make_record().cell["id"]].logged("image-file")) == {"expert_map", "drift_figure"}

    cells = stored_cells(sweep)
    logged = logged_names(cells)
    assert logged == {name for one in runs.values() for name in own_names(one)}
    view = workspace([cell.record for cell in cells], logged, "me", "p", "sweep")
    config, summary, lines, media = names_of(view)
    assert config == {"cell.ratio"} and all("ratio" in one.config["cell"] for one in runs.values())
    for one in [runs[make_record().cell["id"]]]:
        assert summary <= set(one.summary)
        assert lines == {name for step in one.history for name in step if name.startswith(("by_position/", "position"))}
        tables = {path.name.rpartition("_")[0].rpartition("_")[0] for path in (one.files / "media/table").iterdir()}
        assert media == tables | set(one.logged("image-file"))
    assert set(view.runset_settings.run_settings) == {one.run.run_id for one in runs.values()}


def own_names(run: OfflineRun) -> set[str]:
    steps = {name for step in run.history for name in step if name != "position"}
    return {name for name in {*run.summary, *steps} if not name.startswith("_")}


def dashboard(records: list[Record], logged: set[str]):
    return workspace(records, logged, "me", "p", "g")


def test_panels_of_a_whole_sweep(sweep):
    cells = stored_cells(sweep)
    view = dashboard([cell.record for cell in cells], logged_names(cells))
    panels = panels_of(view)
    titles = [panel.title for panel in panels["Scores"]]
    assert titles == [
        "generative average against compression ratio",
        "code against compression ratio",
        "math against compression ratio",
        "multiple choice against compression ratio",
        "generative average against multiple choice",
        "generative average against bytes of the weights",
    ]
    assert [panel.title for panel in panels["Drift from the uncompressed model"]][:2] == [
        "JS divergence against compression ratio",
        "JS divergence (nats) by position",
    ]
    assert [panel.y.name for panel in panels["Diversity and length of the texts"]] == ["diversity/ngram_diversity_3"]
    assert [panel.table_name for panel in panels["Generations"]] == ["generations"]
    settings = view.runset_settings
    baseline, cell = (run_id(one.record, "g") for one in cells)
    assert settings.baseline_run == baseline and settings.filters == "Metric(\"Group\") == 'g'"
    assert (settings.run_settings[baseline].color, settings.run_settings[cell].color) == ("#777777", "#0072B2")
    # The library turns it into what the service stores.
    spec = json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    first = spec["section"]["panelBankConfig"]["sections"][0]["panels"][0]["config"]
    assert (first["xAxis"], first["yAxis"]) == ("config:cell.value.ratio", "summary:generative_average")


def test_a_sweep_without_drift_texts_or_files_has_no_panels_for_them(sweep):
    record = make_record()
    few = [score for score in record.scores if score.task == "multiple_choice"]
    view = dashboard([Record(**{**vars(record), "scores": few, "plan": {}})], {"multiple_choice/acc", "scores"})
    assert set(panels_of(view)) == {"Scores", "Tables", "Cells side by side"}
    assert view.runset_settings.baseline_run is None


def test_files_of_a_single_run_lie_in_its_output_folder(sweep):
    (folder,) = (sweep / "cells").iterdir()
    assert folder in {cell.folder for cell in stored_cells(sweep)}
    for path in folder.iterdir():
        path.rename(sweep / path.name)
    assert {cell.folder for cell in stored_cells(sweep)} == {sweep}
    RecordStore(sweep).write(make_record(id="second"), make_samples("x"))
    assert sweep not in {cell.folder for cell in stored_cells(sweep)}  # whose plan it is cannot be told


@pytest.mark.parametrize(
    ("mode", "arguments", "says"),
    [
        ("offline", [], "WANDB_MODE=offline"),
        ("disabled", ["--log"], "WANDB_MODE=disabled"),
        ("online", ["--log"], "no API key: log in with `wandb login`"),
    ],
)
def test_without_the_service_one_line_says_what_to_do(sweep, monkeypatch, capsys, mode, arguments, says):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert main(["wandb", str(sweep), *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("winnow-report: error:")]
    assert says in line
    assert not (sweep / "wandb").exists()


def test_missing_package_names_the_extra_before_anything_is_sent(sweep, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["wandb", str(sweep), "--log"]) == 2
    assert "pip install 'moe-winnow[track]'" in capsys.readouterr().err
    assert not (sweep / "wandb").exists()


def test_folder_without_records_is_told(tmp_path, capsys):
    assert main(["wandb", str(tmp_path)]) == 2
    assert "no records in" in capsys.readouterr().err


def test_view_that_cannot_be_saved_says_why_in_one_line(sweep, monkeypatch):
    def unreachable():
        raise wandb.errors.CommError("no route\nto host")

    monkeypatch.setattr(wandb, "Api", unreachable)
    with pytest.raises(WinnowError, match="project p: no route to host: check the network"):
        wandb_report._save(workspace([make_record()], set(), "", "p", "g"))
