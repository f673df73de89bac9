"""The story of one cell, from its configuration to its record: compress, evaluate, write.

What computes runs in processes of its own (``harness.apart``), so that a device's memory is free for the next stage.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig

from harness import progress
from harness.apart import apart
from harness.calibration.shards import check_shard
from harness.calibration.tokens import TokenSequence
from harness.cells.baseline import EVALUATE, baseline_record, beside, lacking, record_of
from harness.cells.cell import Cell, corpus_of, prepare
from harness.cells.check import make
from harness.cells.compress import calibrate_intact, calibrate_part, compress, plan_again
from harness.cells.diagnostics import diagnose_cell
from harness.cells.evaluate import Clock, evaluate_apart
from harness.cells.finished import made_from, say_what_changed
from harness.cells.held_out import held_out_text
from harness.cells.publish import check_free
from harness.cells.publish import publish as publish_files
from harness.cells.room import keeps_checkpoint
from harness.contracts.plan import CompressionPlan
from harness.contracts.plan_files import load_plan
from harness.contracts.record import Record, Sample
from harness.contracts.tracker import Tracker
from harness.data import contamination
from harness.errors import WinnowError
from harness.files import sweep, write_error
from harness.records.describe import plan_summary, size_summary
from harness.records.store import RecordStore

log = logging.getLogger(__name__)


def run_cell(config: DictConfig, also: frozenset[str] = frozenset(), publish: bool = False) -> Record:
    """Run one cell, or find its record; returns the record. Raises WinnowError.

    ``also`` names statistics that other cells of the sweep need, so that one calibration pass serves them all. With
    ``publish`` plan, saliency and checkpoint are put into the output folder itself.
    """
    with progress.showing(config.progress):
        cell = prepare(config, also)
        root = Path(config.output_dir)
        if publish and not cell.is_baseline:
            check_free(root, cell.id)
        tracker = _tracker(config)
        if cell.is_baseline and cell.tasks:
            baseline = baseline_record(cell, root, tracker)
            assert baseline is not None
            return baseline
        folder = root / "cells" / cell.id
        record = _finished(cell, root, folder, tracker)
        if config.diagnostics.name != "none":
            diagnose_cell(config, cell, lambda: _plan_of(cell, record, folder, root), lambda: _tokenized(cell), root)
        if publish:
            publish_files(folder, root, cell.id)
        return record


def run_baseline(config: DictConfig) -> Record:
    """The record of the uncompressed model that the cell is compared with, evaluated now or found. Raises WinnowError.

    For a cell with ``baseline=evaluate`` or from another folder.
    """
    with progress.showing(config.progress):
        cell = prepare(config)
        record = baseline_record(cell, Path(config.output_dir), _tracker(config))
        assert record is not None  # a cell that leaves it out has no such job
        return record


def run_calibration(config: DictConfig, also: frozenset[str] = frozenset()) -> None:
    """The statistics that the cell, and ``also`` others, read of the intact model, and nothing else. Raises
    WinnowError."""
    with progress.showing(config.progress):
        cell = prepare(config, also)
        apart(f"calibrating ({cell.id})", calibrate_intact, cell, Path(config.output_dir))


def run_shard(config: DictConfig, also: frozenset[str] = frozenset()) -> Path | None:
    """The statistics of one part of the calibration corpus, ``calibration.shard``, and nothing else; returns their
    file, None where there is nothing left for this part. Raises WinnowError."""
    with progress.showing(config.progress):
        shard, shards = config.calibration.shard, config.calibration.shards
        check_shard(shard, shards)
        cell = prepare(config, also)
        if not cell.statistics:
            raise WinnowError(f"method={cell.method.name} reads no statistics: calibration.shard is for those that do")
        what = f"calibration, shard {shard} of {shards}"
        return apart(what, calibrate_part, cell, Path(config.output_dir))


def _tracker(config: DictConfig) -> Tracker | None:
    return make(config.tracking, "tracking", Tracker) if config.tracking else None


def _finished(cell: Cell, root: Path, folder: Path, tracker: Tracker | None) -> Record:
    """The record of the cell: computed now, or by whoever came first."""
    store = RecordStore(root)
    with store.claim(cell.id) as ours:
        if not ours:
            record = store.read(cell.id)
            baseline = baseline_record(cell, root, tracker) if cell.tasks else None
            missing = lacking(cell, record, baseline)
            if not missing:
                log.info("cell %s is finished: skipped (%s)", cell.id, made_from(record))
                return record
            log.info("cell %s was measured without the uncompressed model: again for %s", cell.id, ", ".join(missing))
        else:
            say_what_changed(cell.description, cell.identity[0], store)
        with _place_for(cell, folder) as checkpoint:
            record, samples = _compute(cell, folder, checkpoint, root, tracker)
            store.write(record, samples)
            if not keeps_checkpoint(cell.config["keep_checkpoint"], cell.model, folder):
                shutil.rmtree(checkpoint, ignore_errors=True)
            elif checkpoint != folder / "checkpoint":
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)
                shutil.move(checkpoint, folder / "checkpoint")
        if tracker is not None:
            tracker.log_cell(record, samples, root, folder)
        return record


@contextmanager
def _place_for(cell: Cell, folder: Path) -> Iterator[Path]:
    """Where the checkpoint lies while it is needed: in the cell's folder, or with ``scratch`` on a disk of this
    machine, where nothing of it stays."""
    scratch = cell.config["scratch"]
    if scratch is None:
        yield folder / "checkpoint"
        return
    try:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f"winnow-{cell.id}-", dir=scratch))
    except OSError as error:
        raise write_error(Path(scratch), error) from error
    try:
        yield own / "checkpoint"
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _compute(
    cell: Cell, folder: Path, checkpoint: Path, root: Path, tracker: Tracker | None
) -> tuple[Record, list[Sample]]:
    sweep(folder, ".*.tmp", ".*.partial", ".*.replaced")  # the cell is claimed: nobody else writes here
    settings, texts = cell.config["calibration"], (document.text for document in cell.documents)
    contained = contamination.check(settings["name"], texts, cell.tasks.values()) if cell.reads_text else {}
    if cell.tasks and cell.config["baseline"] != EVALUATE:
        baseline_record(cell, root, tracker)  # one from elsewhere that does not fit is refused before anything is done
    made = apart(f"compressing ({cell.id})", compress, cell, folder, checkpoint, root, held_out_text(cell))
    clock = Clock(dict(made.seconds))
    # Only now, so that of several processes one evaluates the uncompressed model while the others calibrate.
    baseline = baseline_record(cell, root, tracker) if cell.tasks else None
    evaluation = evaluate_apart(
        f"evaluation ({cell.id})", cell.config, checkpoint, clock, *beside(cell, baseline, root)
    )
    before = {key.removesuffix("_before"): value for key, value in made.applied.items() if key.endswith("_before")}
    plan, layout = made.decision.plan, made.applied["layout"]
    has_place = [[e.constant is None and e.low_rank is None for e in layer.experts] for layer in plan.layers]
    of_layers = zip(plan.layers, has_place, strict=True)
    whole = all(new is not None and places[new] for layer, places in of_layers for new in layer.route)
    record = replace(
        record_of(cell, cell.description, clock, evaluation),
        sizes=size_summary(made.applied, before, layout, expandable=whole and cell.quantization is None),
        plan=plan_summary(plan, cell.shape.width, {layer: asdict(one) for layer, one in made.thresholds.items()}),
        expert_usage=made.usage,
        contamination=contained,
        search={} if made.decision.search is None else made.decision.search.to_json(),
        recovery=made.recovery,
        all_tokens=made.decision.all_tokens,
    )
    return record, evaluation.samples


def _tokenized(cell: Cell) -> list[TokenSequence]:
    """The calibration text, also of a cell whose method reads none."""
    return cell.sequences if cell.reads_text else corpus_of(cell.config, cell.model)[1]


def _plan_of(cell: Cell, record: Record, folder: Path, root: Path) -> CompressionPlan:
    """The plan of a finished cell, decided once more where its folder is gone. Raises WinnowError if it is another."""
    if (folder / "plan.json").is_file():
        plan = load_plan(folder / "plan.json")
    else:
        log.info("the plan of %s is not kept: deciding again", cell.id)
        plan = apart(f"deciding ({cell.id})", plan_again, cell, folder / "rounds", root)
    found = plan_summary(plan, cell.shape.width, {})
    if any({**record.plan.get(layer, {}), **of_layer} != record.plan.get(layer) for layer, of_layer in found.items()):
        raise WinnowError(f"{cell.id}: the plan found is not the recorded one; delete the record to run the cell again")
    return plan
