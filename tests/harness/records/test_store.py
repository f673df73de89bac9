import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from harness.contracts.record import Record, Sample, Score
from harness.errors import WinnowError
from harness.files import write_files
from harness.records.identity import cell_id
from harness.records.store import RecordStore

CELL = {"model": "reference", "method": "reap", "ratio": 0.25, "calibration": "code", "seed": 0}
SAMPLES = [
    Sample("code", "c1", 1.0, output="return 'ü'", detail={"error": None, "tests": [True, False]}),
    Sample("perplexity", "p1", 31.5, weight=12.0, domain="math"),
]


def make_record(cell: str = "a", value: float = 0.5) -> Record:
    return Record(
        cell={**CELL, "id": cell},
        config={"ratio": 0.25},
        versions={"winnow": "0"},
        fingerprints={"model": "abc"},
        scores=[Score("code", "pass@1", value, 2, 0.1, 0.9)],
        sizes={"weights_bytes": 10},
        timings={"evaluation": 1.5},
        expert_usage={"code": {"0": [1, 2]}},
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_read_back(tmp_path):
    store = RecordStore(tmp_path)
    assert not store.exists("a") and store.ids() == []
    assert store.write(make_record(), SAMPLES) == tmp_path / "records" / "a.json"
    assert store.exists("a") and store.ids() == ["a"]
    assert replace(store.read("a"), samples_sha256="") == make_record()
    assert store.read("a").samples_sha256 == hashlib.sha256(store.samples_path("a").read_bytes()).hexdigest()
    assert store.read_samples("a") == SAMPLES
    assert files(tmp_path) == {"records/a.json", "records/a.parquet"}


def test_baselines_are_kept_apart(tmp_path):
    RecordStore(tmp_path, "baseline").write(make_record(), [])
    assert files(tmp_path) == {"baseline/a.json", "baseline/a.parquet"}
    assert not RecordStore(tmp_path).exists("a")
    assert RecordStore(tmp_path, "baseline").read_samples("a") == []


def test_samples_are_zstd_parquet_with_the_agreed_columns(tmp_path):
    RecordStore(tmp_path).write(make_record(), SAMPLES)
    metadata = pq.read_metadata(tmp_path / "records" / "a.parquet")
    assert metadata.schema.names == ["task", "item", "domain", "score", "weight", "output", "detail", "prompt"]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_samples_may_be_missing(tmp_path):
    store = RecordStore(tmp_path)
    store.write(make_record(), SAMPLES)
    store.samples_path("a").unlink()
    assert store.read_samples("a") is None and replace(store.read("a"), samples_sha256="") == make_record()


def test_numbers_of_numpy_paths_and_infinities_survive(tmp_path):
    record = replace(
        make_record(value=float("inf")),
        sizes={"weights_bytes": np.int64(7), "checkpoint": Path("x/y")},
        expert_usage={"code": {"0": np.array([3, 4])}},
    )
    RecordStore(tmp_path).write(record, [Sample("code", "c", np.float32(0.5), detail={"n": np.int32(3)})])
    read = RecordStore(tmp_path).read("a")
    assert read.sizes == {"weights_bytes": 7, "checkpoint": "x/y"}
    assert read.expert_usage == {"code": {"0": [3, 4]}} and read.scores[0].value == float("inf")
    assert RecordStore(tmp_path).read_samples("a") == [Sample("code", "c", 0.5, detail={"n": 3})]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "scores": [{"task": 1}]}', "\xff"]
)
def test_damaged_record_names_the_file_and_what_to_do(tmp_path, damage):
    store = RecordStore(tmp_path)
    store.write(make_record(), [])
    store.path("a").write_bytes(damage.encode("latin-1"))
    with pytest.raises(WinnowError, match="delete it and run its cell again") as error:
        store.read("a")
    assert str(store.path("a")) in str(error.value) and "\n" not in str(error.value)


def test_record_of_a_newer_version_is_not_misread(tmp_path):
    store = RecordStore(tmp_path)
    store.write(replace(make_record(), version=99), [])
    with pytest.raises(WinnowError, match="newer version"):
        store.read("a")


def test_missing_and_damaged_files_are_clear(tmp_path):
    store = RecordStore(tmp_path)
    with pytest.raises(WinnowError, match="cannot read the record"):
        store.read("a")
    store.write(make_record(), SAMPLES)
    store.samples_path("a").write_bytes(b"PAR1 no")
    with pytest.raises(WinnowError, match=r"a\.parquet"):
        store.read_samples("a")


