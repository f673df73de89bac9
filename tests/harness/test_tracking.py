"""A real offline run of W&B is written and its log read back: no network, no key, nothing outside
tmp_path.
"""

import json
import struct
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from harness.errors import WinnowError
from harness.records import Record, Sample, Score
from harness.tracking import WandbTracker, cell_tags, generation_rows

CONF = Path(__file__).parents[2] / "conf"


def make_record() -> Record:
    return Record(
        cell={
            "id": "m__reap__0.25__code__s0-0011aabb",
            "model": "m",
            "method": "reap",
            "ratio": 0.25,
            "calibration": "code",
            "seed": 0,
            "suite": "reference",
            "backend": "hf",
        },
        config={"method": {"name": "reap"}, "ratio": 0.25},
        versions={"winnow": "0"},
        fingerprints={"model": "abc"},
        scores=[
            Score("code", "pass@1", 0.75, 4, 0.3, 0.95),
            Score("multiple_choice", "acc", 0.5, 2, 0.1, 0.9, domain="math"),
        ],
        sizes={"weights_bytes": 1000},
        timings={"evaluation": 2.5},
    )


SAMPLES = [Sample("code", f"c{i}", float(i > 0), output=f"def f(): return {i}", detail={"i": i}) for i in range(4)]


def finished_log(path: Path) -> list:
    """The records of a run; W&B's own process may close the file a moment after the run has finished."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = read_log(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path} was not finished within a minute")


def read_log(path: Path) -> list:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, partial, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:  # no room for another piece's header: the block is filled up
            place += room
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        partial += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            records.append(record)
            partial = b""
    return records


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name.lower()))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return tmp_path


def test_offline_run_holds_the_cell(wandb_home):
    folder = wandb_home / "not-made-yet"
    tracker = WandbTracker(mode="offline", project="proj", folder=str(folder), generations=3)
    tracker.log_cell(make_record(), SAMPLES, group="sweep-7")
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = finished_log(log)

    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.display_name) == ("proj", "sweep-7", make_record().cell["id"])
    assert set(run.tags) == {"reap", "ratio 0.25", "code"}
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["cell"]["calibration"] == "code" and config["fingerprints"] == {"model": "abc"}

    summary: dict = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            for update in record.summary.update:
                summary[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    assert summary["code/pass@1"] == 0.75
    assert (summary["code/pass@1/low"], summary["code/pass@1/high"], summary["code/pass@1/n"]) == (
        0.3,
        0.95,
        4,
    )
    assert summary["multiple_choice/acc/math"] == 0.5
    assert summary["size/weights_bytes"] == 1000 and summary["seconds/evaluation"] == 2.5

    (table,) = folder.glob("wandb/offline-run-*/files/media/table/*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["task", "domain", "item", "score", "output", "detail"]
    assert [row[2] for row in content["data"]] == ["c0", "c1", "c2"]
    assert content["data"][1][4:] == ["def f(): return 1", '{"i": 1}']


def test_two_cells_are_two_runs_of_the_group_named_in_the_configuration(wandb_home):
    tracker = WandbTracker(mode="offline", folder=str(wandb_home / "out"), group="mine")
    for _ in range(2):
        tracker.log_cell(make_record(), [], group="sweep")
    logs = list((wandb_home / "out").glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2
    for log in logs:
        (run,) = (r.run for r in finished_log(log) if r.WhichOneof("record_type") == "run")
        assert run.run_group == "mine"


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


def test_failure_says_that_the_record_is_kept(wandb_home):
    blocked = wandb_home / "file"
    blocked.write_text("")
    with pytest.raises(WinnowError, match="whose record is stored"):
        WandbTracker(mode="offline", folder=str(blocked)).log_cell(make_record(), [], group="g")


def test_rows_hold_only_generated_texts_and_so_many_a_task():
    likelihoods = [Sample("multiple_choice", "q", 1.0)]
    writing = [Sample("writing", f"w{i}", 1.0, output="text") for i in range(5)]
    rows = generation_rows([*likelihoods, *writing, *SAMPLES], most=2)
    assert [(row[0], row[2]) for row in rows] == [
        ("code", "c0"),
        ("code", "c1"),
        ("writing", "w0"),
        ("writing", "w1"),
    ]


def test_tags_are_short_and_differ():
    record = make_record()
    record.cell.update(method="x" * 80, calibration="x" * 90)
    assert cell_tags(record) == ["x" * 64, "ratio 0.25"]


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
