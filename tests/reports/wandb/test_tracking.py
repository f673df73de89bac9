"""A real offline run of W&B is written and its log read back: no network, no key, nothing outside
tmp_path.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from harness.contracts.record import Score
from harness.errors import WinnowError
from reports.wandb.tracker import WandbTracker, cell_summary, cell_tags, run_id
from tests.wandb_log import OfflineRun, make_record, offline_home, offline_runs, write_tracked_sweep

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    return offline_home(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> OfflineRun:
    """The run of a cell that has everything."""
    home = tmp_path_factory.mktemp("tracked")
    record, samples, folder = write_tracked_sweep(home / "sweep-7")
    with pytest.MonkeyPatch.context() as patch:
        offline_home(home, patch)
        tracker = WandbTracker(mode="offline", project="proj", folder=str(home / "not-made-yet"), generations=3)
        tracker.log_cell(record, samples, home / "sweep-7", folder)
    (found,) = offline_runs(home / "not-made-yet").values()
    return found


def test_run_names_the_cell_its_group_and_its_tags(run):
    assert (run.run.project, run.run.run_group, run.run.job_type) == ("proj", "sweep-7", "cell")
    assert run.run.display_name == make_record().cell["id"] and run.run.run_id == run_id(make_record(), "sweep-7")
    assert set(run.run.tags) == {"reap", "ratio 0.25", "code", "model m abc"}
    assert run.config["cell"]["calibration"] == "code" and run.config["cell"]["ratio"] == 0.25
    assert run.config["fingerprints"] == {"model": "abc"} and run.config["faults"] == []


def test_summary_holds_scores_with_intervals_sizes_and_timings(run):
    summary = run.summary
    assert [summary[f"code/pass@1{end}"] for end in ("", "/low", "/high", "/n")] == [0.75, 0.3, 0.95, 4]
    assert summary["multiple_choice/acc/math"] == 0.5 and summary["drift/js"] == 0.2
    assert summary["generative_average"] == pytest.approx(0.5)  # code and math; no writing in this record
    assert 0.05 < summary["generative_average/low"] < 0.5 < summary["generative_average/high"] < 0.95
    assert summary["size/weights_bytes"] == 1000 and summary["seconds/evaluation"] == 2.5
    assert not [name for name in summary if "position" in name and name != "drift_positions"]


def test_table_of_generations_has_the_baseline_beside(run):
    content = run.table("generations")
    assert content["columns"][:3] == ["task", "domain", "item"] and content["columns"][4:7] == [
        "prompt", "output", "baseline output",
    ]  # fmt: skip
    assert [row[2] for row in content["data"]] == ["c0", "c1", "c2"]
    assert content["data"][1][3:] == [1.0, "write 1", "compressed 1", "whole 1", '{"i": 1}']
    assert content["data"][0][6] is None  # the baseline has no such item, which is not an empty text


def test_tables_of_scores_plan_and_drift(run):
    scores = run.table("scores")
    assert scores["columns"] == ["task", "part", "kind", "domain", "metric", "value", "low", "high", "n"]
    assert ["multiple_choice", "math", "choice", "knowledge", "acc", 0.5, 0.1, 0.9, 2] in scores["data"] and len(
        scores["data"]
    ) == 6
    assert run.table("plan")["data"] == [[1, 3, 3, 0, 1, 3, 8], [3, 2, 4, 1, 3, None, None]]
    drift = run.table("drift_positions")["data"]
    assert len(drift) == 12 and drift[2] == ["js", 4, pytest.approx(0.3), 0.05, 0.5, 7]


def test_histograms_have_a_step_a_layer(run):
    found = run.logged("histogram")
    assert set(found) == {"usage/code", "saliency"}
    assert [(h["_step"], h["values"]) for h in found["usage/code"]] == [(1, [1, 2, 3, 4]), (3, [5, 6, 7, 8])]
    assert found["usage/code"][0]["bins"] == [0, 1, 2, 3, 4]
    assert [(h["_step"], sum(h["values"])) for h in found["saliency"]] == [(1, 4), (3, 4)]
    assert (found["saliency"][0]["bins"][0], found["saliency"][0]["bins"][-1]) == (0.1, 2.0)


def test_drift_is_a_line_over_the_position(run):
    points = [(step["position"], step["by_position/js"]) for step in run.history if "position" in step]
    assert points == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2)), (4, pytest.approx(0.3))]
    (glob,) = [metric for metric in run.metrics if metric.glob_name]
    assert (glob.glob_name, glob.step_metric) == ("by_position/*", "position")


def test_images_are_on_disk(run):
    found = run.logged("image-file")
    assert set(found) == {"expert_map", "drift_figure"}
    for (logged,) in found.values():
        with Image.open(run.files / logged["path"]) as image:
            assert image.size == (logged["width"], logged["height"]) and image.width > 500


def test_broken_cell_without_samples_or_files_is_logged_with_what_it_has(wandb_home):
    broken = replace(
        make_record(baseline="gone"),
        scores=[Score("perplexity", "perplexity", math.nan, 3, math.nan, math.nan)],
        broken={"code": "logits are not finite"},
        plan={},
        expert_usage={},
    )
    tracker = WandbTracker(mode="offline", folder=str(wandb_home / "out"), group="mine")
    tracker.log_cell(broken, [], wandb_home / "sweep", wandb_home / "sweep" / "cells" / "gone")
    (run,) = offline_runs(wandb_home / "out").values()
    assert run.run.run_group == "mine" and "broken" in run.run.tags
    assert run.config["faults"] == ["code: logits are not finite", "perplexity perplexity is nan"]
    assert "perplexity/perplexity" not in run.summary and run.summary["perplexity/perplexity/n"] == 3
    assert run.table("scores")["data"] == [["perplexity", "", "", "", "perplexity", None, None, None, 3]]
    assert [path.name.split("_")[0] for path in (run.files / "media" / "table").iterdir()] == ["scores"]
    assert not run.logged("histogram") and not run.logged("image-file")


def test_a_cell_has_the_same_run_in_its_group_and_no_other():
    record = make_record()
    assert run_id(record, "a") == run_id(replace(record, timings={}), "a")
    assert len({run_id(record, "a"), run_id(record, "b"), run_id(make_record(id="other"), "a")}) == 3


def test_without_generative_tasks_there_is_no_average():
    record = replace(make_record(), scores=[Score("multiple_choice", "acc", 0.5, 2, 0.1, 0.9)])
    assert [name for name in cell_summary(record) if "average" in name] == []


def test_online_without_a_key_fails_before_any_work_and_says_what_to_do(wandb_home):
    with pytest.raises(WinnowError, match=r"tracking\.mode=offline") as error:
        WandbTracker(mode="online", folder=str(wandb_home))
    assert "wandb login" in str(error.value) and "\n" not in str(error.value)


def test_unknown_mode_lists_the_known_ones():
    with pytest.raises(WinnowError, match="online, offline, disabled"):
        WandbTracker(mode="onlin")


def test_missing_wandb_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(WinnowError, match=r"moe-winnow\[track\]"):
        WandbTracker(mode="offline")


def test_failure_says_that_the_record_is_kept_and_how_to_send_it_later(wandb_home):
    blocked = wandb_home / "file"
    blocked.write_text("")
    with pytest.raises(WinnowError, match="whose record is stored") as error:
        WandbTracker(mode="offline", folder=str(blocked)).log_cell(make_record(), [], Path("results/x"))
    assert "`winnow-report wandb results/x --log`" in str(error.value)


def test_tags_are_short_and_differ():
    record = make_record()
    record.cell.update(method="x" * 80, calibration="x" * 90)
    assert cell_tags(record) == ["x" * 64, "ratio 0.25", "model m abc"]


@pytest.fixture
def composed(tmp_path):
    """The groups of conf/ under a root configuration of two lines, as the command line would compose them."""
    (tmp_path / "root.yaml").write_text("defaults: [{tracking: none}, _self_]\noutput_dir: results/x\n")

    def make(*overrides: str):
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return compose("root", [*overrides, f"hydra.searchpath=[file://{CONF}]"])

    return make


def test_no_tracker_by_default(composed):
    assert composed().tracking is None


def test_wandb_group_makes_a_tracker(composed, monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = instantiate(composed("tracking=wandb", "tracking.project=p").tracking)
    assert tracker == WandbTracker(mode="offline", project="p", folder="results/x")
    monkeypatch.delenv("WANDB_MODE")
    assert composed("tracking=wandb").tracking.mode == "online"


def test_models_of_one_name_have_tags_of_their_own():
    record = make_record()
    tags = [cell_tags(replace(record, fingerprints={"model": f"sha256:{one * 8}"})) for one in ("ab", "cd")]
    assert set(tags[0]) ^ set(tags[1]) == {"model m abababab", "model m cdcdcdcd"}


def test_a_cell_that_lacks_a_task_has_no_average():
    assert "generative_average" in cell_summary(make_record())
    assert "generative_average" not in cell_summary(replace(make_record(), broken={"writing": "logits are not finite"}))
