"""The uncompressed model's record: evaluated here, taken from another output folder, or left out.

``baseline=evaluate`` computes it once for a model, suite and backend. ``baseline=skip`` and ``baseline=from=DIR`` are
for models that do not fit: the uncompressed model is never opened then. A record of it that lies in the output folder,
or is taken from ``DIR``, is used all the same; what it cannot give is left out, and a cell's record says why.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from harness.cells.cell import Cell
from harness.cells.evaluate import Clock, Evaluation, evaluate_apart
from harness.cells.finished import made_from, say_what_changed
from harness.cells.settings import baseline_folder
from harness.checkpoints.sizes import checkpoint_sizes
from harness.contracts.record import Record, Sample
from harness.contracts.task import TwoModelsTask
from harness.contracts.tracker import Tracker
from harness.errors import WinnowError
from harness.records.describe import size_summary, versions
from harness.records.identity import OF_CELL_ALONE, changes, identity_of
from harness.records.store import RecordStore

log = logging.getLogger(__name__)

EVALUATE = "evaluate"


class Beside(NamedTuple):
    """What an evaluation has of the uncompressed model: its ``samples`` (None where it has no record, empty where none
    are kept), the ``folder`` to open it from, and where it is not to be opened ``unopened``, why."""

    samples: Sequence[Sample] | None
    folder: Path | None
    unopened: str


def baseline_record(cell: Cell, root: Path, tracker: Tracker | None) -> Record | None:
    """The uncompressed model's record: computed once for a model, suite and backend by whoever comes first, or taken
    from elsewhere. None where it is left out (``baseline=skip``) and the folder has none.

    Raises WinnowError where another folder has no record of the same, and where the cell is itself what is left out.
    """
    store, name = RecordStore(root, "baseline"), cell.baseline["id"]
    source = baseline_folder(cell.config["baseline"])
    with store.claim(name) as ours:
        if not ours:
            record = store.read(name)
            if cell.is_baseline:
                log.info("the uncompressed model is evaluated: skipped (%s)", made_from(record))
            return record
        if source is None and cell.config["baseline"] != EVALUATE:
            if cell.is_baseline:
                raise WinnowError("method=none is the uncompressed model, which baseline=skip leaves out: drop one")
            log.info("no record of the uncompressed model, which is left out (baseline=skip)")
            return None
        if source is None:
            say_what_changed(cell.baseline, cell.identity[1], store)
            log.info("evaluating the uncompressed model once for all cells")
            record, samples = _measured(cell)
        else:
            record, samples = _taken(cell, Path(source))
            log.info("the uncompressed model was evaluated elsewhere: its record is from %s", record.taken_from)
        store.write(record, samples)
        if tracker is not None:
            tracker.log_cell(record, samples, root)
    return record


def beside(cell: Cell, baseline: Record | None, root: Path) -> Beside:
    """What the cell's evaluation has of the uncompressed model, whose record ``baseline`` is."""
    samples = None
    if baseline is not None:
        samples = RecordStore(root, "baseline").read_samples(baseline.cell["id"]) or []
    if cell.config["baseline"] == EVALUATE:
        return Beside(samples, cell.model, "")
    return Beside(samples, None, f"baseline={cell.config['baseline']}")


def lacking(cell: Cell, record: Record, baseline: Record | None) -> list[str]:
    """The tasks that the finished cell could not measure without the uncompressed model, and could now."""
    if cell.config["baseline"] == EVALUATE:
        return list(record.not_measured)
    return [
        name
        for name in record.not_measured
        if baseline is not None and not isinstance(cell.tasks.get(name), TwoModelsTask)
    ]


def record_of(cell: Cell, description: dict[str, Any], clock: Clock, evaluation: Evaluation) -> Record:
    """What every record says; sizes and plan are to be added."""
    return Record(
        cell=description,
        config=cell.config,
        versions=versions(),
        fingerprints=dict(cell.contents),
        scores=evaluation.scores,
        sizes={},
        timings=clock.seconds,
        engine=evaluation.engine,
        broken=evaluation.broken,
        not_measured=evaluation.not_measured,
        method_version=cell.method_version,
        task_versions=cell.task_versions,
    )


def _measured(cell: Cell) -> tuple[Record, list[Sample]]:
    clock = Clock()
    evaluation = evaluate_apart("evaluation of the uncompressed model", cell.config, cell.model, clock)
    stored = checkpoint_sizes(cell.model)
    record = replace(
        record_of(cell, cell.baseline, clock, evaluation),
        sizes=size_summary(stored, stored, "plain", expandable=True),
        method_version="",
        fingerprints={name: told for name, told in cell.contents.items() if name not in OF_CELL_ALONE},
    )
    return record, evaluation.samples


def _taken(cell: Cell, folder: Path) -> tuple[Record, list[Sample]]:
    """The record that the output folder has of the same uncompressed model, suite and backend, and its samples.

    Raises WinnowError where it has none, and says what differs.
    """
    source = RecordStore(folder, "baseline")
    record = _found(cell, folder, source)
    samples = source.read_samples(record.cell["id"])
    if samples is None:
        log.warning("%s keeps no samples of the uncompressed model: differences from it are unpaired", folder)
    told = replace(record, cell=dict(cell.baseline), taken_from=record.taken_from or str(folder.resolve()))
    return told, samples or []


def _found(cell: Cell, folder: Path, source: RecordStore) -> Record:
    """The record of the cell's baseline. Raises WinnowError where there is none: what the nearest differs in."""
    asked = f"baseline=from={folder}"
    if not folder.is_dir():
        raise WinnowError(f"{asked}: there is no such folder; give the output_dir of a run")
    name = cell.baseline["id"]
    stored = [source.read(one) for one in source.ids() if one == name] or _readable(source)
    if not stored:
        raise WinnowError(f"{asked}: it holds no record of an uncompressed model; give the output_dir of a run")
    nearest = min(stored, key=lambda record: len(_differing(cell, record)))
    if told := _differing(cell, nearest):
        raise WinnowError(
            f"{asked}: what was evaluated there ({nearest.cell['id']}) is not what is asked for here: {'; '.join(told)}"
        )
    return nearest


def _differing(cell: Cell, record: Record) -> list[str]:
    """What there is other than here, a phrase each."""
    there, here = ({key: value for key, value in one.items() if key != "id"} for one in (record.cell, cell.baseline))
    return changes(there, here) + changes(identity_of(record), cell.identity[1])


def _readable(source: RecordStore) -> list[Record]:
    found = []
    for name in source.ids():
        with suppress(WinnowError):  # another one may do
            found.append(source.read(name))
    return found
