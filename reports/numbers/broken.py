"""Which cells are broken: they are shown as such, and no number of theirs is tested."""

import json
import math
from pathlib import Path

from harness.contracts.record import Record


def faults(record: Record, task: str = "") -> list[str]:
    """Why the record, or a task of it, cannot be taken for a result: tasks that could not score the model, and scores
    that are not finite. Empty for a sound one.
    """
    told = [f"{name}: {why}" for name, why in record.broken.items() if task in ("", name)]
    odd = [
        f"{score.task} {score.metric} {score.part}".rstrip() + f" is {score.value:g}"
        for score in record.scores
        if not math.isfinite(score.value) and task in ("", score.task)
    ]
    return told + odd


def failed_cells(folder: Path) -> list[str]:
    """One line a job of the last sweep in the folder that failed (``harness.sweeps.state`` says what lies there; sweeps
    of before left a file a cell in ``failures``)."""
    sweeps = [path for path in (folder / "sweeps").glob("*") if path.is_dir()]
    last = max(sweeps, key=lambda path: path.name, default=folder)
    told = [_line(path) for path in sorted((last / "failures").glob("*.txt"))]
    return told + (_failed_jobs(last) if (last / "sweep.json").is_file() else [])


def _failed_jobs(sweep: Path) -> list[str]:
    try:
        said = json.loads((sweep / "sweep.json").read_text())
        told = [str(line) for line in said.get("refused", ())]
        for job in said["jobs"] if isinstance(said["jobs"], list) else ():
            note = sweep / "jobs" / f"{job['key'].replace('/', '-')}.json"
            outcome = json.loads(note.read_text()) if note.is_file() else {}
            if outcome.get("state") in ("failed", "missing"):
                told.append(f"{job['label']}: {outcome['message']}")
        return told
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{sweep / 'sweep.json'} cannot be read: {error}"]


def _line(path: Path) -> str:
    """A note of a failure; that it cannot be read is one too."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
