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
from omegaconf import DictConfig, OmegaConf

from harness.apart import warm_up
from harness.cells.settings import is_folder_name, meanings_text, spelled
from harness.exits import fail
from harness.reference import model_path
from harness.reference.variants import panel_model
from harness.sweeps.plugin import failed, show_record

OmegaConf.register_new_resolver("reference_model", model_path, replace=True)
OmegaConf.register_new_resolver("panel_model", panel_model, replace=True)


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
    """One cell; a sweep goes to ``harness.sweeps.plugin``."""
    if not config.dry_run:
        warm_up()
    from harness.cells.run import run_cell, run_shard  # here, so that --help and a misspelt option need no torch

    logging.captureWarnings(True)
    explicit = any(override.startswith("output_dir=") for override in HydraConfig.get().overrides.task)
    try:
        if config.dry_run:
            from harness.cells.dry_run import show

            show(config)
        elif config.calibration.get("shard") is not None:
            file = run_shard(config)
            print(f"partial statistics: {file or 'none, since the corpus has too few batches'}", flush=True)
        else:
            record = run_cell(config, publish=explicit)
            show_record(Path(config.output_dir), record.cell["id"])
    except Exception as error:
        fail(error)  # here, because Hydra would print a line of its own first


def _terminated(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, _terminated)
    sys.argv[1:] = spelled(sys.argv[1:])
    try:
        run()
    except KeyboardInterrupt:
        print("winnow: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fail(error)
    if failed:
        print(f"winnow: {len(failed)} jobs of the sweep failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)
