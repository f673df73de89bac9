"""Tracking: a finished cell sent to Weights & Biases. The records stay the truth; this is a copy to look
at.
"""

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.contracts.record import Record, Sample, Score
from harness.errors import WinnowError
from reports.numbers.broken import faults
from reports.numbers.measures import is_average, main_measures
from reports.numbers.statistics import Estimate, Measure, estimate
from reports.wandb.media import CellMedia, cell_media

MODES = ("online", "offline", "disabled")
AVERAGE = "generative_average"
_TAG_LENGTH = 64  # the service refuses longer tags
_LOG_IN = "log in with `wandb login`"
_ADVICE = f"{_LOG_IN}, or work without a network with `tracking.mode=offline`"


@dataclass(frozen=True)
class WandbTracker:
    """One run a cell, named after the cell, in one group a sweep.

    ``group`` overrides the name of the sweep's output folder; ``folder`` is where runs are kept before (online) or
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
        if self.mode == "online":
            require_login("tracking=wandb", _ADVICE)
        else:
            _wandb()

    def log_cell(self, record: Record, samples: Sequence[Sample], root: Path, folder: Path | None = None) -> None:
        """Raises WinnowError where the run cannot be started, written or sent. Call it once the record is
        stored.
        """
        wandb = _wandb()
        group = self.group or sweep_name(root)
        media = cell_media(record, samples, root, folder, self.generations)
        try:
            # Where the folder is missing wandb takes the system's temporary folder, with a mere warning.
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with wandb.init(
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                group=group,
                dir=self.folder,
                id=run_id(record, group),
                name=record.cell["id"],
                job_type="baseline" if record.is_uncompressed() else "cell",
                tags=cell_tags(record),
                config=cell_config(record),
                reinit="create_new",
                settings=wandb.Settings(
                    console="off", silent=True, save_code=False, disable_git=True, x_disable_stats=True
                ),
            ) as run:
                _log_media(wandb, run, media)
                run.summary.update(cell_summary(record))
        except (wandb.Error, OSError) as error:
            raise WinnowError(
                f"tracking=wandb failed on {record.cell['id']}, whose record is stored: {_one_line(error)}: {_ADVICE}; "
                f"`winnow-report wandb {root} --log` sends the records that are there"
            ) from error


def _log_media(wandb: Any, run: Any, media: CellMedia) -> None:
    """A step a layer for the histograms, which W&B draws over the steps, then one
    a position, then everything else.
    """
    from PIL import Image

    # Lines are not shown by their last point: the summary keeps the whole text's drift alone.
    run.define_metric("position", hidden=True, summary="none")
    run.define_metric("by_position/*", step_metric="position", summary="none")
    for layer, histograms in media.layers.items():
        drawn = {name: wandb.Histogram(np_histogram=parts) for name, parts in histograms.items()}
        run.log(drawn, step=layer, commit=True)
    for position, values in media.positions.items():
        run.log({"position": position, **values})
    shown: dict[str, Any] = {
        name: wandb.Table(columns=list(columns), data=rows) for name, (columns, rows) in media.tables.items()
    }
    shown |= {name: wandb.Image(Image.open(io.BytesIO(png))) for name, png in media.images.items()}
    if shown:
        run.log(shown)


def sweep_name(root: Path) -> str:
    return root.resolve().name


def run_id(record: Record, group: str) -> str:
    """The same for a cell whenever it is sent, so that a second time replaces the first."""
    return hashlib.sha256(f"{group}/{record.cell['id']}".encode()).hexdigest()[:16]


def key(measure: Measure) -> str:
    """The name of the measure in the summary of a run."""
    if is_average(measure):
        return f"{measure.name.removesuffix('_average')}_average"
    part = measure.parts[0]
    return "/".join(word for word in (part.task, part.metric, part.of) if word)


def cell_summary(record: Record) -> dict[str, Any]:
    """``task/metric`` or ``task/metric/part``, ``generative_average`` and the other averages, with ``/low``, ``/high``
    and ``/n``; then sizes and timings. Drift by position is in a table of its own; what is not finite is left out.
    """
    scores = {
        "/".join(part for part in (s.task, s.metric, s.part) if part): s
        for s in record.scores
        if not s.part.startswith("position ")
    }
    found: dict[str, Score | Estimate | None] = {**scores}
    if not record.broken:  # else fewer tasks would stand behind the averages than behind other cells'
        found |= {key(m): estimate(m, [record]) for m in main_measures([record]) if is_average(m)}
    summary: dict[str, Any] = {}
    for name, score in found.items():
        if score is None:
            continue
        summary |= {name: score.value, f"{name}/low": score.low, f"{name}/high": score.high, f"{name}/n": score.n}
    summary |= {f"size/{name}": value for name, value in record.sizes.items() if value is not None}
    summary |= {f"seconds/{name}": value for name, value in record.timings.items()}
    return {name: value for name, value in summary.items() if not isinstance(value, float) or math.isfinite(value)}


def cell_tags(record: Record) -> list[str]:
    cell = record.cell
    tags = [str(cell["method"]), f"ratio {float(cell['ratio']):g}", str(cell["calibration"]), *record.stages()]
    tags.append(_model_tag(record))
    if faults(record):
        tags.append("broken")
    return list(dict.fromkeys(tag[:_TAG_LENGTH] for tag in tags if tag))


def _model_tag(record: Record) -> str:
    """The model's name and the beginning of its fingerprint, which tells it from another of that name."""
    words = (str(record.cell.get("model") or ""), record.fingerprints.get("model", "").rpartition(":")[2][:8])
    return " ".join(filter(None, ("model" if any(words) else "", *words)))


def cell_config(record: Record) -> dict[str, Any]:
    return record.config | {
        "cell": record.cell,
        "versions": record.versions,
        "fingerprints": record.fingerprints,
        "faults": faults(record),
        "not_measured": record.not_measured,
        "taken_from": record.taken_from,
    }


def require_login(what: str, advice: str = _LOG_IN) -> None:
    """Raises WinnowError where wandb is not installed or has no API key; asks nothing and sends nothing."""
    wandb = _wandb()
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:
        raise WinnowError(f"{what} cannot log in: {_one_line(error)}: {advice}") from error
    if not logged_in:
        raise WinnowError(f"{what} has no API key: {advice}")


def _wandb() -> Any:
    """Imported on use: it takes a second, and a run without tracking does not need it."""
    try:
        import wandb
    except ImportError as error:
        raise WinnowError(
            "Weights & Biases needs the package wandb: pip install 'moe-winnow[track]', or leave tracking=none"
        ) from error
    return wandb


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
