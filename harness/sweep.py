"""What a sweep knows beyond its cells: how many there are, which failed, and what a person reads about it."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)

FAILURES = "failures"
SWEEP_FILE = "sweep.json"
# Output folder of the sweep that this process launched, if it launched one.
launched: list[Path] = []


class SweepNotes(Callback):
    """Hydra callback: leaves ``sweep.json`` (command and number of jobs) in the output folder before the first job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.dry_run:
            return
        root = Path(config.output_dir)
        params = config.hydra.sweeper.get("params") or {}
        overrides = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
        root.mkdir(parents=True, exist_ok=True)
        notes = {"overrides": list(config.hydra.overrides.task), "jobs": count_jobs(overrides)}
        (root / SWEEP_FILE).write_text(json.dumps(notes, indent=1) + "\n")
        shutil.rmtree(root / FAILURES, ignore_errors=True)
        launched.append(root)


def count_jobs(overrides: list[str]) -> int:
    """Jobs of the grid that the overrides span; of two for the same key the later counts."""
    parsed = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(overrides)}
    return math.prod(len(list(o.sweep_iterator())) if o.is_sweep_override() else 1 for o in parsed.values())


def job_count(root: Path) -> int:
    return int(json.loads((root / SWEEP_FILE).read_text())["jobs"])


def note_failure(root: Path, job: int, overrides: str, message: str) -> None:
    folder = root / FAILURES
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job:05d}.txt").write_text(f"{overrides}: {message}\n")


def failures(root: Path) -> list[str]:
    """One line a failed job of the last sweep."""
    return [path.read_text().strip() for path in sorted((root / FAILURES).glob("*.txt"))]
