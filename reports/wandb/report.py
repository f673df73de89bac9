"""The command ``winnow-report wandb``: the dashboard of a sweep, and the stored cells as runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.contracts.record import Record, Sample
from harness.errors import WinnowError
from harness.progress import bar
from harness.records.store import RecordStore
from reports.wandb.dashboard import packages, workspace
from reports.wandb.media import cell_media
from reports.wandb.tracker import WandbTracker, cell_summary, require_login, sweep_name

_DESCRIPTION = """\
Makes the dashboard of a sweep on Weights & Biases: a saved view of the sweep's group with scores, drift and diversity
against the compression ratio, generation against multiple choice, drift by position, expert maps, and the table of
generations. Its runs are those that `tracking=wandb` sent; with --log the records in FOLDER are sent first. A cell that
was sent before is replaced, so --log also mends a sweep whose tracking failed half-way. Each call makes a new view.
The service never takes back a deleted run: after deleting some, give another --group.

Needs `wandb login`. With WANDB_MODE=offline, --log only writes the runs to FOLDER/wandb, to be sent later by
`wandb sync`.
"""


@dataclass(frozen=True)
class Stored:
    """A finished cell and where its files are."""

    record: Record
    store: RecordStore
    root: Path
    folder: Path

    def samples(self) -> list[Sample]:
        return self.store.read_samples(self.record.cell["id"]) or []


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "winnow-report wandb", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the output_dir of a sweep, e.g. results/demo")
    parser.add_argument("--project", metavar="P", default="winnow", help="as tracking.project (default: winnow)")
    parser.add_argument("--entity", metavar="E", help="as tracking.entity (default: that of your account)")
    parser.add_argument("--group", metavar="G", help="as tracking.group (default: the name of FOLDER)")
    parser.add_argument("--log", action="store_true", help="send the records in FOLDER first")
    options = parser.parse_args(arguments)
    try:
        print(_report(options))
    except WinnowError as error:
        print(f"winnow-report: error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(options: argparse.Namespace) -> str:
    cells = stored_cells(options.folder)
    group = options.group or sweep_name(options.folder)
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "offline" and options.log:
        _send(cells, mode, group, options)
        runs = options.folder / "wandb"
        return (
            f"{len(cells)} runs written to {runs}: send them with `wandb sync {runs}/offline-run-*`, then make the "
            f"dashboard with `winnow-report wandb {options.folder}`{_alone([cell.record for cell in cells])}"
        )
    if mode != "online":
        raise WinnowError(f"WANDB_MODE={mode}, but a dashboard is made on the service: unset WANDB_MODE")
    packages()  # before anything is sent
    require_login("winnow-report wandb")
    if options.log:
        _send(cells, mode, group, options)
    records = [cell.record for cell in cells]
    view = workspace(records, logged_names(cells), options.entity or "", options.project, group)
    return f"dashboard: {_save(view)}{_alone(records)}"


def _alone(records: Sequence[Record]) -> str:
    """What is said where no run stands for the uncompressed model."""
    if any(record.is_uncompressed() for record in records):
        return ""
    return "\nthere is no record of the uncompressed model: no run stands for it, and nothing is shown beside it"


def _send(cells: Sequence[Stored], mode: str, group: str, options: argparse.Namespace) -> None:
    tracker = WandbTracker(mode, options.project, options.entity, group, folder=str(options.folder))
    for cell in bar("sending cells", len(cells), cells):
        tracker.log_cell(cell.record, cell.samples(), cell.root, cell.folder)


def stored_cells(root: Path) -> list[Stored]:
    """The uncompressed models' records, then the cells'. Raises WinnowError where there is none, or one is damaged."""
    stores = [RecordStore(root, kind) for kind in ("baseline", "records")]
    found = [(store, name) for store in stores for name in store.ids()]
    if not found:
        raise WinnowError(f"no records in {root / 'records'}: run `winnow output_dir={root} ...` first")
    # A single run with an output_dir of its own leaves its files there.
    alone = len(stores[1].ids()) == 1 and (root / "plan.json").is_file()
    return [Stored(store.read(name), store, root, root if alone else root / "cells" / name) for store, name in found]


def logged_names(cells: Sequence[Stored]) -> set[str]:
    """What tracking logs of the cells; one is looked at of those with the same scores and kinds of files."""
    names: set[str] = set()
    alike: dict[Any, Stored] = {}
    for cell in cells:
        summary = frozenset(cell_summary(cell.record))
        names |= summary
        kept = (
            cell.store.samples_path(cell.record.cell["id"]),
            cell.folder / "plan.json",
            cell.folder / "saliency.json",
        )
        positions = frozenset(s.part for s in cell.record.scores if s.part.startswith("position "))
        sources = frozenset(cell.record.expert_usage)
        alike.setdefault((summary, positions, sources, *(path.is_file() for path in kept)), cell)
    for cell in alike.values():
        media = cell_media(cell.record, cell.samples(), cell.root, cell.folder, generations=1)
        names |= {*media.tables, *media.images}
        names |= {name for of_step in (media.layers, media.positions) for step in of_step.values() for name in step}
    return names


def _save(view: Any) -> str:
    """Sends the view; returns its address. Raises WinnowError."""
    import wandb

    try:
        view.entity = view.entity or wandb.Api().default_entity or ""
        return str(view.save().url)
    except Exception as error:  # what the service refuses comes in kinds of exception that have no common parent
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WinnowError(
            f"cannot save the dashboard in project {view.project}: {reason}: check the network, `wandb login`, "
            "--entity and --project (--log makes the project)"
        ) from error
