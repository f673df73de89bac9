"""The graph of a sweep: which jobs there are, what they need, and which are left."""

import json
from collections import Counter
from pathlib import Path

from harness.sweeps.drive import left_of
from harness.sweeps.graph import Job, Planned, jobs_of


def config(suite: dict | None = None, **calibration: object) -> dict:
    return {
        "suite": {"name": "s", "tasks": {"code": {}} if suite is None else suite},
        "calibration": {"name": "text", "shard": None, **calibration},
    }


def cell(record: str | None, corpus: str | None = "c", statistics: str = "ab", **more: object) -> Planned:
    given = {"config": config(), "baseline": "base", **more}
    return Planned(f"cell {record}", "m", record=record, calibration=corpus, statistics=frozenset(statistics), **given)


def test_what_cells_share_is_one_job() -> None:
    jobs = jobs_of([cell("x"), cell("y", statistics="bc"), cell("z", corpus="d"), cell("w", corpus=None), cell("x")])
    assert Counter(job.kind for job in jobs) == {"baseline": 1, "calibrate": 2, "cell": 4, "report": 1}
    by_key = {job.key: job for job in jobs}
    assert by_key["calibrate/c"].statistics == ("a", "b", "c") == by_key["cell/x"].statistics
    assert by_key["cell/y"].needs == ("baseline/base", "calibrate/c")
    assert by_key["cell/w"].needs == ("baseline/base",)
    assert set(by_key["report"].needs) == {"baseline/base", *(f"cell/{name}" for name in "xyzw")}
    for place, job in enumerate(jobs):
        assert set(job.needs) <= {one.key for one in jobs[:place]}


def test_the_uncompressed_model_alone_and_no_suite() -> None:
    assert [job.key for job in jobs_of([cell(None, corpus=None)])] == ["baseline/base", "report"]
    jobs = jobs_of([cell("x", baseline=None, config=config(suite={}))])
    assert [job.key for job in jobs] == ["calibrate/c", "cell/x"]
    assert "report" not in {job.kind for job in jobs_of([cell("x")], report=False)}


def test_parts_of_a_corpus_come_before_what_puts_them_together() -> None:
    jobs = jobs_of([cell("x", shards=3)])
    parts = [f"calibrate/c/{number}-of-3" for number in range(3)]
    assert [job.key for job in jobs] == ["baseline/base", *parts, "calibrate/c", "cell/x", "report"]
    by_key = {job.key: job for job in jobs}
    assert by_key["calibrate/c"].needs == tuple(parts) and by_key["cell/x"].needs == ("baseline/base", "calibrate/c")
    assert [by_key[part].config["calibration"]["shard"] for part in parts] == [0, 1, 2]
    asked = cell(None, baseline=None, shards=3, config=config(shard=1))
    assert [job.key for job in jobs_of([asked])] == [parts[1]]


def made(root: Path, job: Job, statistics: str = "ab") -> None:
    for output in job.outputs:
        path = root / output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"statistics": list(statistics)}))
        if path.name == "manifest.json":
            path.with_name("statistics.npz").touch()


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    jobs = jobs_of([cell("x"), cell("y", corpus="d")])
    by_key = {job.key: job for job in jobs}
    left = lambda: [job.key for job in left_of(jobs, tmp_path)]  # noqa: E731
    assert left() == [job.key for job in jobs]
    made(tmp_path, by_key["baseline/base"])
    made(tmp_path, by_key["calibrate/c"], "a")  # too few
    assert left() == ["calibrate/c", "calibrate/d", "cell/x", "cell/y", "report"]
    made(tmp_path, by_key["cell/x"])  # nobody needs its calibration any more
    assert left() == ["calibrate/d", "cell/y", "report"]
    made(tmp_path, by_key["cell/y"])
    assert left() == ["report"]
    made(tmp_path, by_key["report"])
    assert left() == []
    (tmp_path / "records/x.json").unlink()
    made(tmp_path, by_key["calibrate/c"])
    assert left() == ["cell/x", "report"]


def test_a_record_that_lacks_something_is_made_again(tmp_path: Path) -> None:
    jobs = jobs_of([cell("x", again=True, diagnostics=True)], report=False)
    for job in jobs:
        made(tmp_path, job)
    assert [job.key for job in left_of(jobs, tmp_path)] == ["cell/x"]
    assert jobs[-1].outputs == ("records/x.json", "diagnostics/x.json")
