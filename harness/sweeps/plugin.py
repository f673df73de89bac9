"""Hydra's part in a sweep: ``winnow -m`` comes here, with its grids; from here on there is a graph of jobs.

The sweeper takes the place of Hydra's own and of its launchers: cells are composed here (``harness.sweeps.composing``)
and run by the engine that ``launcher`` names.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig

from harness import progress
from harness.cells.settings import is_folder_name
from harness.errors import WinnowError
from harness.exits import fail
from harness.logs import say_what_we_do
from harness.sweeps.composing import compose_all

log = logging.getLogger(__name__)

# A line for each cell of this process's sweeps that did not come to its end.
failed: list[str] = []
_PLUGINS = "hydra_plugins.winnow"


class Grids(Sweeper):
    """Hydra sweeper (``hydra/sweeper=winnow``) of one grid, ``params``, or of several, one after the other, ``grids``.

    A grid goes from key to values separated by commas. The command line counts in all of them, and before what a grid
    says of the same key.
    """

    __module__ = _PLUGINS

    def __init__(
        self, params: Mapping[str, Any] | None = None, grids: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.params, self.grids = params, grids

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        try:
            self._sweep(arguments)
        except Exception as error:
            fail(error)  # here, because Hydra would print a line of its own first

    def _sweep(self, arguments: list[str]) -> None:
        assert self.config is not None and self.hydra_context is not None  # since setup
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
        say_what_we_do()
        jobs = [job for grid in self._grids() for job in product(*choices(grid + arguments))]
        configs = compose_all(self.hydra_context.config_loader, jobs)
        with progress.showing(all(config.progress for config in configs)):
            launch([*zip(_labels(jobs), configs, strict=True)], arguments)

    def _grids(self) -> list[list[str]]:
        grids = [{}] if self.grids is None else self.grids
        if not (isinstance(grids, Sequence) and grids and all(isinstance(grid, Mapping) for grid in grids)):
            raise WinnowError(f"hydra.sweeper.grids={grids}: should be a list of grids, as [{{ratio: 0.25}}]")
        everywhere = assignments(self.params or {})
        return [assignments(grid) + everywhere for grid in grids]


def _register() -> None:
    """Hydra takes sweepers from the package of its plugins alone, where this project has no folder; nor may there be
    such a package at all."""
    try:
        package = import_module("hydra_plugins")
    except ImportError:
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        package.__path__ = []
    sys.modules[_PLUGINS] = package.winnow = sys.modules[__name__]  # type: ignore[attr-defined]
    Plugins.instance().register(Grids)


_register()


def launch(cells: Sequence[tuple[str, DictConfig]], command: Sequence[str]) -> None:
    """Run the cells, labels and configurations, or with ``dry_run`` show what they would take."""
    for folder in dict.fromkeys(config.output_dir for _, config in cells):
        if not is_folder_name(folder):
            raise WinnowError(f"output_dir={folder}: should be the path of a folder")
        of_folder = [(label, config) for label, config in cells if config.output_dir == folder]
        if of_folder[0][1].dry_run:
            from harness.sweeps.dry_run import show

            show(of_folder)
        else:
            _launch(of_folder, Path(folder), command)


def _launch(cells: Sequence[tuple[str, DictConfig]], root: Path, command: Sequence[str]) -> None:
    from harness.sweeps.drive import left_of, run_sweep
    from harness.sweeps.estimates import resources_of
    from harness.sweeps.graph import Job
    from harness.sweeps.plan import plan_sweep
    from harness.sweeps.state import Outcome, begin

    config = cells[0][1]
    engine = instantiate(config.launcher)
    plan = plan_sweep(cells, report=bool(config.report))
    for label, reason in plan.refused:
        log.error("cell failed: %s: %s", label, reason)
        failed.append(f"{label}: {reason}")
    left = left_of(plan.jobs, root)
    log.info("%s: %d jobs, of which %d are done", root, len(plan.jobs), len(plan.jobs) - len(left))
    if not left:
        return
    keys = {job.key for job in left}
    jobs = [replace(job, resources=resources_of(job)) if job.key in keys else job for job in plan.jobs]
    sweep = begin(root, jobs, plan.refused, command, engine.name)
    numbers = {job.key: number for number, job in enumerate(left, start=1)}

    def told(job: Job, outcome: Outcome) -> None:
        at = f"[{numbers[job.key]}/{len(left)}] {job.label}"
        if outcome.state == "done":
            log.info("%s: done in %.0f s on %s", at, outcome.seconds, outcome.host)
            if job.kind == "cell":
                show_record(root, job.key.partition("/")[2])
        elif outcome.state != "busy":
            log.error("%s: %s: %s", at, outcome.state, outcome.message)

    outcomes = run_sweep(jobs, engine, root, sweep, told)
    for job in left:
        outcome = outcomes.get(job.key)
        if outcome is not None and outcome.state in ("failed", "missing", "cancelled"):
            failed.append(f"{job.label}: {outcome.message}")


def show_record(root: Path, name: str) -> Path:
    """Print the result table of the cell, or of the uncompressed model; returns where the record is. The table is the
    reports' own, so both always show the same numbers."""
    from harness.records.store import RecordStore
    from reports.tables.summary import cell_table

    cells, baselines = RecordStore(root), RecordStore(root, "baseline")
    store = cells if cells.exists(name) else baselines
    record = store.read(name)
    beside = record.cell.get("baseline", "")
    baseline = baselines.read(beside) if baselines.exists(beside) else None
    samples = None if baseline is None else baselines.read_samples(beside)
    print(f"{cell_table(record, baseline, store.read_samples(name), samples)}\nrecord: {store.path(name)}", flush=True)
    return store.path(name)


def assignments(grid: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in grid.items()]


def choices(overrides: Sequence[str]) -> list[list[str]]:
    """For each key its assignments; of two overrides of a key the later counts."""
    parsed = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(list(overrides))}
    return [
        [f"{key}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [f"{key}={o.get_value_element_as_str()}"]
        for key, o in parsed.items()
    ]


def _labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What tells the jobs apart."""
    common = {line for line in (jobs[0] if jobs else ()) if all(line in job for job in jobs)}
    return [",".join(line for line in job if line not in common) or ",".join(job) or "cell" for job in jobs]