@pytest.mark.parametrize("failing", ["first", "second"])
def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing):
    store = RecordStore(tmp_path)
    store.write(make_record(value=0.5), SAMPLES)
    before = {path: path.read_bytes() for path in store.folder.iterdir() if path.is_file()}
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == {"first": 1, "second": 2}[failing]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(WinnowError, match="no space left"):
        store.write(make_record(value=0.9), [])
    assert {path: path.read_bytes() for path in store.folder.iterdir() if path.is_file()} == before


def test_write_cut_short_by_the_system_leaves_nothing(tmp_path):
    """A real failure in the middle of a write: the process may not write files past 2 kB."""
    code = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from harness.errors import WinnowError
from tests.harness.records.test_store import RecordStore, Sample, make_record
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    noise = "".join(chr(33 + i * i * 7919 % 9001) for i in range(9001))
    RecordStore(sys.argv[1]).write(make_record(), [Sample("code", "c", 1.0, output=noise)])
except WinnowError as error:
    print(error)
"""
    root = str(Path(__file__).parents[3])
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path), root], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("no space left to write in"), run.stderr
    assert files(tmp_path) == set()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    store = RecordStore(tmp_path / "blocked")
    with pytest.raises(WinnowError, match="cannot write in"):
        store.write(make_record(), [])
    with pytest.raises(WinnowError, match="cannot write in"), store.claim("a"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WinnowError, match="choose a folder that you may write to"):
        RecordStore(tmp_path).write(make_record(), [])


def test_files_are_readable_for_whom_the_umask_allows(tmp_path):
    old = os.umask(0o022)
    try:
        write_files({tmp_path / "x": b"1"})
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_claim_gives_a_cell_to_one_and_skips_it_for_the_next(tmp_path):
    store = RecordStore(tmp_path)
    with store.claim("a") as mine:
        assert mine
        store.write(make_record(), [])
    with store.claim("a") as mine:
        assert not mine
    assert store.ids() == ["a"]


def test_claim_is_released_when_the_cell_fails(tmp_path):
    store = RecordStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.claim("a"):
        raise KeyboardInterrupt
    with store.claim("a") as mine:
        assert mine


def test_threads_never_compute_the_same_cell_twice(tmp_path):
    computed = []

    def work() -> None:
        with RecordStore(tmp_path).claim("a") as mine:
            if mine:
                computed.append(1)
                time.sleep(0.1)
                RecordStore(tmp_path).write(make_record(), [])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [1]


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from tests.harness.records.test_store import RecordStore, SAMPLES, make_record
store = RecordStore(sys.argv[1])
with store.claim("a") as mine:
    (store.folder / ".a.left.tmp").write_text("half")
    print(mine, flush=True)
    time.sleep(float(sys.argv[3]))
    store.write(make_record(value=0.75), SAMPLES)
"""


def hold(folder: Path, seconds: float) -> subprocess.Popen:
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), root, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


def test_second_process_waits_then_finds_the_record(tmp_path, caplog):
    caplog.set_level("INFO")
    process = hold(tmp_path, 0.5)
    with RecordStore(tmp_path).claim("a") as mine:
        assert not mine
        assert RecordStore(tmp_path).read("a").scores[0].value == 0.75
    assert process.wait() == 0
    assert "waiting" in caplog.text


