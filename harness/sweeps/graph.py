"""A sweep as a graph of jobs: plain data that any engine can run.

``baseline`` (one a model, suite and backend) and ``calibrate`` (one a model and corpus) -> ``cell`` -> ``report``. Data
are read by whoever makes the graph, before any job (``harness.sweeps.plan``). A job says which jobs make what it reads,
which files are there when it is done, and what it takes. One whose files are there is not run, and none waits for
another inside: what it needs is there when it starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["baseline", "calibrate", "cell", "report"]
KINDS: tuple[Kind, ...] = ("baseline", "calibrate", "cell", "report")


@dataclass(frozen=True)
class Resources:
    """What a job takes: ``gpus``, ``cpus``, ``memory_gib`` of the host, ``minutes``."""

    gpus: int = 0
    cpus: int = 1
    memory_gib: float = 4.0
    minutes: float = 30.0


@dataclass(frozen=True)
class Job:
    """``key`` names it within an output folder, by content: two sweeps that want the same have the same job.

    ``label`` is for people. ``config`` is the resolved configuration of the cell that it is of, or of the first of
    those that it serves; ``statistics`` those that are collected for all of these. ``needs`` are keys of other jobs.
    ``outputs`` are paths within the output folder. ``again``: it is to be done though they are there, as something
    that they lack can be measured now.
    """

    key: str
    kind: Kind
    label: str
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    statistics: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    resources: Resources = Resources()
    again: bool = False


@dataclass(frozen=True)
class Planned:
    """What the graph has to know of a cell of ``model``: the names, by content, of what it reads and makes.

    ``record`` is None for the uncompressed model itself, ``baseline`` where that is left out, ``calibration`` where no
    statistic is read. ``shards`` is the number of parts that the corpus is calibrated in, if any. ``diagnostics``: it
    has layer diagnostics too. ``again`` as in ``Job``.
    """

    label: str
    model: str
    config: Mapping[str, Any] = field(repr=False)
    record: str | None
    baseline: str | None
    calibration: str | None
    statistics: frozenset[str] = frozenset()
    shards: int | None = None
    diagnostics: bool = False
    again: bool = False


def jobs_of(cells: Sequence[Planned], report: bool = True) -> list[Job]:
    """The jobs of a sweep, each behind those that it needs; what several cells need is one job."""
    statistics: dict[str, frozenset[str]] = {}
    for one in cells:
        if one.calibration is not None:
            statistics[one.calibration] = statistics.get(one.calibration, frozenset()) | one.statistics
    found: dict[str, Job] = {}
    for one in cells:
        wanted = tuple(sorted(statistics.get(one.calibration or "", ())))
        of_cell = [*_baseline(one), *_calibrations(one, wanted)]
        needed = tuple(job.key for job in of_cell if job.config["calibration"].get("shard") is None)
        for job in [*of_cell, *_cell(one, wanted, needed)]:
            found.setdefault(job.key, job)
    ordered = sorted(found.values(), key=lambda job: KINDS.index(job.kind))
    scored = [job for job in ordered if job.kind in ("baseline", "cell") and job.config["suite"]["tasks"]]
    if report and scored:
        needs = tuple(job.key for job in scored)
        outputs = ("report/report.md",)
        ordered.append(Job("report", "report", "report", scored[0].config, (), needs, outputs, again=True))
    return ordered


def _baseline(one: Planned) -> list[Job]:
    if one.baseline is None:
        return []
    label = f"uncompressed {one.model}, suite {one.config['suite']['name']}"
    outputs = (f"baseline/{one.baseline}.json",)
    return [Job(f"baseline/{one.baseline}", "baseline", label, one.config, outputs=outputs)]


def _calibrations(one: Planned, wanted: tuple[str, ...]) -> list[Job]:
    """Of the whole corpus, or of its parts and then what puts them together."""
    if one.calibration is None:
        return []
    label = f"calibration of {one.model} on {one.config['calibration']['name']}"
    key, parts = f"calibrate/{one.calibration}", []
    asked = one.config["calibration"].get("shard")
    for number in range(one.shards or 0) if asked is None else [asked]:
        of_part = {**one.config, "calibration": {**one.config["calibration"], "shard": number}}
        name, said = f"{number}-of-{one.shards}", f"{label}, part {number + 1} of {one.shards}"
        outputs = (f"calibration/{one.calibration}.shards/{name}.npz",)
        parts.append(Job(f"{key}/{name}", "calibrate", said, of_part, wanted, (), outputs))
    if asked is not None:
        return parts
    outputs = (f"calibration/{one.calibration}/manifest.json",)
    needs = tuple(part.key for part in parts)
    return [*parts, Job(key, "calibrate", label, one.config, wanted, needs, outputs)]


def _cell(one: Planned, wanted: tuple[str, ...], needs: tuple[str, ...]) -> list[Job]:
    if one.record is None:
        return []
    more = (f"diagnostics/{one.record}.json",) if one.diagnostics else ()
    outputs = (f"records/{one.record}.json", *more)
    return [Job(f"cell/{one.record}", "cell", one.label, one.config, wanted, needs, outputs, again=one.again)]
