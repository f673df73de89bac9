"""The story of one cell, from its configuration to its record: calibrate, decide, apply, evaluate, write."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness import progress
from harness.calibration.calibrate import calibrate
from harness.calibration.collected import Collected
from harness.calibration.gate_ratios import gate_ratio_counts
from harness.calibration.tokens import TokenSequence
from harness.cells.cell import Cell, corpus_of, prepare
from harness.cells.check import make
from harness.cells.diagnostics import diagnose_cell
from harness.cells.evaluate import Clock, Evaluation, evaluate
from harness.cells.finished import made_from, say_what_changed
from harness.cells.publish import check_free
from harness.cells.publish import publish as publish_files
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader
from harness.checkpoints.load import load_model
from harness.checkpoints.quantize import quantize_checkpoint
from harness.checkpoints.sizes import checkpoint_sizes
from harness.checkpoints.skipping import Threshold, write_thresholds
from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan
from harness.contracts.record import Record, Sample
from harness.contracts.statistics import Statistics
from harness.contracts.tracker import Tracker
from harness.data import contamination
from harness.errors import WinnowError
from harness.families.table import family_of
from harness.files import sweep, write_files
from harness.records.describe import plan_summary, size_summary, versions
from harness.records.identity import OF_CELL_ALONE
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
        tracker: Tracker | None = make(config.tracking, "tracking", Tracker) if config.tracking else None
        baseline = _baseline(cell, root, tracker) if cell.tasks else None
        if cell.is_baseline and baseline is not None:
            return baseline
        folder = root / "cells" / cell.id
        record = _finished(cell, root, folder, tracker, baseline)
        if config.diagnostics.name != "none":
            diagnose_cell(config, cell, lambda: _plan_of(cell, record, folder, root), lambda: _tokenized(cell), root)
        if publish:
            publish_files(folder, root, cell.id)
        return record


def _finished(cell: Cell, root: Path, folder: Path, tracker: Tracker | None, baseline: Record | None) -> Record:
    """The record of the cell: computed now, or by whoever came first."""
    store = RecordStore(root)
    with store.claim(cell.id) as ours:
        if not ours:
            record = store.read(cell.id)
            log.info("cell %s is finished: skipped (%s)", cell.id, made_from(record))
            return record
        say_what_changed(cell.description, cell.identity[0], store)
        record, samples = _compute(cell, folder, root, baseline)
        store.write(record, samples)
        if not cell.config["keep_checkpoint"]:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        if tracker is not None:
            tracker.log_cell(record, samples, root, folder)
        return record


def _compute(cell: Cell, folder: Path, root: Path, baseline: Record | None) -> tuple[Record, list[Sample]]:
    clock, checkpoint = Clock(), folder / "checkpoint"
    sweep(folder, ".*.tmp", ".*.partial", ".*.replaced")  # the cell is claimed: nobody else writes here
    settings, texts = cell.config["calibration"], (document.text for document in cell.documents)
    contained = contamination.check(settings["name"], texts, cell.tasks.values()) if cell.reads_text else {}
    decision, collected = _decide(cell, clock, folder / "rounds", root)
    write_files(_decision_files(decision, cell.method.name, folder))
    with clock.stage("apply"):
        applied = apply_plan(cell.model, decision.plan, checkpoint, cell.config["layout"], lower_top_k=cell.lower_top_k)
    thresholds: dict[int, Threshold] = {}
    if cell.skip is not None:
        with clock.stage("skip"):
            thresholds = _skip_experts(cell, checkpoint)
    if cell.quantization is not None:
        with clock.stage("quantize"):
            applied |= quantize_checkpoint(checkpoint, checkpoint, cell.quantization)
    written = None if baseline is None else RecordStore(root, "baseline").read_samples(baseline.cell["id"])
    evaluation = evaluate(cell.config, checkpoint, clock, written or [], cell.model)
    before = {key.removesuffix("_before"): value for key, value in applied.items() if key.endswith("_before")}
    whole = all(new is not None for layer in decision.plan.layers for new in layer.route)
    record = replace(
        _record(cell, cell.description, clock, evaluation),
        sizes=size_summary(applied, before, applied["layout"], expandable=whole and cell.quantization is None),
        plan=plan_summary(decision.plan, cell.shape.width, {layer: asdict(one) for layer, one in thresholds.items()}),
        expert_usage={} if collected is None else collected.usage,
        contamination=contained,
    )
    return record, evaluation.samples


# --- calibration and decision -----------------------------------------------------------------------------------------


def _tokenized(cell: Cell) -> list[TokenSequence]:
    """The calibration text, also of a cell whose method reads none."""
    return cell.sequences if cell.reads_text else corpus_of(cell.config, cell.model)[1]


def _decide(cell: Cell, clock: Clock, so_far: Path, root: Path) -> tuple[Decision, Collected | None]:
    """The decision of all rounds together, and what the pass over the intact model collected.

    ``so_far`` holds what the rounds before have left while a round looks at it.
    """
    decision: Decision | None = None
    intact, model, fingerprint, wanted = None, cell.model, cell.contents["model"], cell.statistics
    try:
        for number, ratio in enumerate(cell.rounds, start=1):
            if decision is not None:
                log.info("round %d of %d: calibrating what the rounds before have left", number, len(cell.rounds))
                with clock.stage("apply"):
                    apply_plan(cell.model, decision.plan, so_far, lower_top_k=cell.lower_top_k)
                # The plan tells what the rounds have left, without a hash of all files.
                plan = hashlib.sha256(json.dumps(decision.plan.to_json()).encode()).hexdigest()
                model, fingerprint, wanted = so_far, f"{cell.contents['model']} plan:{plan}", cell.method.requires
            with clock.stage("calibration"):
                statistics, collected = _statistics(cell, model, fingerprint, wanted, root)
            intact = intact or collected
            with clock.stage("plan"):
                limited = replace(statistics, top_k=cell.shape.top_k)
                found = cell.method.decide(limited, ratio, cell.config["seed"])
                decision = cell.schedule.joined(decision, found)
    finally:
        shutil.rmtree(so_far, ignore_errors=True)
    assert decision is not None  # a schedule has at least one round
    return decision, intact


def _statistics(
    cell: Cell, model: Path, fingerprint: str, wanted: frozenset[str], root: Path
) -> tuple[Statistics, Collected | None]:
    """The statistics of the checkpoint ``model``, and how they came about."""
    if not cell.method.requires:
        model_config = read_config(model)
        family = family_of(model_config)
        empty = Statistics(
            num_experts=family.num_experts(model_config),
            top_k=family.top_k(model_config),
            tokens=0,
            layers={layer: {} for layer in family.moe_layers(model_config)},
            n_group=family.router_groups(model_config),
            expert_weights=expert_weights_reader(model, family),
        )
        return empty, None
    return calibrate(
        model,
        _loader(cell, model),
        cell.sequences,
        wanted,
        root / "calibration",
        batch_size=cell.config["calibration"]["batch_size"],
        dtype=cell.config["model"]["dtype"],
        corpus=cell.config["calibration"]["name"],
        fingerprint=fingerprint,
    )


def _loader(cell: Cell, model: Path) -> Callable[[], Any]:
    return lambda: load_model(model, cell.config["model"]["dtype"], cell.config["model"]["device"])


def _skip_experts(cell: Cell, checkpoint: Path) -> dict[int, Threshold]:
    """Set each layer's threshold by the gate values of the compressed model, in whose config.json it is written."""
    assert cell.skip is not None
    settings, config = cell.config["calibration"], read_config(checkpoint)
    family = family_of(config)
    counts = gate_ratio_counts(
        _loader(cell, checkpoint)(), cell.sequences, family, settings["batch_size"], corpus=settings["name"]
    )
    thresholds = {layer: cell.skip.threshold(bins, family.top_k(config)) for layer, bins in counts.items()}
    write_thresholds(checkpoint, thresholds)
    return thresholds


