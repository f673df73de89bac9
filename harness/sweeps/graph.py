"""A sweep as a graph of jobs: plain data that any engine can run.

``data`` (one a sweep) -> ``baseline`` (one a model, suite and backend) and ``calibrate`` (one a model and corpus) ->
``cell`` -> ``report``. A job says which jobs make what it reads, which files are there when it is done, and what it
takes. A job whose files are there is not run, and none waits for another inside: what it needs is there when it starts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["data", "baseline", "calibrate", "cell", "report"]
KINDS: tuple[Kind, ...] = ("data", "baseline", "calibrate", "cell", "report")


@dataclass(frozen=True)
class Resources:
    """What a job takes: ``gpus``, ``memory_gib`` of the host, ``minutes``; estimates of the dry run unless set."""

    gpus: int = 0
    memory_gib: float = 4.0
    minutes: float = 10.0
    cpus: int = 1

    def __or__(self, other: "Resources") -> "Resources":
        """Enough for both, one after the other."""
        return Resources(
            max(self.gpus, other.gpus),
            max(self.memory_gib, other.memory_gib),
            max(self.minutes, other.minutes),
            max(self.cpus, other.cpus),
        )


@dataclass(frozen=True)
class Job:
    """``key`` names it within an output folder, by content: two sweeps that want the same have the same job.

    ``label`` is for people. ``config`` is the resolved configuration of the cell that it is of, or of the first of
    those that it serves; ``statistics`` those that a calibration collects. ``needs`` are keys of other jobs.
    ``outputs`` are paths within the output folder.
    """

    key: str
    kind: Kind
    label: str
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    statistics: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    resources: Resources = Resources()


@dataclass(frozen=True)
class Planned:
    """What the graph has to know of a cell: the keys of what it reads and makes, and what each step takes.

    ``cell`` is None for the uncompressed model itself, ``baseline`` where it is left out, ``calibration`` where no
    statistic is read. ``takes`` has the resources by kind of job.
    """

    label: str
    config: Mapping[str, Any] = field(repr=False)
    cell: str | None
    baseline: str | None
    calibration: str | None
    statistics: frozenset[str] = frozenset()
    takes: Mapping[Kind, Resources] = field(default_factory=dict)


def jobs_of(cells: Sequence[Planned], report: bool = True) -> list[Job]:
    """The jobs of a sweep, each after those that it needs; what several cells need is one job."""
    statistics: dict[str, frozenset[str]] = {}
    for one in cells:
        if one.calibration is not None:
            statistics[one.calibration] = statistics.get(one.calibration, frozenset()) | one.statistics
    found: dict[str, Job] = {}

    def add(job: Job) -> str:
        known = found.get(job.key)
        found[job.key] = job if known is None else replace(known, resources=known.resources | job.resources)
        return job.key

    for one in cells:
        needs = []
        if one.baseline is not None:
            name = f"baseline {one.config['model']['name']}, suite {one.config['suite']['name']}"
            output = (f"baseline/{one.baseline}.json",)
            needs.append(add(_job(one, f"baseline-{one.baseline}", "baseline", name, outputs=output)))
        if one.calibration is not None:
            name = f"calibration of {one.config['model']['name']} on {one.config['calibration']['name']}"
            wanted = tuple(sorted(statistics[one.calibration]))
            output = (f"calibration/{one.calibration}/manifest.json",)
            key = f"calibrate-{one.calibration}"
            needs.append(add(_job(one, key, "calibrate", name, statistics=wanted, outputs=output)))
        if one.cell is not None:
            wanted = tuple(sorted(statistics.get(one.calibration or "", ())))
            output = (f"records/{one.cell}.json",)
            add(_job(one, f"cell-{one.cell}", "cell", one.label, wanted, tuple(needs), output))
    ordered = sorted(found.values(), key=lambda job: KINDS.index(job.kind))
    if report and ordered:
        everything = tuple(job.key for job in ordered if job.kind in ("baseline", "cell"))
        ordered.append(Job("report", "report", "report", ordered[0].config, needs=everything))
    return ordered


def _job(
    one: Planned,
    key: str,
    kind: Kind,
    label: str,
    statistics: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
) -> Job:
    return Job(key, kind, label, one.config, statistics, needs, outputs, one.takes.get(kind, Resources()))


def count(jobs: Iterable[Job]) -> dict[Kind, int]:
    """How many jobs of each kind there are, of the kinds that there are."""
    found: dict[Kind, int] = {}
    for job in jobs:
        found[job.kind] = found.get(job.kind, 0) + 1
    return found
