"""What a sweep knows beyond its cells: how many there are, what they need, and which failed."""

import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.cells.settings import is_folder_name
from harness.errors import WinnowError
from harness.exits import fail
from harness.files import write_files

log = logging.getLogger(__name__)

# Every sweep of an output folder has a folder of its own in SWEEPS: two at once do not touch each other's notes.
SWEEPS, SWEEP_FILE, FAILURES, FINISHED = "sweeps", "sweep.json", "failures", "finished"
# What the jobs of a sweep are told, in whatever process they run: its folder, and the statistics that it needs.
_FOLDER, _STATISTICS = "WINNOW_SWEEP", "WINNOW_SWEEP_STATISTICS"
# Folder of the sweep that this process launched, if it launched one.
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
    """Hydra callback: before the first job it finds out which statistics the methods of the sweep need, and makes the
    sweep's folder with ``sweep.json`` (command, number of jobs, host and process)."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            self._start(config)
        except Exception as error:
            fail(error)  # here, because Hydra would go on after an error of a callback

    def _start(self, config: DictConfig) -> None:
        """Raises WinnowError for settings that concern the sweep as a whole and cannot be."""
        sweeper = config.hydra.sweeper
        if not is_folder_name(config.output_dir):
            raise WinnowError(f"output_dir={config.output_dir}: should be the path of a folder")
        if config.hydra.launcher.get("n_jobs") == 0:
            raise WinnowError("hydra.launcher.n_jobs=0: give the number of cells side by side, or -1 for every core")
        grids = sweeper.get("grids", [])
        if grids and not (OmegaConf.is_list(grids) and all(map(OmegaConf.is_dict, grids))):
            raise WinnowError(f"hydra.sweeper.grids={grids}: should be a list of grids, as [{{ratio: 0.25}}]")
        everywhere = assignments(sweeper.get("params") or {}) + list(config.hydra.overrides.task)
        grids = [assignments(grid) + everywhere for grid in sweeper.get("grids", [{}])]
        # Jobs may run in other processes: these are started from now on, and so have this process's environment.
        os.environ[_STATISTICS] = ",".join(sorted(needed_statistics(grids)))
        if config.dry_run:
            return
        started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        folder = Path(config.output_dir) / SWEEPS / f"{started}-{socket.gethostname()}-{os.getpid()}"
        notes = {"overrides": list(config.hydra.overrides.task), "jobs": sum(map(count_jobs, grids))}
        notes |= {"started": started, "host": socket.gethostname(), "process": os.getpid()}
        write_files({folder / SWEEP_FILE: (json.dumps(notes, indent=1) + "\n").encode()})
        os.environ[_FOLDER] = str(folder.resolve())
        launched.append(folder)


def needed_statistics(grids: Sequence[Sequence[str]]) -> frozenset[str]:
    """What all methods of the grids declare, each made from its own part of the configuration.

    A method that cannot be made needs nothing here: its own job says what is wrong with it.
    """
    parts = {
        part
        for grid in grids
        for part in product(*(of_key for of_key in _choices(grid) if of_key[0].startswith(("method", "+method"))))
    }
    found: set[str] = set()
    for part in parts:
        with suppress(HydraException, OmegaConfBaseException, WinnowError):
            composed = GlobalHydra.instance().config_loader().load_configuration("config", list(part), RunMode.RUN)
            found |= instantiate(composed.method).requires
    return frozenset(found)


def this_sweep() -> Path:
    """The folder of the sweep that launched this job."""
    return Path(os.environ[_FOLDER])


def statistics_of_sweep() -> frozenset[str]:
    """The statistics that the sweep which launched this job needs; none outside of a sweep."""
    return frozenset(filter(None, os.environ.get(_STATISTICS, "").split(",")))


def count_jobs(overrides: Sequence[str]) -> int:
    """Jobs of the grid that the overrides span."""
    return math.prod(map(len, _choices(overrides)))


def _choices(overrides: Sequence[str]) -> list[list[str]]:
    """For each key its assignments; of two overrides of a key the later counts."""
    parsed = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(list(overrides))}
    return [
        [f"{key}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [f"{key}={o.get_value_element_as_str()}"]
        for key, o in parsed.items()
    ]


def job_count(sweep: Path) -> int:
    return int(json.loads((sweep / SWEEP_FILE).read_text())["jobs"])


def cells_left() -> int:
    """How many jobs of the sweep that launched this one are still to come, or at work; 0 outside of a sweep."""
    if not os.environ.get(_FOLDER):
        return 0
    sweep = this_sweep()
    done = sum(1 for kind in (FAILURES, FINISHED) for _ in (sweep / kind).glob("*.txt"))
    return max(0, job_count(sweep) - done - 1)


def note_failure(sweep: Path, job: int, overrides: str, message: str) -> None:
    write_files({sweep / FAILURES / f"{job:05d}.txt": f"{overrides}: {message}\n".encode()})


def note_finished(sweep: Path, job: int, overrides: str, record: Path) -> None:
    write_files({sweep / FINISHED / f"{job:05d}.txt": f"{overrides}: {record.resolve()}\n".encode()})


def failures(sweep: Path) -> list[str]:
    """One line a job of the sweep that failed, or whose record has gone since it finished."""
    failed = [path.read_text().strip() for path in sorted((sweep / FAILURES).glob("*.txt"))]
    for path in sorted((sweep / FINISHED).glob("*.txt")):
        overrides, _, record = path.read_text().strip().rpartition(": ")
        if not Path(record).is_file():
            failed.append(f"{overrides}: its record {record} was there and is gone: run the command again")
    return failed
