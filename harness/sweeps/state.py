"""What is known of a sweep while it runs and afterwards: a folder of its own in ``sweeps`` of the output folder.

``sweep.json`` has its command, launcher and jobs. ``jobs/KEY.json`` says what became of a job, written by whoever ran
it; ``logs/KEY.log`` is its log. Nothing here decides whether a job is done: what it makes does
(``harness.sweeps.jobs``).
"""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from harness.errors import WinnowError
from harness.files import write_files
from harness.sweeps.graph import Job

SWEEPS, SWEEP_FILE = "sweeps", "sweep.json"
CANCELLED = "cancelled"  # a file in its folder: no job of the sweep begins any more
VERSION = 1
PACKAGE = "moe-winnow"

# queued: an engine has it. busy: another launcher is at work on it. missing: what it needs is not there.
State = Literal["waiting", "queued", "running", "done", "failed", "busy", "missing", "cancelled"]
OVER = ("done", "failed", "missing", "cancelled")


@dataclass(frozen=True)
class Outcome:
    """What became of a job. ``message`` says why where it is not done. ``gpu_seconds`` are seconds times GPUs.

    ``peak_memory_gib`` is the host's, of the largest process. ``engine_id`` is what the engine calls the job.
    """

    state: State
    message: str = ""
    host: str = ""
    started: str = ""
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory_gib: float = 0.0
    engine_id: str = ""


def begin(
    root: Path, jobs: Sequence[Job], refused: Sequence[tuple[str, str]], command: Sequence[str], launcher: str
) -> Path:
    """Makes the folder of a new sweep of the output folder ``root``; ``refused`` are cells that cannot be."""
    started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    sweep = root / SWEEPS / f"{started}-{socket.gethostname()}-{os.getpid()}"
    said = {
        "version": VERSION,
        "winnow": version(PACKAGE),
        "command": list(command),
        "launcher": launcher,
        "started": started,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "jobs": [
            {"key": job.key, "kind": job.kind, "label": job.label, "needs": job.needs, "takes": asdict(job.resources)}
            for job in jobs
        ],
        "refused": [": ".join(one) for one in refused],
    }
    write_files({sweep / SWEEP_FILE: (json.dumps(said, indent=1) + "\n").encode()})
    return sweep


def note(sweep: Path, key: str, outcome: Outcome) -> None:
    write_files({_file(sweep, key, "jobs", "json"): (json.dumps(asdict(outcome)) + "\n").encode()})


def log_file(sweep: Path, key: str) -> Path:
    return _file(sweep, key, "logs", "log")


def outcome_of(sweep: Path, key: str) -> Outcome:
    """What was noted of the job last; "waiting" where nothing was."""
    try:
        return Outcome(**json.loads(_file(sweep, key, "jobs", "json").read_text()))
    except FileNotFoundError:
        return Outcome("waiting")
    except (OSError, ValueError, TypeError) as error:
        return Outcome("failed", f"its note cannot be read: {error}")


def read_sweep(sweep: Path) -> Mapping[str, Any]:
    """``sweep.json``. Raises WinnowError where it cannot be read."""
    try:
        said: Mapping[str, Any] = json.loads((sweep / SWEEP_FILE).read_text())
        if not isinstance(said["jobs"], list):
            raise TypeError("it is of an older version of winnow")
        return said
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WinnowError(f"cannot read the sweep {sweep}: {error}") from error


def cells_left(sweep: Path) -> int:
    """How many cells are not over, those at work among them."""
    keys = [job["key"] for job in read_sweep(sweep)["jobs"] if job["kind"] == "cell"]
    return sum(outcome_of(sweep, key).state not in OVER for key in keys)


def sweeps_in(root: Path) -> list[Path]:
    """The sweeps of an output folder, the latest last."""
    return sorted(path for path in (root / SWEEPS).glob("*") if (path / SWEEP_FILE).is_file())


def _file(sweep: Path, key: str, folder: str, ending: str) -> Path:
    return sweep / folder / f"{key.replace('/', '-')}.{ending}"