def _decision_files(decision: Decision, method: str, folder: Path) -> dict[Path, bytes]:
    """plan.json and saliency.json: why each expert was kept, or into which group it went."""
    why: dict[str, Any] = {"method": method}
    if decision.saliency is not None:
        why["layers"] = {str(layer): [float(v) for v in values] for layer, values in decision.saliency.items()}
    if decision.groups is not None:
        why["groups"] = {str(layer): list(labels) for layer, labels in decision.groups.items()}
    return {
        folder / "plan.json": json.dumps(decision.plan.to_json()).encode(),
        folder / "saliency.json": json.dumps(why).encode(),
    }


def _plan_of(cell: Cell, record: Record, folder: Path, root: Path) -> CompressionPlan:
    """The plan of a finished cell, decided once more where its folder is gone. Raises WinnowError if it is another."""
    if (folder / "plan.json").is_file():
        plan = CompressionPlan.load(folder / "plan.json")
    else:
        log.info("the plan of %s is not kept: deciding again", cell.id)
        plan = _decide(cell, Clock(), folder / "rounds", root)[0].plan
    found = plan_summary(plan, cell.shape.width, {})
    if any({**record.plan.get(layer, {}), **of_layer} != record.plan.get(layer) for layer, of_layer in found.items()):
        raise WinnowError(f"{cell.id}: the plan found is not the recorded one; delete the record to run the cell again")
    return plan


# --- records ----------------------------------------------------------------------------------------------------------


def _baseline(cell: Cell, root: Path, tracker: Tracker | None) -> Record:
    """The uncompressed model's record: computed once for a model, suite and backend, by whoever comes first."""
    store = RecordStore(root, "baseline")
    with store.claim(cell.baseline["id"]) as ours:
        if not ours:
            record = store.read(cell.baseline["id"])
            if cell.is_baseline:
                log.info("the uncompressed model is evaluated: skipped (%s)", made_from(record))
            return record
        say_what_changed(cell.baseline, cell.identity[1], store)
        log.info("evaluating the uncompressed model once for all cells")
        clock = Clock()
        evaluation = evaluate(cell.config, cell.model, clock)
        stored = checkpoint_sizes(cell.model)
        record = replace(
            _record(cell, cell.baseline, clock, evaluation),
            sizes=size_summary(stored, stored, "plain", expandable=True),
            method_version="",
            fingerprints={name: told for name, told in cell.contents.items() if name not in OF_CELL_ALONE},
        )
        store.write(record, evaluation.samples)
        if tracker is not None:
            tracker.log_cell(record, evaluation.samples, root)
    return record


def _record(cell: Cell, description: dict[str, Any], clock: Clock, evaluation: Evaluation) -> Record:
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
        method_version=cell.method.version,
        task_versions=cell.task_versions,
    )
