"""Jobs on this machine: one after the other here, or side by side in processes."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from harness.apart import warm_up
from harness.errors import WinnowError
from harness.sweeps.drive import Told, needed_of
from harness.sweeps.graph import Job
from harness.sweeps.jobs import run_job
from harness.sweeps.state import Outcome, note

_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Serial:
    """One job after the other, in this process."""

    name: str = "serial"

    def run(self, jobs: Sequence[Job], graph: Mapping[str, Job], root: Path, sweep: Path, told: Told) -> bool:
        warm_up()
        for job in jobs:
            told(job, run_job(job, needed_of(job, graph), str(root), str(sweep)))
        return True


@dataclass(frozen=True)
class Joblib:
    """``n_jobs`` jobs side by side in processes that stay (joblib's loky); -1: one for every core.

    Where there are several GPUs each process sees one of them, in turn.
    """

    name: str = "joblib"
    n_jobs: int = -1

    def __post_init__(self) -> None:
        if self.n_jobs == 0 or self.n_jobs < -1:
            raise WinnowError(
                f"launcher.n_jobs={self.n_jobs}: give the number of jobs side by side, or -1 for every core"
            )

    def run(self, jobs: Sequence[Job], graph: Mapping[str, Job], root: Path, sweep: Path, told: Told) -> bool:
        count = self.n_jobs if self.n_jobs > 0 else len(os.sched_getaffinity(0))
        gpus = visible_gpus()
        # Of one GPU, and of none, all processes see the same; they take turns on it (harness.devices).
        seats = [gpus[number % len(gpus)] if len(gpus) > 1 else None for number in range(count)]
        left, over = list(jobs), set(graph) - {job.key for job in jobs}
        running: dict[Future[Outcome], tuple[Job, str | None]] = {}
        broken: set[str] = set()
        executor = _executor(count)
        try:
            while left or running:
                for job in [job for job in left if set(job.needs) <= over][: len(seats)]:
                    left.remove(job)
                    seat = seats.pop()
                    needed = needed_of(job, graph)
                    running[executor.submit(_run_on, seat, job, needed, str(root), str(sweep))] = job, seat
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, seat = running.pop(future)
                    seats.append(seat)
                    try:
                        outcome = future.result()
                    except TerminatedWorkerError:  # which one was killed, nobody knows: all that ran run once more
                        executor = _executor(count)
                        if job.key not in broken:
                            broken.add(job.key)
                            left.insert(0, job)
                            continue
                        outcome = Outcome("failed", "its process was killed twice, perhaps for want of memory")
                        note(sweep, job.key, outcome)
                    over.add(job.key)
                    told(job, outcome)
        finally:
            executor.shutdown(wait=True, kill_workers=True)
        return True


def _executor(count: int) -> Any:
    return get_reusable_executor(max_workers=count, timeout=None, reuse=False, initializer=warm_up)


def _run_on(gpu: str | None, job: Job, needed: Mapping[str, Job], root: str, sweep: str) -> Outcome:
    if gpu is not None:
        os.environ[_DEVICES] = gpu
    return run_job(job, needed, root, sweep)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for each GPU of this machine; no driver is started."""
    told = os.environ.get(_DEVICES)
    if told is not None:
        return [one.strip() for one in told.split(",") if one.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