def test_killed_process_leaves_nothing_that_counts(tmp_path):
    process = hold(tmp_path, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = RecordStore(tmp_path)
    assert (store.folder / ".a.left.tmp").exists() and store.ids() == []
    (store.folder / ".b.other.tmp").write_text("of a cell that another process is writing")
    with store.claim("a") as mine:
        assert mine
        assert not (store.folder / ".a.left.tmp").exists()
        assert (store.folder / ".b.other.tmp").exists()


def test_cell_id_is_readable_and_safe():
    name = cell_id({**CELL, "model": "org/Model 7B", "calibration": "a:1024,b:512"}, {})
    assert name.rpartition("-")[0] == "org-Model-7B__reap__0.25__a-1024-b-512__s0"
    assert len(name.rpartition("-")[2]) == 8
    assert len(cell_id({**CELL, "model": "x/" * 500}, {})) < 200


def test_cell_id_changes_with_all_that_changes_the_result_and_nothing_else():
    identity = {"calibration": {"max_length": 256, "parts": ["a", "b"]}, "model": {"path": None}}
    name = cell_id(CELL, identity)
    assert name == cell_id({**CELL, "id": "whatever"}, json.loads(json.dumps(identity)))
    assert name == cell_id(dict(reversed(CELL.items())), dict(reversed(identity.items())))
    assert name != cell_id({**CELL, "seed": 1}, identity)
    assert name != cell_id({**CELL, "suite": "demo"}, identity)
    assert name != cell_id(CELL, {**identity, "calibration": {"max_length": 128, "parts": ["a", "b"]}})
    assert name != cell_id(CELL, {**identity, "calibration": {"max_length": 256, "parts": ["b", "a"]}})
    assert cell_id({**CELL, "ratio": 0}, {"x": 1.0}) == cell_id({**CELL, "ratio": 0.0}, {"x": 1})
    assert cell_id(CELL, {"x": True}) != cell_id(CELL, {"x": 1})


def test_cell_id_refuses_what_has_no_stable_text():
    with pytest.raises(TypeError, match="object"):
        cell_id(CELL, {"x": object()})


@pytest.mark.parametrize("place", range(0, 2000, 97))
def test_no_flipped_byte_of_the_samples_is_used_in_silence(tmp_path, place):
    store = RecordStore(tmp_path)
    store.write(make_record(), SAMPLES)
    content = bytearray(store.samples_path("a").read_bytes())
    content[place % len(content)] ^= 0x20
    store.samples_path("a").write_bytes(bytes(content))
    with pytest.raises(WinnowError, match="are damaged"):
        store.read_samples("a")


def test_the_samples_of_another_record_are_found_out(tmp_path):
    store = RecordStore(tmp_path)
    store.write(make_record(), SAMPLES)
    store.write(make_record("b"), SAMPLES[:1])
    shutil.copy(store.samples_path("b"), store.samples_path("a"))
    with pytest.raises(WinnowError, match="not the file that its record was written with"):
        store.read_samples("a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1, np.float64(0.5), np.float32(0.5)])
def test_any_number_of_a_task_can_be_read_back(tmp_path, value):
    store = RecordStore(tmp_path)
    store.write(make_record(value=value), [])
    assert np.array_equal(store.read("a").scores[0].value, float(value), equal_nan=True)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: [], "it holds no JSON object"),
        (lambda data: data["scores"][0].update(value="high"), r"scores.0.value: Input should be a valid number"),
        (lambda data: data["scores"][0].update(part=None), r"scores.0.part: Input should be a valid string"),
        (lambda data: data["scores"][0].pop("task"), "task"),
        (lambda data: data["cell"].pop("id"), "id"),
        (lambda data: data["cell"].update(ratio="half"), "cell.ratio is 'half'"),
        (lambda data: data["sizes"].update(weights_bytes="many"), "sizes.weights_bytes is 'many'"),
        (lambda data: data["timings"].update(load="long"), "timings.load"),
        (lambda data: data.update(expert_usage={"code": {"0": "none"}}), "expert_usage.code.0"),
        (lambda data: data.update(colour="red"), "colour"),
    ],
)
def test_values_of_another_type_are_damage(tmp_path, spoil, says):
    store = RecordStore(tmp_path)
    store.write(make_record(), [])
    data = json.loads(store.path("a").read_text())
    changed = spoil(data)
    store.path("a").write_text(json.dumps(changed if isinstance(changed, list) and not changed else data))
    with pytest.raises(WinnowError, match=f"is damaged .*{says}.*: delete it and run its cell again") as told:
        store.read("a")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_stands_in_the_place_of_samples_is_damage(tmp_path, kind):
    store = RecordStore(tmp_path)
    store.write(make_record(), SAMPLES)
    path = store.samples_path("a")
    path.unlink()
    path.mkdir() if kind == "folder" else path.symlink_to(path)
    with pytest.raises(WinnowError, match=r"a\.parquet are damaged"):
        store.read_samples("a")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table.drop_columns(["score"]), "have no column score"),
        (lambda table: table.set_column(3, "score", table["item"]), "column score is not of double"),
        (lambda table: table.set_column(6, "detail", table["item"]), "are damaged"),
    ],
)
def test_samples_of_other_columns_are_damage(tmp_path, change, says):
    """In a record from before checksums were kept, which would tell."""
    store = RecordStore(tmp_path)
    store.write(make_record(), SAMPLES)
    pq.write_table(change(pq.read_table(store.samples_path("a"))), store.samples_path("a"))
    store.path("a").write_text(json.dumps(json.loads(store.path("a").read_text()) | {"samples_sha256": ""}))
    with pytest.raises(WinnowError, match=says):
        store.read_samples("a")
