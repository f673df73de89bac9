"""Records under the ids of before: what ``winnow-report migrate`` makes of them."""

import contextlib
import hashlib
import json
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cells import migrate as migration
from harness.cells.migrate import migrate, renamed
from harness.contracts.record import RECORD_VERSION
from harness.errors import WinnowError
from harness.files import write_files
from harness.records.store import RecordStore
from harness.reference import MODEL_FOLDER

EXAMPLES = Path(__file__).parents[3] / "results"


def old_folder(tmp_path: Path) -> Path:
    """Two cells and their baseline as version 1 wrote them, with plan and diagnostics of one."""
    root = tmp_path / "old"
    for kind, names in (("records", ("first", "second")), ("baseline", ("whole",))):
        for name in names:
            record = _old_record(name, uncompressed=kind == "baseline")
            write_files({root / kind / f"{name}.json": json.dumps(record).encode()})
            shutil.copy(next((EXAMPLES / "reference" / kind).glob("*.parquet")), root / kind / f"{name}.parquet")
    write_files(
        {
            root / "cells" / "first" / "plan.json": b"{}",
            root / "diagnostics" / "first.json": json.dumps({"cell": "first", "layers": {}}).encode(),
        }
    )
    return root


def _old_record(name: str, uncompressed: bool) -> dict:
    cell = {"model": "m", "method": "none" if uncompressed else "reap", "ratio": 0.0 if uncompressed else 0.5}
    cell |= {"calibration": "none" if uncompressed else "code", "seed": int(name == "second"), "suite": "s"}
    cell |= {"backend": "hf", "id": name} | ({} if uncompressed else {"baseline": "whole"})
    config = {
        "model": {"dtype": "float32"},
        "method": {"_target_": "methods.pruning.ExpertPruning", "name": "reap"},
        "calibration": {"name": "code"},
        "suite": {"name": "s", "tasks": {"code": {"_target_": "tasks.code.CodeTask"}}},
        "backend": {"name": "hf", "open": {}},
        "layout": "compact",
    }
    score = {"task": "code", "metric": "pass@1", "value": 0.5, "n": 2, "low": 0.1, "high": 0.9, "domain": ""}
    return {
        "cell": cell, "config": config, "versions": {}, "fingerprints": {"model": "sha256:1"}, "sizes": {},
        "scores": [score | {"higher_is_better": True}], "timings": {}, "version": 1,
    }  # fmt: skip


def snapshot(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".claims" not in path.parts
    }


def test_everything_that_bears_an_old_id_gets_the_new_one(tmp_path: Path):
    root = old_folder(tmp_path)
    assert migrate(root) == (3, 3)
    baseline = RecordStore(root, "baseline")
    (whole,) = baseline.ids()
    records = {record.was[0]: record for record in map(RecordStore(root).read, RecordStore(root).ids())}
    assert sorted(records) == ["first", "second"]
    first = records["first"]
    new = first.cell["id"]
    assert new != "first" and first.cell["baseline"] == whole
    assert (first.method_version, first.task_versions, first.version) == ("1", {"code": "1"}, RECORD_VERSION)
    assert (first.scores[0].kind, first.scores[0].domain) == ("generative", "code")
    assert baseline.read(whole).was == ["whole"]
    samples = RecordStore(root).samples_path(new).read_bytes()
    assert first.samples_sha256 == hashlib.sha256(samples).hexdigest()
    assert RecordStore(root).read_samples(new) and baseline.read_samples(whole)
    assert (root / "cells" / new / "plan.json").is_file()
    assert json.loads((root / "diagnostics" / f"{new}.json").read_text())["cell"] == new
    names = snapshot(root)
    assert not any("first" in name or "second" in name or "whole" in name for name in names)
    assert len(names) == 8


def test_a_second_migration_finds_nothing_to_do(tmp_path: Path):
    root = old_folder(tmp_path)
    migrate(root)
    before = snapshot(root)
    assert migrate(root) == (0, 3)
    assert snapshot(root) == before


def test_a_migration_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = old_folder(tmp_path)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    migrate(whole)
    written = write_files

    class Stopped(Exception):
        pass

    for steps in range(5):  # stopped after so many files were written
        left = steps

        def limited(contents):
            nonlocal left
            if left == 0:
                raise Stopped
            left -= 1
            written(contents)

        monkeypatch.setattr(migration, "write_files", limited)
        with contextlib.suppress(Stopped):
            migrate(stopped)
    monkeypatch.setattr(migration, "write_files", written)
    migrate(stopped)
    assert snapshot(stopped) == snapshot(whole)


def test_two_records_of_one_cell_are_not_merged(tmp_path: Path):
    root = old_folder(tmp_path)
    store = RecordStore(root)
    twin = renamed(store.read("first"))
    write_files({store.path(twin.cell["id"]): json.dumps(twin.to_json() | {"was": []}).encode()})
    with pytest.raises(WinnowError, match="are the same cell: delete one of them"):
        migrate(root)
    assert store.exists("first")


def test_a_folder_without_records_is_named(tmp_path: Path):
    with pytest.raises(WinnowError, match="no records in .*: give the output_dir of a run"):
        migrate(tmp_path)


def test_fingerprints_are_completed_where_what_they_are_of_is_certain():
    store = RecordStore(EXAMPLES / "reference", "baseline")
    whole = store.read(store.ids()[0])
    told = whole.fingerprints
    old = replace(
        whole,
        fingerprints={"model": told["model"]},
        config=whole.config | {"model": whole.config["model"] | {"path": str(MODEL_FOLDER)}},
        versions=whole.versions | {"python": platform.python_version()},
    )
    completed = renamed(old).fingerprints
    assert completed.keys() == {"model", "tokenizer", "items/perplexity"}
    assert completed["tokenizer"] == told["tokenizer"]
    if whole.versions["python"] == platform.python_version():
        assert completed == told
    for unknown in (
        replace(old, versions={"python": "2.7.0"}),
        replace(old, fingerprints={"model": "sha256:another"}),
        replace(old, config=old.config | {"model": old.config["model"] | {"path": "gone"}}),
    ):
        assert renamed(unknown).fingerprints == unknown.fingerprints


@pytest.mark.parametrize("sweep", ["reference", "claims", "channels_vs_experts", "routing", "smollm2"])
def test_the_committed_records_have_their_ids(sweep: str):
    """The id of each is what its own configuration gives, so that the command that made it finds it finished."""
    for kind in ("records", "baseline"):
        store = RecordStore(EXAMPLES / sweep, kind)
        for name in store.ids():
            record = store.read(name)
            assert renamed(record) == record
            assert record.was
