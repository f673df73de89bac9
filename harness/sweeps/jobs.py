"""What a job does, in whatever process an engine runs it, and what comes of it."""

import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from harness.claims import Busy, claimed
from harness.errors import WinnowError
from harness.exits import explain
from harness.sweeps.graph import Job

log = logging.getLogger(__name__)

# busy: another launcher is at work on it. missing: what it needs is not there.
State = Literal["waiting", "running", "done", "failed", "busy", "missing"]


@dataclass(frozen=True)
class Outcome:
    """``gpu_seconds``: seconds times GPUs that the job had. ``peak_memory_gib`` is of the host, of the largest process.

    ``message`` says why where it is not done."""

    state: State
    message: str = ""
    host: str = ""
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory_gib: float = 0.0
    started: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_done(job: Job, root: Path) -> bool:
    """Whether what the job makes is there."""
    if not job.outputs or not all((root / output).is_file() for output in job.outputs):
        return False
    if job.kind == "calibrate":
        from harness.calibration.cache import has_statistics

        return has_statistics((root / job.outputs[0]).parent, frozenset(job.statistics))
    return True


def missing_inputs(job: Job, jobs: Mapping[str, Job], root: Path) -> list[str]:
    """The labels of the jobs that it needs and that are not done."""
    return [jobs[key].label for key in job.needs if not is_done(jobs[key], root)]


def run_job(job: Job, needs: Mapping[str, Job], root: str, log_file: str = "") -> Outcome:
    """Run one job; ``needs`` are those that it needs, ``root`` is the output folder.

    An error that belongs to the job becomes its outcome: engines see exceptions of their own alone.
    """
    folder, started = Path(root), time.time()
    with _logging_to(log_file):
        try:
            state, message = _run(job, needs, folder)
        except KeyboardInterrupt:
            raise
        except Busy as error:
            state, message = "busy", str(error)
        except BaseException as error:
            line = explain(error)
            if line is None:
                log.exception("this job failed")
                line = f"{type(error).__name__}: {error}"
            state, message = "failed", line
    seconds = time.time() - started
    return Outcome(
        state,
        message,
        socket.gethostname(),
        seconds,
        seconds * job.resources.gpus,
        _peak_memory_gib(),
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
    )


def _run(job: Job, needs: Mapping[str, Job], root: Path) -> tuple[State, str]:
    if is_done(job, root):
        return "done", ""
    lacking = missing_inputs(job, needs, root)
    if lacking and job.kind != "report":
        return "missing", f"it needs {' and '.join(lacking)}, which is not there"
    with claimed(root / "claims" / f"{job.key}.claim", job.label, wait=False):
        _WORK[job.kind](job, OmegaConf.create(dict(job.config)), root)
    if job.outputs and not is_done(job, root):
        raise WinnowError(f"{job.label} has left no {job.outputs[0]} in {root}: is the folder the same on all machines?")
    return "done", ""


def _baseline(job: Job, config: DictConfig, root: Path) -> None:
    from harness.cells.run import run_baseline

    run_baseline(config)


def _calibrate(job: Job, config: DictConfig, root: Path) -> None:
    from harness.cells.run import run_calibration

    run_calibration(config, frozenset(job.statistics))


def _cell(job: Job, config: DictConfig, root: Path) -> None:
    from harness.cells.run import run_cell

    run_cell(config, frozenset(job.statistics))


def _report(job: Job, config: DictConfig, root: Path) -> None:
    from reports.cli import report

    report(root)


_WORK = {"baseline": _baseline, "calibrate": _calibrate, "cell": _cell, "report": _report}


def _peak_memory_gib() -> float:
    """Of this process and of those that it has waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * unit / 2**30


@contextmanager
def _logging_to(log_file: str) -> Iterator[None]:
    """Meanwhile what is logged goes into ``log_file`` too."""
    if not log_file:
        yield
        return
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(min(before, logging.INFO) if before else logging.INFO)
    logging.captureWarnings(True)
    os.environ.setdefault("TQDM_DISABLE", "")
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        handler.close()
