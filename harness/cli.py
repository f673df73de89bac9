"""The command line: ``winnow`` runs one cell, ``winnow -m`` a sweep of them."""

import logging
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NoReturn

# Before torch is imported: OpenMP threads that wait for each other actively are far slower than one on a busy
# machine, and tokenizers must not fork while it computes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Errors come to `main`, which prints one line, instead of being printed by Hydra with its advice.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.cells.sweep import failures, job_count, launched, note_failure
from harness.errors import WinnowError
from harness.reference import model_path

log = logging.getLogger(__name__)

OmegaConf.register_new_resolver("reference_model", model_path, replace=True)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="winnow-dry-run-")


def logs_folder(output_dir: str, dry_run: bool) -> str:
    """Where Hydra's own files go: a dry run leaves none."""
    return _scratch().name if dry_run else f"{output_dir}/logs"


OmegaConf.register_new_resolver("logs_folder", logs_folder, replace=True)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def run(config: DictConfig) -> None:
    """One job of Hydra's: one cell."""
    from harness.cells.run import run_cell  # here, so that --help and a misspelt option need no torch

    logging.captureWarnings(True)
    job = HydraConfig.get()
    if config.dry_run:
        from harness.cells.dry_run import show

        try:
            show(config, in_sweep=job.mode == RunMode.MULTIRUN)
        except Exception as error:
            fail(error)
        return
    if job.mode == RunMode.RUN:
        explicit = any(override.startswith("output_dir=") for override in job.overrides.task)
        try:
            run_cell(config, artifacts_in_output_dir=explicit)
        except Exception as error:
            fail(error)  # here, because Hydra would print a line of its own first
        return
    root = Path(config.output_dir)
    log.info("[%d/%d] %s", int(job.job.num) + 1, job_count(root), job.job.override_dirname)
    try:
        run_cell(config, in_sweep=True)
    except Exception as error:
        # One broken cell must not end a night's sweep; `main` lists the failures and fails at the end.
        line = explain(error)
        if line is None:
            log.exception("this cell failed")
            line = f"{type(error).__name__}: {error}"
        log.error("cell failed: %s", line)
        note_failure(root, int(job.job.num), job.job.override_dirname, line)


def explain(error: BaseException | None) -> str | None:
    """The one line for a person, where the error is of a kind that a person can mend."""
    if isinstance(error, MissingConfigException) and error.options:
        known = ", ".join(sorted(option for option in error.options if not option.startswith("_")))
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{name}'; known: {known}"
    while error is not None:
        if isinstance(error, WinnowError):
            return str(error)
        if isinstance(error, HydraException | OmegaConfBaseException) and error.__cause__ is None:
            return " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None:
            return f"{error.strerror}: {error.filename}"
        error = error.__cause__
    return None


def fail(error: Exception) -> NoReturn:
    """Print the one line and exit with status 2; an error without such a line is a fault of ours and goes on."""
    line = explain(error)
    if line is None:
        raise error
    print(f"winnow: {line}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    try:
        run()
        failed = [line for root in launched for line in failures(root)]
    except KeyboardInterrupt:
        print("winnow: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fail(error)
    if failed:
        print(f"winnow: {len(failed)} cells of the sweep failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)
