"""Tracking: a finished cell sent to Weights & Biases. The records stay the truth; this is a copy to look
at.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from harness.errors import WinnowError
from harness.records import Record, Sample

MODES = ("online", "offline", "disabled")
_TAG_LENGTH = 64  # the service refuses longer tags
_ADVICE = "log in with `wandb login`, or work without a network with `tracking.mode=offline`"


class Tracker(Protocol):
    def log_cell(self, record: Record, samples: Sequence[Sample], group: str) -> None:
        """Sends one finished cell to the group of its sweep."""
        ...


@dataclass(frozen=True)
class WandbTracker:
    """One run a cell, named after the cell, in one group a sweep.

    ``group`` overrides the name that the sweep gives; ``folder`` is where runs are kept before (online) or
    until (offline) they are sent; ``generations`` is the most texts a task adds to the table of generations.

    Raises WinnowError when it is made, so before any work, where wandb is not installed, the mode is unknown
    or mode ``online`` has no API key.
    """

    mode: str = "online"
    project: str = "winnow"
    entity: str | None = None
    group: str | None = None
    folder: str = "."
    generations: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise WinnowError(f"tracking.mode={self.mode} is unknown: choose one of {', '.join(MODES)}")
        wandb = _wandb()
        if self.mode == "online":
            try:
                logged_in = wandb.login(prompt=False, verify=False)
            except (wandb.Error, ValueError) as error:
                raise WinnowError(f"tracking=wandb cannot log in: {_one_line(error)}: {_ADVICE}") from error
            if not logged_in:
                raise WinnowError(f"tracking=wandb has no API key: {_ADVICE}")

    def log_cell(self, record: Record, samples: Sequence[Sample], group: str) -> None:
        """Raises WinnowError where the run cannot be started, written or sent. Call it once the record is
        stored.
        """
        wandb = _wandb()
        try:
            # Where the folder is missing wandb takes the system's temporary folder, with a mere warning.
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with wandb.init(
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                group=self.group or group,
                dir=self.folder,
                name=record.cell["id"],
                job_type="baseline" if record.is_uncompressed() else "cell",
                tags=cell_tags(record),
                config=cell_config(record),
                reinit="create_new",
                settings=wandb.Settings(
                    console="off", silent=True, save_code=False, disable_git=True, x_disable_stats=True
                ),
            ) as run:
                run.summary.update(cell_summary(record))
                rows = generation_rows(samples, self.generations)
                if rows:
                    run.log({"generations": wandb.Table(columns=list(GENERATION_COLUMNS), data=rows)})
        except (wandb.Error, OSError) as error:
            raise WinnowError(
                f"tracking=wandb failed on {record.cell['id']}, whose record is stored: {_one_line(error)}: {_ADVICE}"
            ) from error


GENERATION_COLUMNS = ("task", "domain", "item", "score", "output", "detail")


def generation_rows(samples: Sequence[Sample], most: int) -> list[list[Any]]:
    """The first ``most`` samples of each task that hold a generated text, one row each."""
    texts = sorted((sample for sample in samples if sample.output), key=lambda sample: sample.task)
    return [
        [s.task, s.domain, s.item, s.score, s.output, json.dumps(s.detail, default=str)]
        for _, of_task in groupby(texts, key=lambda sample: sample.task)
        for s in list(of_task)[:most]
    ]


def cell_summary(record: Record) -> dict[str, float]:
    """``task/metric`` or ``task/metric/domain``, with ``/low``, ``/high`` and ``/n``; then sizes and
    timings.
    """
    summary: dict[str, float] = {}
    for score in record.scores:
        name = "/".join(part for part in (score.task, score.metric, score.domain) if part)
        summary |= {
            name: score.value,
            f"{name}/low": score.low,
            f"{name}/high": score.high,
            f"{name}/n": score.n,
        }
    summary |= {f"size/{name}": value for name, value in record.sizes.items()}
    summary |= {f"seconds/{name}": value for name, value in record.timings.items()}
    return summary


def cell_tags(record: Record) -> list[str]:
    cell = record.cell
    tags = [str(cell["method"]), f"ratio {float(cell['ratio']):g}", str(cell["calibration"]), *record.stages()]
    return list(dict.fromkeys(tag[:_TAG_LENGTH] for tag in tags if tag))


def cell_config(record: Record) -> dict[str, Any]:
    return record.config | {
        "cell": record.cell,
        "versions": record.versions,
        "fingerprints": record.fingerprints,
    }


def _wandb() -> Any:
    """Imported on use: it takes a second, and a run without tracking does not need it."""
    try:
        import wandb
    except ImportError as error:
        raise WinnowError(
            "tracking=wandb needs the package wandb: pip install 'moe-winnow[track]', or leave tracking=none"
        ) from error
    return wandb


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
