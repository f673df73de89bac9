"""From the configurations of a sweep to its jobs: what each cell reads and makes, by content."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness.calibration.cache import content_key
from harness.calibration.shards import check_shard
from harness.cells.baseline import EVALUATE, lacking
from harness.cells.cell import Cell, prepare
from harness.cells.settings import baseline_folder
from harness.errors import WinnowError
from harness.exits import explain
from harness.logs import each_line_once
from harness.records.store import RecordStore
from harness.sweeps.graph import Job, Planned, jobs_of


@dataclass(frozen=True)
class Plan:
    """``jobs``, each behind those that it needs, and ``refused``: cells that cannot be, with the reason."""

    jobs: list[Job]
    refused: list[tuple[str, str]]


def plan_sweep(cells: Sequence[tuple[str, DictConfig]], report: bool = True) -> Plan:
    """``cells`` are labels and configurations. Reads models' headers and the text of corpora and tasks, no weight."""
    found: list[Planned] = []
    refused = []
    with each_line_once("harness.cells.cell"):
        for label, config in cells:
            try:
                found.append(_planned(label, config))
            except Exception as error:
                line = explain(error)
                if line is None:
                    raise
                refused.append((label, line))
    return Plan(jobs_of(found, report), refused)


def _planned(label: str, config: DictConfig) -> Planned:
    cell = prepare(config)
    settings = cell.config["calibration"]
    if settings.get("shard") is not None:
        if not cell.method.requires:
            raise WinnowError(f"method={cell.method.name} reads no statistics: calibration.shard is for those that do")
        check_shard(settings["shard"], settings["shards"])
        key = _calibration(cell)
        return Planned(
            label, cell.description["model"], cell.config, None, None, key, cell.statistics, settings["shards"]
        )
    measured = bool(cell.tasks) and (
        cell.is_baseline or cell.config["baseline"] == EVALUATE or baseline_folder(cell.config["baseline"]) is not None
    )
    return Planned(
        label,
        cell.description["model"],
        cell.config,
        record=None if cell.is_baseline and cell.tasks else cell.id,
        baseline=cell.baseline["id"] if measured else None,
        calibration=_calibration(cell) if cell.method.requires else None,
        statistics=cell.statistics,
        shards=settings.get("shards"),
        diagnostics=cell.config["diagnostics"]["name"] != "none",
        again=_lacks(cell),
    )


def _calibration(cell: Cell) -> str:
    """The key of the statistics of the intact model (``harness.calibration.calibrate``)."""
    made_from: dict[str, Any] = {
        "model": cell.contents["model"],
        "corpus": cell.contents["corpus"],
        "dtype": cell.config["model"]["dtype"],
    }
    return content_key(made_from)


def _lacks(cell: Cell) -> bool:
    """Whether the record is there, and lacks what can be measured now."""
    root = Path(cell.config["output_dir"])
    store, baselines = RecordStore(root), RecordStore(root, "baseline")
    if cell.is_baseline or not store.exists(cell.id):
        return False
    name = cell.baseline["id"]
    baseline = baselines.read(name) if baselines.exists(name) else None
    return bool(lacking(cell, store.read(cell.id), baseline))
