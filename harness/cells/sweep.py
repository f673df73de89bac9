"""What a sweep knows beyond its cells: how many there are, which failed, and what a person reads about it."""

import json
import logging
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

log = logging.getLogger(__name__)

FAILURES = "failures"
SWEEP_FILE = "sweep.json"
# Output folder of the sweep that this process launched, if it launched one.
launched: list[Path] = []


class Grids(Sweeper):
    """Hydra sweeper of several grids, one after the other (``hydra/sweeper=grids``).

    A grid goes from key to values separated by commas, like ``params`` of Hydra's own sweeper. The command line counts
    in all of them, and before what a grid says of the same key. All jobs are launched at once.
    """

    __module__ = "hydra_plugins.winnow"

    def __init__(self, grids: Sequence[Mapping[str, Any]]) -> None:
        self.grids = grids

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.launcher is not None  # since setup
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        jobs = [list(job) for grid in self.grids for job in product(*_choices(assignments(grid) + arguments))]
        self.validate_batch_is_legal(jobs)
        results = self.launcher.launch(jobs, initial_job_idx=0)
        return [[result.return_value for result in results]]  # which raises what a job has raised


# Hydra takes sweepers from the package of its plugins alone, where this project has no folder.
sys.modules[Grids.__module__] = sys.modules[__name__]
Plugins.instance().register(Grids)


def assignments(grid: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in grid.items()]


class SweepNotes(Callback):
    """Hydra callback: leaves ``sweep.json`` (command and number of jobs) in the output folder before the first job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.dry_run:
            return
        root = Path(config.output_dir)
        sweeper = config.hydra.sweeper
        everywhere = assignments(sweeper.get("params") or {}) + list(config.hydra.overrides.task)
        jobs = sum(count_jobs(assignments(grid) + everywhere) for grid in sweeper.get("grids", [{}]))
        root.mkdir(parents=True, exist_ok=True)
        notes = {"overrides": list(config.hydra.overrides.task), "jobs": jobs}
        (root / SWEEP_FILE).write_text(json.dumps(notes, indent=1) + "\n")
        shutil.rmtree(root / FAILURES, ignore_errors=True)
        launched.append(root)


def count_jobs(overrides: list[str]) -> int:
    """Jobs of the grid that the overrides span."""
    return math.prod(map(len, _choices(overrides)))


def _choices(overrides: list[str]) -> list[list[str]]:
    """For each key its assignments; of two overrides of a key the later counts."""
    parsed = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(overrides)}
    return [
        [f"{key}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [f"{key}={o.get_value_element_as_str()}"]
        for key, o in parsed.items()
    ]


def job_count(root: Path) -> int:
    return int(json.loads((root / SWEEP_FILE).read_text())["jobs"])


def note_failure(root: Path, job: int, overrides: str, message: str) -> None:
    folder = root / FAILURES
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job:05d}.txt").write_text(f"{overrides}: {message}\n")


def failures(root: Path) -> list[str]:
    """One line a failed job of the last sweep."""
    return [path.read_text().strip() for path in sorted((root / FAILURES).glob("*.txt"))]
