"""What a job does, in whatever process an engine runs it, and what comes of it."""

import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from harness.calibration.cache import statistics_in
from harness.cells.room import CELLS_LEFT
from harness.claims import JOB, Busy, claimed
from harness.errors import WinnowError
from harness.exits import explain
from harness.logs import say_what_we_do
from harness.sweeps.graph import Job
from harness.sweeps.state import (
    CANCELLED,
    PACKAGE,
    SWEEP_FILE,
    Outcome,
    State,
    cells_left,
    log_file,
    note,
    read_sweep,
)

log = logging.getLogger(__name__)


def is_done(job: Job, root: Path) -> bool:
    """Whether what the job makes is there, whatever ``again`` says."""
    if not job.outputs or not all((root / output).is_file() for output in job.outputs):
        return False
    if job.kind == "calibrate":
        return frozenset(job.statistics) <= statistics_in(root / job.outputs[0])
    return True


def run_job(job: Job, needed: Mapping[str, Job], root: str, sweep: str) -> Outcome:
    """Run one job in the output folder ``root``, and note in the folder ``sweep`` what becomes of it.

    ``needed`` has the jobs that it needs. An error that belongs to the job becomes its outcome: engines see exceptions
    of their own alone.
    """
    folder, notes, started = Path(root), Path(sweep), time.time()
    here = Outcome(
        "running",
        host=socket.gethostname(),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        engine_id=os.environ.get(JOB, ""),
    )
    note(notes, job.key, here)
    if job.kind == "cell" and job.config["keep_checkpoint"] == "auto":
        os.environ[CELLS_LEFT] = str(max(0, cells_left(notes) - 1))
    with _logging_to(log_file(notes, job.key)):
        state, message = _tried(job, needed, folder, notes)
    seconds = time.time() - started
    outcome = replace(
        here,
        state=state,
        message=message,
        seconds=seconds,
        gpu_seconds=seconds * job.resources.gpus,
        peak_memory_gib=_peak_memory_gib(),
    )
    note(notes, job.key, outcome)
    return outcome


def _tried(job: Job, needed: Mapping[str, Job], root: Path, sweep: Path) -> tuple[State, str]:
    try:
        return _run(job, needed, root, sweep)
    except Busy as error:
        return "busy", str(error)
    except Exception as error:
        line = explain(error)
        if line is None:
            log.exception("this job failed")
            line = f"{type(error).__name__}: {error}"
        log.error("failed: %s", line)
        return "failed", line


def _run(job: Job, needed: Mapping[str, Job], root: Path, sweep: Path) -> tuple[State, str]:
    if not (sweep / SWEEP_FILE).is_file():
        raise WinnowError(f"{sweep} is not on {socket.gethostname()}: choose an output_dir that all machines share")
    if (sweep / CANCELLED).exists():
        return "cancelled", "cancelled by winnow-sweep"
    if (there := version(PACKAGE)) != (here := read_sweep(sweep)["winnow"]):
        raise WinnowError(f"{socket.gethostname()} has winnow {there}, and the sweep is of {here}: install the same")
    if is_done(job, root) and not job.again:
        return "done", ""
    lacking = [needed[key].label for key in job.needs if not is_done(needed[key], root)]
    if lacking and job.kind != "report":
        return "missing", f"it needs {' and '.join(lacking)}, which is not there"
    with claimed(root / "claims" / f"{job.key}.claim", job.label, wait=False):
        _WORK[job.kind](job, OmegaConf.create(dict(job.config)), root)
    if job.outputs and not is_done(job, root):
        raise WinnowError(f"{job.outputs[0]} is not in {root} now: is that the same folder on all machines?")
    return "done", ""


def _baseline(job: Job, config: DictConfig, root: Path) -> None:
    from harness.cells.run import run_baseline

    run_baseline(config)


def _calibrate(job: Job, config: DictConfig, root: Path) -> None:
    from harness.cells.run import run_calibration, run_shard

    of_part = config.calibration.get("shard") is not None
    (run_shard if of_part else run_calibration)(config, frozenset(job.statistics))


def _cell(job: Job, config: DictConfig, root: Path) -> None:
    from harness.cells.run import run_cell

    run_cell(config, frozenset(job.statistics))


def _report(job: Job, config: DictConfig, root: Path) -> None:
    from reports.cli import write_report

    log.info("report: %s", write_report(root, root / "report"))


_WORK = {"baseline": _baseline, "calibrate": _calibrate, "cell": _cell, "report": _report}


def _peak_memory_gib() -> float:
    """Of this process and of those that it has waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * unit / 2**30


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Meanwhile what is logged goes into ``file`` too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler, root = logging.FileHandler(file), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    say_what_we_do()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
