"""Two runs in one folder: files of single cells appear whole, another cell's are never replaced, and the notes of a
sweep belong to that sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

import pytest

from harness.cells.publish import check_free, publish
from harness.errors import WinnowError
from harness.records.store import RecordStore
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[3]


def finished(root: Path, cell: str) -> Path:
    folder = root / "cells" / cell
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "config.json").write_text(json.dumps({"of": cell}))
    for name in ("plan.json", "saliency.json"):
        (folder / name).write_text(json.dumps({"of": cell}))
    return folder


def owners(root: Path) -> set[str]:
    names = ("plan.json", "saliency.json", "checkpoint/config.json")
    return {json.loads((root / name).read_text())["of"] for name in names}


@pytest.mark.parametrize("order", permutations(("first", "second")))
def test_the_files_of_another_cell_are_never_replaced(tmp_path: Path, order: tuple[str, str]):
    one, other = order
    folders = {name: finished(tmp_path, name) for name in order}
    publish(folders[one], tmp_path, one)
    with pytest.raises(WinnowError, match=f"holds the files of the cell {one}: choose another output_dir, or delete"):
        publish(folders[other], tmp_path, other)
    with pytest.raises(WinnowError):
        check_free(tmp_path, other)
    assert owners(tmp_path) == {one}
    check_free(tmp_path, one)
    publish(finished(tmp_path / "again", one), tmp_path, one)  # the same cell once more
    assert owners(tmp_path) == {one}


def test_files_that_nobody_signed_are_not_replaced(tmp_path: Path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(WinnowError, match="holds the files of another run"):
        check_free(tmp_path, "mine")
    assert (tmp_path / "plan.json").read_text() == "{}"


def command(folder: Path, *more: str) -> list[str]:
    return [
        str(Path(sys.executable).with_name("winnow")),
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none", "ratio=0.5",
        f"output_dir={folder / 'out'}", "progress=false", *more,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "qwen3_moe")
    (tmp_path / "corpus.jsonl").write_text(3 * (json.dumps({"text": "Tom has 3 apples and buys 4 more."}) + "\n"))
    return tmp_path


def test_two_single_cells_at_once_keep_their_records_apart(folder: Path):
    running = [
        subprocess.Popen(command(folder, f"method={method}"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for method in ("reap", "hc_smoe")
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert sorted(process.returncode for process in running) == [0, 2], errors
    assert any("holds the files of the cell" in error for error in errors)
    owner = json.loads((folder / "out" / "cell.json").read_text())["cell"]
    plan = (folder / "out" / "cells" / owner / "plan.json").read_bytes()
    assert (folder / "out" / "plan.json").read_bytes() == plan
    assert owner in RecordStore(folder / "out").ids()


def test_a_terminated_run_ends_like_an_interrupted_one_and_goes_on(folder: Path):
    process = subprocess.Popen(command(folder, "method=m_smoe"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on where it stopped" in error
    assert subprocess.run(command(folder, "method=m_smoe"), cwd=ROOT, capture_output=True).returncode == 0
    assert len(RecordStore(folder / "out").ids()) == 1
