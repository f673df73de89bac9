"""Claims: one holder at a time, whatever dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import claims
from harness.claims import JOB, Busy, claimed, holder, is_held
from harness.errors import WinnowError

HOLD = """
import sys, time
from pathlib import Path
from harness.claims import claimed
with claimed(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""

COUNT = """
import sys, time
from pathlib import Path
from harness.claims import claimed
file = Path(sys.argv[2])
for _ in range(20):
    with claimed(Path(sys.argv[1]), "it"):
        number = int(file.read_text())
        time.sleep(0.001)
        file.write_text(str(number + 1))
"""


def hold(path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("0")
    words = [sys.executable, "-c", COUNT, str(tmp_path / "a.claim"), str(file)]
    running = [subprocess.Popen(words, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert file.read_text() == "80" and not list(tmp_path.glob("*.claim*"))


def test_a_claim_of_a_living_process_stands_and_that_of_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.claim"
    process = hold(path)
    try:
        with (
            pytest.raises(Busy, match=f"the cell is being made by process {process.pid} on "),
            claimed(path, "the cell", wait=False),
        ):
            pass
        assert is_held(path) and str(process.pid) in holder(path)
    finally:
        process.kill()
        process.wait()
    assert not is_held(path)
    with claimed(path, "the cell", wait=False):
        assert f"process {os.getpid()} " in holder(path)
    assert not path.exists() and holder(path) == ""


def elsewhere(path: Path, age: float, job: str = "") -> None:
    path.write_text(
        json.dumps({"token": "x", "host": "another", "boot": "b", "space": "s", "pid": 1, "born": 1.0, "job": job})
    )
    os.utime(path, (time.time() - age,) * 2)


def test_of_another_machine_the_heartbeat_tells(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    elsewhere(path, age=claims.DEAD_AFTER / 2)
    with pytest.raises(Busy, match="process 1 on another"), claimed(path, "it", wait=False):
        pass
    elsewhere(path, age=claims.DEAD_AFTER * 2)
    with claimed(path, "it", wait=False):
        pass
    path.write_text("")  # of one who died before it wrote its name
    with pytest.raises(Busy), claimed(path, "it", wait=False):
        pass


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.05)
    path = tmp_path / "a.claim"
    with claimed(path, "it"):
        os.utime(path, (1.0, 1.0))
        deadline = time.time() + 10
        while path.stat().st_mtime == 1.0 and time.time() < deadline:
            time.sleep(0.05)
        assert time.time() - path.stat().st_mtime < 60


def test_a_job_that_an_engine_runs_again_takes_its_own_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.claim"
    elsewhere(path, age=0, job="7_1")
    monkeypatch.setenv(JOB, "7_2")
    with pytest.raises(Busy, match="job 7_1"), claimed(path, "it", wait=False):
        pass
    monkeypatch.setenv(JOB, "7_1")
    with claimed(path, "it", wait=False):
        pass


def test_whoever_died_while_taking_over_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    elsewhere(path, age=claims.DEAD_AFTER * 2)
    beside = tmp_path / "a.claim.taken"
    beside.touch()
    os.utime(beside, (time.time() - claims.DEAD_AFTER * 2,) * 2)
    with claimed(path, "it", wait=False):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WinnowError, match="cannot write in"), claimed(tmp_path / "file" / "a.claim", "it"):
        pass
