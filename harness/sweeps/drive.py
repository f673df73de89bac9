"""The story of a sweep: which jobs are left, an engine runs them, what became of them."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from harness import progress
from harness.claims import is_held
from harness.sweeps.graph import Job
from harness.sweeps.jobs import is_done
from harness.sweeps.state import OVER, Outcome

log = logging.getLogger(__name__)

_POLL = 2.0  # seconds between two looks at what other launchers are at work on
Told = Callable[[Job, Outcome], None]


class Engine(Protocol):
    """Something that runs the jobs of a graph in their order: this process, several, Ray or SLURM."""

    @property
    def name(self) -> str: ...

    def run(self, jobs: Sequence[Job], graph: Mapping[str, Job], root: Path, sweep: Path, told: Told) -> bool:
        """Run ``jobs``, each after those of them that it needs; ``told`` is called as each ends.

        ``graph`` has all jobs of the sweep. An engine repeats what was lost with a worker or a node, never what has
        failed by itself. Returns False where it has only submitted them, and does not wait.
        """
        ...


def needed_of(job: Job, graph: Mapping[str, Job]) -> dict[str, Job]:
    """The jobs that it needs, by key."""
    return {key: graph[key] for key in job.needs}


def left_of(jobs: Sequence[Job], root: Path) -> list[Job]:
    """What is to be done: jobs whose outputs are not there, and of what others need only what somebody still needs."""
    undone = {job.key: job for job in jobs if job.again or not is_done(job, root)}
    needed = {key for job in jobs for key in job.needs}
    wanted = {key for key, job in undone.items() if job.kind != "calibrate" or key not in needed}
    for job in reversed(jobs):  # what needs stands behind what is needed
        if job.key in wanted:
            wanted |= set(job.needs) & undone.keys()
    found = [job for job in jobs if job.key in wanted]
    # A report that is there is made again only after something else.
    return found if any(job.kind != "report" or not is_done(job, root) for job in found) else []


def run_sweep(jobs: Sequence[Job], engine: Engine, root: Path, sweep: Path, told: Told) -> dict[str, Outcome]:
    """What became of each job that was left, by key.

    What another launcher is at work on is looked at again when it is through, here and in no job.
    """
    graph = {job.key: job for job in jobs}
    outcomes: dict[str, Outcome] = {}
    left = left_of(jobs, root)
    with progress.bar("jobs", len(left)) as bar:

        def ended(job: Job, outcome: Outcome) -> None:
            before = outcomes.get(job.key)
            outcomes[job.key] = outcome
            if outcome.state in OVER and (before is None or before.state not in OVER):
                bar.update()
            told(job, outcome)

        while left:
            if not engine.run(left, graph, root, sweep, ended):
                break
            busy = [job for job in left if outcomes[job.key].state == "busy"]
            waiting = _behind(busy, left, outcomes)
            for job in busy:
                log.info("%s", outcomes[job.key].message)
            while any(is_held(root / "claims" / f"{job.key}.claim") for job in busy):
                time.sleep(_POLL)
            left = [job for job in left if job in busy or job in waiting]
    return outcomes


def _behind(busy: Sequence[Job], jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> list[Job]:
    """The jobs that did not run because of what the busy ones are to make."""
    keys, found = {job.key for job in busy}, []
    for job in jobs:
        if keys & set(job.needs) and outcomes[job.key].state == "missing":
            keys.add(job.key)
            found.append(job)
    return found
