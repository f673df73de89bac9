"""The command line: ``winnow`` runs one cell, ``winnow -m`` a sweep of them."""

import logging
import os
import signal
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NoReturn

# Before torch is imported: OpenMP threads that wait for each other actively are far slower than one on a busy
# machine, and tokenizers must not fork while it computes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Errors come to `main`, which prints one line, instead of being printed by Hydra with its advice.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from harness.apart import warm_up
from harness.cells.settings import is_folder_name, meanings_text, spelled
from harness.cells.sweep import (
    failures,
    job_count,
    launched,
    note_failure,
    note_finished,
    statistics_of_sweep,
    this_sweep,
)
from harness.contracts.record import Record
from harness.exits import explain, fail
from harness.reference import model_path

log = logging.getLogger(__name__)

OmegaConf.register_new_resolver("reference_model", model_path, replace=True)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="winnow-dry-run-")


def logs_folder(output_dir: str, dry_run: bool) -> str:
    """Where Hydra's own files go, before the settings are checked: a dry run leaves none, nor does one into nowhere."""
    return _scratch().name if dry_run or not is_folder_name(output_dir) else f"{output_dir}/logs"


OmegaConf.register_new_resolver("logs_folder", logs_folder, replace=True)
OmegaConf.register_new_resolver("meanings", meanings_text, replace=True)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def run(config: DictConfig) -> None:
    """One job of Hydra's: one cell."""
    if not config.dry_run:
        warm_up()
    from harness.cells.run import run_cell, run_shard  # here, so that --help and a misspelt option need no torch

    logging.captureWarnings(True)
    job = HydraConfig.get()
    if config.dry_run:
        from harness.cells.dry_run import show

        try:
            show(config, statistics_of_sweep() if job.mode == RunMode.MULTIRUN else None)
        except Exception as error:
            fail(error)
        return
    of_part = config.calibration.get("shard") is not None
    if job.mode == RunMode.RUN:
        explicit = any(override.startswith("output_dir=") for override in job.overrides.task)
        try:
            if of_part:
                show_part(run_shard(config))
            else:
                show_record(run_cell(config, publish=explicit), Path(config.output_dir))
        except Exception as error:
            fail(error)  # here, because Hydra would print a line of its own first
        return
    log.info("[%d/%d] %s", int(job.job.num) + 1, job_count(this_sweep()), job.job.override_dirname)
    try:
        also, root = statistics_of_sweep(), Path(config.output_dir)
        stored = show_part(run_shard(config, also)) if of_part else show_record(run_cell(config, also), root)
        if stored is not None:
            note_finished(this_sweep(), int(job.job.num), job.job.override_dirname, stored)
    except Exception as error:
        # One broken cell must not end a night's sweep; `main` lists the failures and fails at the end.
        line = explain(error)
        if line is None:
            log.exception("this cell failed")
            line = f"{type(error).__name__}: {error}"
        log.error("cell failed: %s", line)
        note_failure(this_sweep(), int(job.job.num), job.job.override_dirname, line)


def show_part(file: Path | None) -> Path | None:
    """Print where the partial statistics are."""
    print(f"partial statistics: {file or 'none, since the corpus has too few batches'}", flush=True)
    return file


def show_record(record: Record, root: Path) -> Path:
    """Print the cell's result table; returns where the record is. The table is the reports' own, so both always show
    the same numbers."""
    from harness.records.store import RecordStore
    from reports.tables.summary import cell_table

    cells, baselines = RecordStore(root), RecordStore(root, "baseline")
    name, beside = record.cell["id"], record.cell.get("baseline", "")
    store = cells if cells.exists(name) else baselines
    baseline = baselines.read(beside) if baselines.exists(beside) else None
    beside_samples = None if baseline is None else baselines.read_samples(beside)
    table = cell_table(record, baseline, store.read_samples(name), beside_samples)
    print(f"{table}\nrecord: {store.path(name)}", flush=True)
    return store.path(name)


def _terminated(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, _terminated)
    sys.argv[1:] = spelled(sys.argv[1:])
    try:
        run()
        failed = [line for sweep in launched for line in failures(sweep)]
    except KeyboardInterrupt:
        print("winnow: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fail(error)
    if failed:
        print(f"winnow: {len(failed)} cells of the sweep failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)
