"""Jobs on a SLURM cluster, through submitit: arrays for jobs of one shape, ``afterok`` between those that need another.

SLURM starts a job again whose node was lost, never one that has failed by itself. ``sacct`` is not needed.
"""

import logging
import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.claims import JOB
from harness.errors import WinnowError, first_line
from harness.sweeps.drive import Told, needed_of
from harness.sweeps.graph import Job
from harness.sweeps.jobs import run_job
from harness.sweeps.state import OVER, Outcome, note, outcome_of, sweeps_in

log = logging.getLogger(__name__)

_POLL = 2.0
# What SLURM says of a job that it ended, and what to do about it.
_REASONS = {
    "TIMEOUT": "SLURM ended it, as its time was over: set resources.minutes above {minutes:g}",
    "OUT_OF_MEMORY": "SLURM ended it, as its memory was used up: set resources.memory_gib above {memory_gib:g}",
    "NODE_FAIL": "its node was lost: run the same command again",
    "CANCELLED": "it was cancelled",
    "DEADLINE": "SLURM ended it, as its time was over: set resources.minutes above {minutes:g}",
}


@dataclass(frozen=True)
class Slurm:
    """``partition``, ``account`` and ``qos`` as in sbatch; ``gres`` takes the place of ``--gpus-per-node``.

    With ``wait=false`` the jobs are submitted and that is all: the same command later shows how they are, and submits
    what has failed. ``more`` are other options of sbatch, as ``{constraint: a100}``; ``setup`` are lines of shell that
    a job begins with. ``parallel`` is how many jobs of an array run at once.
    """

    name: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None
    parallel: int = 256
    wait: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)
    setup: Sequence[str] = ()

    def run(self, jobs: Sequence[Job], graph: Mapping[str, Job], root: Path, sweep: Path, told: Told) -> bool:
        submitit = _submitit()
        self._check()
        ids = _queued_before(jobs, root, sweep)
        for job in jobs:
            if job.key in ids:
                log.info("%s is in the queue already (job %s)", job.label, ids[job.key])
                note(sweep, job.key, Outcome("queued", engine_id=ids[job.key]))
        new = [job for job in jobs if job.key not in ids]
        for array in _arrays(new):
            ids |= self._submitted(submitit, array, graph, ids, root.resolve(), sweep.resolve())
        if not self.wait:
            log.info("%d jobs are with SLURM; `winnow-sweep status %s` shows how they are", len(ids), root)
            return False
        self._follow(jobs, ids, sweep, told)
        return True

    def _check(self) -> None:
        """Raises WinnowError where there is no SLURM, or no such partition."""
        if shutil.which("sbatch") is None:
            raise WinnowError("launcher=slurm: there is no sbatch here; run the command where jobs are submitted")
        known = _output("sinfo", "-h", "-o", "%R").split()
        if self.partition is not None and self.partition not in known:
            raise WinnowError(f"launcher.partition={self.partition}: the partitions are {', '.join(known)}")

    def _submitted(
        self,
        submitit: Any,
        array: Sequence[Job],
        graph: Mapping[str, Job],
        ids: Mapping[str, str],
        root: Path,
        sweep: Path,
    ) -> dict[str, str]:
        """Submits jobs that take the same and need the same; returns key -> id."""
        takes = array[0].resources
        behind = [ids[key] for key in array[0].needs if key in ids]
        # A report is made of what there is; everything else needs what it needs.
        kind = "afterany" if array[0].kind == "report" else "afterok"
        more: dict[str, Any] = {**self.more}
        if behind:
            more["dependency"] = f"{kind}:{':'.join(dict.fromkeys(behind))}"
            more["kill_on_invalid_dep"] = "yes"
        if takes.gpus:
            more["gres"] = self.gres or f"gpu:{takes.gpus}"
        for option in ("account", "qos"):
            if getattr(self, option) is not None:
                more[option] = getattr(self, option)
        executor = submitit.SlurmExecutor(folder=sweep / "slurm", max_num_timeout=0)
        executor.update_parameters(
            job_name=f"winnow-{array[0].kind}",
            time=max(1, int(takes.minutes)),
            mem=f"{max(1, int(takes.memory_gib * 1024))}M",
            cpus_per_task=takes.cpus,
            ntasks_per_node=1,
            nodes=1,
            array_parallelism=self.parallel,
            additional_parameters=more,
            setup=list(self.setup),
            **({} if self.partition is None else {"partition": self.partition}),
        )
        try:
            made = executor.map_array(
                _in_job,
                array,
                [needed_of(job, graph) for job in array],
                [str(root)] * len(array),
                [str(sweep)] * len(array),
            )
        except submitit.core.utils.FailedJobError as error:
            raise WinnowError(f"SLURM does not take the jobs: {_said(error)}") from error
        found = {job.key: one.job_id for job, one in zip(array, made, strict=True)}
        for key, number in found.items():
            note(sweep, key, Outcome("queued", engine_id=number))
        return found

    def _follow(self, jobs: Sequence[Job], ids: Mapping[str, str], sweep: Path, told: Told) -> None:
        """Until every job is over; what SLURM ended is found by its being in no queue any more."""
        left = {job.key: job for job in jobs}
        missed: dict[str, int] = defaultdict(int)
        while left:
            alive = queue()
            for key, job in list(left.items()):
                outcome = outcome_of(sweep, key)
                if outcome.state in ("waiting", "queued", "running"):
                    # The note may come a little after the job has left the queue.
                    missed[key] = 0 if ids[key] in alive else missed[key] + 1
                    if missed[key] < 5:
                        continue
                    outcome = _ended(ids[key], job)
                    note(sweep, key, outcome)
                told(job, outcome)
                del left[key]
            if left:
                time.sleep(_POLL)


