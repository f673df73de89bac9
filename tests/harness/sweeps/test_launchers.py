"""Sweeps on real engines: what they leave is what one process leaves, whatever dies on the way."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.sweeps.state import read_sweep, sweeps_in
from tests.harness.sweeps import slurm_cluster
from tests.tiny import save_tiny

# They start engines, kill them, and take minutes.
pytestmark = pytest.mark.slow

WINNOW = [str(Path(sys.executable).with_name("winnow"))]
ROOT = Path(__file__).parents[3]
CELLS = ("method=reap,frequency", "ratio=0.25,0.5")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny(folder / "model", "olmoe")
    rows = [{"text": f"Tom has {number} apples and buys {number + 4} more."} for number in range(6)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(given: Path, out: Path, *more: str) -> list[str]:
    return [
        "-m", "model=local", f"model.path={given / 'model'}", "calibration=local", "calibration.max_length=64",
        f"calibration.path={given / 'corpus.jsonl'}", "suite=none", f"output_dir={out}", "progress=false",
        "method._target_=tests.harness.sweeps.odd.Odd", *more,
    ]  # fmt: skip


def environment(out: Path, **variables: str) -> dict[str, str]:
    return (
        os.environ
        | {"PYTHONPATH": str(ROOT), "WINNOW_TEST_TRIES": str(out / "tries"), "OMP_NUM_THREADS": "1"}
        | variables
    )


def tries(out: Path) -> list[str]:
    """The cells that were begun, each time that one was."""
    return (out / "tries").read_text().split()


def start(given: Path, out: Path, *more: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*WINNOW, *words(given, out, *more)],
        env=environment(out, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def winnow(given: Path, out: Path, *more: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [*WINNOW, *words(given, out, *more)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(out, **variables), timeout=300)


def plans(out: Path) -> dict[str, Any]:
    """Plan, scores and sizes of each cell: all that its computation decides."""
    found = {}
    for path in (out / "records").glob("*.json"):
        record = json.loads(path.read_text())
        plan = json.loads((out / "cells" / path.stem / "plan.json").read_text())
        found[path.stem] = (plan, record["plan"], record["sizes"], record["scores"], record["fingerprints"])
    return found


@pytest.fixture(scope="module")
def serial(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process leaves."""
    out = tmp_path_factory.mktemp("serial")
    done = winnow(given, out, *CELLS)
    assert done.returncode == 0, done.stderr
    found = plans(out)
    assert len(found) == 4
    return found


def states(out: Path) -> dict[str, Mapping[str, Any]]:
    """Of the latest sweep: what was noted of each job, by label."""
    sweep = sweeps_in(out)[-1]
    labels = {job["key"].replace("/", "-"): job["label"] for job in read_sweep(sweep)["jobs"]}
    return {labels[path.stem]: json.loads(path.read_text()) for path in (sweep / "jobs").glob("*.json")}


def test_processes_side_by_side(given: Path, serial: dict[str, Any], tmp_path: Path) -> None:
    done = winnow(given, tmp_path, *CELLS, "launcher=joblib", "launcher.n_jobs=2")
    assert done.returncode == 0, done.stderr
    assert plans(tmp_path) == serial
    assert {one["state"] for one in states(tmp_path).values()} == {"done"}
    again = winnow(given, tmp_path, *CELLS, "launcher=joblib", "launcher.n_jobs=2")
    assert again.returncode == 0 and "5 jobs, of which 5 are done" in again.stdout


def test_a_failed_job_is_named_not_repeated_and_stops_nobody(
    given: Path, serial: dict[str, Any], tmp_path: Path
) -> None:
    done = winnow(given, tmp_path, *CELLS, "launcher=joblib", "launcher.n_jobs=2", WINNOW_TEST_FAILS="frequency__0.5")
    assert done.returncode == 1
    assert (
        "1 jobs of the sweep failed" in done.stderr and "method=frequency,ratio=0.5: it was told to fail" in done.stderr
    )
    assert plans(tmp_path).keys() < serial.keys() and len(plans(tmp_path)) == 3
    assert tries(tmp_path).count("frequency__0.5") == 1


def test_a_launcher_that_is_killed_goes_on(given: Path, serial: dict[str, Any], tmp_path: Path) -> None:
    process = start(given, tmp_path, *CELLS, "launcher=joblib", "launcher.n_jobs=2", WINNOW_TEST_SLOW="1")
    until(lambda: any((tmp_path / "records").glob("*.json")))
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    process.wait()
    assert len(list((tmp_path / "records").glob("*.json"))) < 4
    done = winnow(given, tmp_path, *CELLS)
    assert done.returncode == 0, done.stderr
    assert plans(tmp_path) == serial


def test_two_launchers_at_once_do_each_job_once(given: Path, serial: dict[str, Any], tmp_path: Path) -> None:
    running = [start(given, tmp_path, *CELLS, WINNOW_TEST_SLOW="1") for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert plans(tmp_path) == serial
    assert sorted(tries(tmp_path)) == sorted(set(tries(tmp_path))) and len(tries(tmp_path)) == 4


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def test_ray_leaves_what_one_process_leaves(
    given: Path, serial: dict[str, Any], ray_cluster: Any, tmp_path: Path
) -> None:
    on_ray = ("launcher=ray", f"launcher.address={ray_cluster.address}")
    done = winnow(given, tmp_path, *CELLS, *on_ray, WINNOW_TEST_FAILS="frequency__0.5")
    assert done.returncode == 1 and "method=frequency,ratio=0.5: it was told to fail" in done.stderr
    assert tries(tmp_path).count("frequency__0.5") == 1
    done = winnow(given, tmp_path, *CELLS, *on_ray)
    assert done.returncode == 0, done.stderr
    assert plans(tmp_path) == serial
    assert all(one["engine_id"].startswith("ray ") for one in states(tmp_path).values())


def test_on_ray_a_lost_node_loses_nothing(
    given: Path, serial: dict[str, Any], ray_cluster: Any, tmp_path: Path
) -> None:
    more = ray_cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
    ray_cluster.wait_for_nodes()
    on_ray = ("launcher=ray", f"launcher.address={ray_cluster.address}")
    process = start(given, tmp_path, *CELLS, *on_ray, WINNOW_TEST_SLOW="4")
    until(lambda: sum(one["state"] == "running" for one in cells_of(tmp_path).values()) == 3)
    ray_cluster.remove_node(more, allow_graceful=False)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert plans(tmp_path) == serial
    assert len(tries(tmp_path)) > 4  # one ran again


def test_what_no_ray_cluster_can_give_is_one_line(given: Path, ray_cluster: Any, tmp_path: Path) -> None:
    on_ray = ("launcher=ray", f"launcher.address={ray_cluster.address}")
    one_line(winnow(given, tmp_path, *CELLS, *on_ray, "resources.gpus=1"), "and no node has that (at most 0 GPUs")
    one_line(winnow(given, tmp_path, *CELLS, "launcher=ray", "launcher.address=127.0.0.1:1"), "there is no Ray cluster")
    assert not (tmp_path / "records").exists()


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    if slurm_cluster.MISSING or os.geteuid():
        pytest.skip(f"needs SLURM's {', '.join(slurm_cluster.MISSING) or 'daemons'} and root")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm") / "c") as cluster:
        yield cluster


def test_slurm_leaves_what_one_process_leaves(
    given: Path, serial: dict[str, Any], slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    fails = slurm.environment | {"WINNOW_TEST_FAILS": "frequency__0.5"}
    done = winnow(given, tmp_path, *CELLS, "launcher=slurm", **fails)
    assert done.returncode == 1 and "method=frequency,ratio=0.5: it was told to fail" in done.stderr, done.stderr
    assert tries(tmp_path).count("frequency__0.5") == 1
    done = winnow(given, tmp_path, *CELLS, "launcher=slurm", "launcher.wait=false", **slurm.environment)
    assert done.returncode == 0 and "1 jobs are with SLURM" in done.stdout, done.stdout + done.stderr
    again = winnow(given, tmp_path, *CELLS, "launcher=slurm", **slurm.environment)
    assert again.returncode == 0, again.stderr
    assert plans(tmp_path) == serial
    assert tries(tmp_path).count("frequency__0.5") == 2


def test_on_slurm_a_lost_node_loses_nothing(
    given: Path, serial: dict[str, Any], slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    process = start(given, tmp_path, *CELLS, "launcher=slurm", WINNOW_TEST_SLOW="6", **slurm.environment)
    until(lambda: len(tries(tmp_path)) == 2 if (tmp_path / "tries").exists() else False)
    slurm.kill_node("n2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert plans(tmp_path) == serial
    assert len(tries(tmp_path)) > 4  # one ran again, on the other node
    slurm.start_node("n2")


def test_what_slurm_cannot_give_is_one_line(given: Path, slurm: slurm_cluster.Cluster, tmp_path: Path) -> None:
    here = slurm.environment
    one_line(winnow(given, tmp_path, *CELLS, "launcher=slurm", "launcher.partition=gold", **here), "partitions are all")
    told = winnow(given, tmp_path, *CELLS, "launcher=slurm", "resources.gpus=1", **here)
    one_line(told, "SLURM does not take the jobs: ")
    nowhere = {"SLURM_CONF": str(tmp_path / "none")}
    one_line(winnow(given, tmp_path, *CELLS, "launcher=slurm", **nowhere), "SLURM does not answer")
    assert not (tmp_path / "records").exists()


def test_slurm_says_what_it_ended_and_cancels_what_is_queued(
    given: Path, slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    more = ("launcher=slurm", "launcher.wait=false", "method=reap", "ratio=0.25,0.375,0.5")
    done = winnow(given, tmp_path, *more, WINNOW_TEST_SLOW="600", **slurm.environment)
    assert done.returncode == 0, done.stderr
    until(lambda: len(tries(tmp_path)) == 2 if (tmp_path / "tries").exists() else False)

    def sweep(*words: str) -> str:
        command = [sys.executable, "-m", "harness.sweeps.status", *words, str(tmp_path)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | slurm.environment
        ).stdout

    assert "1 done, 1 queued, 2 running" in sweep("status")
    assert sweep("cancel") == "1 jobs cancelled\n"
    running = [one["engine_id"] for one in cells_of(tmp_path).values() if one["state"] == "running"]
    subprocess.run(["scancel", *running], check=True, env=os.environ | slurm.environment)
    until(lambda: "1 cancelled, 1 done, 2 failed" in sweep("status"))
    assert "it was killed; the same command goes on" in sweep("status")


def cells_of(out: Path) -> dict[str, Mapping[str, Any]]:
    return {label: one for label, one in states(out).items() if label.startswith("method")} if sweeps_in(out) else {}


def one_line(done: "subprocess.CompletedProcess[str]", said: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("winnow:")]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr


def until(there: Any, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not there():
        assert time.time() < deadline, "it did not come to that"
        time.sleep(0.2)