def _in_job(job: Job, needed: Mapping[str, Job], root: str, sweep: str) -> dict[str, Any]:
    """What a job of SLURM's runs. It fails where the job did, so that none behind it begins."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    os.environ[JOB] = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    os.environ["TQDM_DISABLE"] = "1"
    outcome = run_job(job, needed, root, sweep)
    if outcome.state != "done":
        raise RuntimeError(outcome.message)
    return asdict(outcome)


def _arrays(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs of one kind that take and need the same, in the order in which they may begin."""
    found: dict[Any, list[Job]] = defaultdict(list)
    for job in jobs:
        found[job.kind, job.resources, job.needs].append(job)
    return list(found.values())


def _queued_before(jobs: Sequence[Job], root: Path, sweep: Path) -> dict[str, str]:
    """Of earlier sweeps in the folder: the jobs that SLURM still has, key -> id."""
    alive = queue()
    found = {}
    for before in sweeps_in(root):
        for job in jobs if before != sweep else ():
            known = outcome_of(before, job.key)
            if known.state not in OVER and known.engine_id in alive:
                found[job.key] = known.engine_id
    return found


def queue() -> set[str]:
    """The ids of this user's jobs that are waiting or running, ``ARRAY_TASK`` those of arrays."""
    return set(_output("squeue", "-h", "-r", "--me", "-o", "%i").split())


def cancel(ids: Sequence[str]) -> None:
    if ids:
        _output("scancel", *ids)


def _ended(number: str, job: Job) -> Outcome:
    """What became of a job that has left the queue without a word."""
    state = ""
    for line in _output("scontrol", "show", "job", number, check=False).split():
        if line.startswith("JobState="):
            state = line.partition("=")[2]
    if state == "PENDING" or "Dependency" in state:
        state = "CANCELLED"
    told = _REASONS.get(
        state, "SLURM has it no more ({state}), and it has left nothing: its log in the sweep's folder says more"
    )
    message = told.format(state=state or "unknown", **asdict(job.resources))
    return Outcome("cancelled" if state == "CANCELLED" else "failed", message, engine_id=number)


def _output(*command: str, check: bool = True) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WinnowError(f"SLURM does not answer ({' '.join(command)}: {first_line(error)})") from error
    if check and done.returncode:
        raise WinnowError(f"SLURM does not answer: {(done.stderr.strip() or 'no reason given').splitlines()[0]}")
    return done.stdout


def _said(error: Exception) -> str:
    """The line of sbatch among what submitit tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("sbatch: error")), lines[0] if lines else "no reason given")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise WinnowError('launcher=slurm needs submitit: pip install "moe-winnow[slurm]"') from error
    return submitit
