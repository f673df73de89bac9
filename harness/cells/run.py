"""One cell, from its configuration to its record: calibrate, decide, apply, evaluate, write."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import get_method, instantiate
from omegaconf import DictConfig

from harness import progress
from harness.calibration.cache import Collected
from harness.calibration.calibrate import calibrate
from harness.calibration.collect import wanted_statistics
from harness.calibration.gate_ratios import gate_ratio_counts
from harness.calibration.tokens import TokenSequence, corpus_fingerprint, tokenize
from harness.cells.cell import Cell, prepare
from harness.cells.evaluate import Clock, Evaluation, evaluate
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader
from harness.checkpoints.footprint import checkpoint_sizes
from harness.checkpoints.load import load_model
from harness.checkpoints.quantize import quantize_checkpoint
from harness.checkpoints.skipping import Skip, Threshold, write_thresholds
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.record import Record, Sample
from harness.contracts.statistics import Statistics
from harness.data import contamination
from harness.data.corpora import Document, load_documents
from harness.errors import WinnowError
from harness.families.table import family_of
from harness.files import write_files
from harness.layers.diagnose import diagnose_cell
from harness.records.describe import expert_width, plan_summary, size_summary, versions
from harness.records.store import RecordStore

log = logging.getLogger(__name__)


def run_cell(config: DictConfig, in_sweep: bool = False, artifacts_in_output_dir: bool = False) -> Record:
    """Run one cell, or find its record; returns the record. Raises WinnowError."""
    with progress.showing(config.progress):
        return _run_cell(config, in_sweep, artifacts_in_output_dir)


def _run_cell(config: DictConfig, in_sweep: bool, artifacts_in_output_dir: bool) -> Record:
    cell = prepare(config)
    tracker = instantiate(config.tracking) if config.tracking else None
    root = Path(config.output_dir)
    baseline = _baseline(config, cell, root, tracker) if config.suite.tasks else None
    unchanged = cell.method.name == "none" and cell.quantization is None and cell.skip is None
    if unchanged and baseline is not None:
        _show(baseline, RecordStore(root, "baseline"), None, root)
        return baseline
    store = RecordStore(root)
    folder = root / "cells" / cell.id
    with store.claim(cell.id) as ours:
        if ours:
            folder = root if artifacts_in_output_dir else folder
            record, samples = _compute(config, cell, folder, root, in_sweep, baseline)
            store.write(record, samples)
            if not config.keep_checkpoint:
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            if tracker is not None:
                tracker.log_cell(record, samples, root, folder)
        else:
            log.info("cell %s is finished: skipped", cell.id)
            record = store.read(cell.id)
    if config.diagnostics.name != "none":
        corpus = config.calibration.corpus
        diagnose_cell(
            config,
            cell,
            lambda: _plan_of(config, cell, record, folder, root),
            lambda: _tokenized(config, cell, load_documents(corpus)),
            root,
        )
    _show(record, store, baseline, root)
    return record


def _plan_of(config: DictConfig, cell: Cell, record: Record, folder: Path, root: Path) -> Any:
    """The plan of a finished cell, decided once more where its folder is gone. Raises WinnowError if it is another."""
    if (folder / "plan.json").is_file():
        plan = get_method("harness.contracts.plan.CompressionPlan.load")(folder / "plan.json")
    else:
        log.info("the plan of %s is not kept: deciding again", cell.id)
        sequences, _ = _corpus(config, cell)
        plan = _decide(config, cell, sequences, Clock(), folder / "rounds", root, in_sweep=False)[0].plan
    found = plan_summary(plan, expert_width(cell.model), {})
    if any({**record.plan.get(layer, {}), **of_layer} != record.plan.get(layer) for layer, of_layer in found.items()):
        raise WinnowError(f"{cell.id}: the plan found is not the recorded one; delete the record to run the cell again")
    return plan


def _compute(
    config: DictConfig, cell: Cell, folder: Path, root: Path, in_sweep: bool, baseline: Record | None
) -> tuple[Record, list[Sample]]:
    clock = Clock()
    with clock.stage("calibration"):
        sequences, contained = _corpus(config, cell)
    decision, collected = _decide(config, cell, sequences, clock, folder / "rounds", root, in_sweep)
    fingerprints = {"model": cell.fingerprint}
    if sequences:
        fingerprints["corpus"] = corpus_fingerprint(sequences)
    write_files(_decision_files(decision, cell.method.name, folder))
    with clock.stage("apply"):
        applied = apply_plan(
            cell.model, decision.plan, folder / "checkpoint", config.layout, config.progress, cell.lower_top_k
        )
    thresholds: dict[int, Threshold] = {}
    if cell.skip is not None:
        with clock.stage("skip"):
            thresholds = _skip_experts(config, cell.skip, sequences, folder / "checkpoint")
    if cell.quantization is not None:
        with clock.stage("quantize"):
            applied |= quantize_checkpoint(
                folder / "checkpoint", folder / "checkpoint", cell.quantization, progress=config.progress
            )
    written = None if baseline is None else RecordStore(root, "baseline").read_samples(baseline.cell["id"])
    evaluation = evaluate(cell.config, folder / "checkpoint", clock, written or [], cell.model)
    before = {key.removesuffix("_before"): value for key, value in applied.items() if key.endswith("_before")}
    whole = all(new is not None for layer in decision.plan.layers for new in layer.route)
    sizes = size_summary(applied, before, applied["layout"], expandable=whole and cell.quantization is None)
    plan = plan_summary(decision.plan, expert_width(cell.model), thresholds)
    record = _record(cell, clock, evaluation, sizes, fingerprints, plan, collected, contained)
    return record, evaluation.samples


def _corpus(config: DictConfig, cell: Cell) -> tuple[list[TokenSequence], dict[str, dict[str, int]]]:
    """The calibration corpus, and what of the suite's items is in it; nothing where nothing is measured on it."""
    if not cell.method.requires and cell.skip is None:
        return [], {}
    settings = config.calibration
    documents = load_documents(settings.corpus)
    tasks = [instantiate(node, _convert_="all") for node in cell.config["suite"]["tasks"].values()]
    contained = contamination.check(settings.name, (document.text for document in documents), tasks)
    return _tokenized(config, cell, documents), contained


def _tokenized(config: DictConfig, cell: Cell, documents: list[Document]) -> list[TokenSequence]:
    settings = config.calibration
    return tokenize(
        documents,
        load_tokenizer(cell.model),
        settings.max_length,
        settings.packing,
        settings.chat_template,
        settings.max_blocks,
    )


def _decide(
    config: DictConfig,
    cell: Cell,
    sequences: list[TokenSequence],
    clock: Clock,
    so_far: Path,
    root: Path,
    in_sweep: bool,
) -> tuple[Any, Collected | None]:
    """The decision of all rounds together, and what the pass over the intact model collected.

    ``so_far`` holds what the rounds before have left while a round looks at it.
    """
    settings = config.calibration.statistics
    wish = settings if settings != "auto" else ("all" if in_sweep else "needed")
    decision, intact, model, fingerprint = None, None, cell.model, cell.fingerprint
    try:
        for number, ratio in enumerate(cell.rounds, start=1):
            if decision is not None:
                log.info("round %d of %d: calibrating what the rounds before have left", number, len(cell.rounds))
                with clock.stage("apply"):
                    apply_plan(cell.model, decision.plan, so_far, "compact", config.progress, cell.lower_top_k)
                # Not that of the folder's files: of large ones it is a sample, the same for many plans.
                plan = hashlib.sha256(json.dumps(decision.plan.to_json()).encode()).hexdigest()
                model, fingerprint, wish = so_far, f"{cell.fingerprint} plan:{plan}", "needed"
            with clock.stage("calibration"):
                statistics, collected = _statistics(config, cell, sequences, model, fingerprint, wish, root)
            intact = intact or collected
            with clock.stage("plan"):
                limited = replace(statistics, top_k=cell.top_k)
                decision = cell.schedule.joined(decision, cell.method.decide(limited, ratio, config.seed))
    finally:
        shutil.rmtree(so_far, ignore_errors=True)
    return decision, intact


def _statistics(
    config: DictConfig,
    cell: Cell,
    sequences: list[TokenSequence],
    model: Path,
    fingerprint: str,
    wish: Any,
    root: Path,
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
    settings = config.calibration
    return calibrate(
        model,
        lambda: load_model(model, config.model.dtype, config.model.device),
        sequences,
        wanted_statistics(wish if isinstance(wish, str) else list(wish), cell.method.requires),
        root / "calibration",
        batch_size=settings.batch_size,
        dtype=config.model.dtype,
        corpus=settings.name,
        progress=config.progress,
        fingerprint=fingerprint,
    )


def _skip_experts(
    config: DictConfig, skip: Skip, sequences: list[TokenSequence], checkpoint: Path
) -> dict[int, Threshold]:
    """Set each layer's threshold by the gate values of the compressed model, in whose config.json it is written."""
    settings, family = config.calibration, family_of(read_config(checkpoint))
    model = load_model(checkpoint, config.model.dtype, config.model.device)
    counts = gate_ratio_counts(model, sequences, family, settings.batch_size, config.progress, settings.name)
    top_k = family.top_k(read_config(checkpoint))
    thresholds = {layer: skip.threshold(bins, top_k) for layer, bins in counts.items()}
    write_thresholds(checkpoint, thresholds)
    return thresholds


def _decision_files(decision: Any, method: str, folder: Path) -> dict[Path, bytes]:
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


def _baseline(config: DictConfig, cell: Cell, root: Path, tracker: Any) -> Record:
    """The uncompressed model's record: computed once for a model, suite and backend, by whoever comes first."""
    store = RecordStore(root, "baseline")
    with store.claim(cell.baseline["id"]) as ours:
        if not ours:
            return store.read(cell.baseline["id"])
        log.info("evaluating the uncompressed model once for all cells")
        clock = Clock()
        evaluation = evaluate(cell.config, cell.model, clock)
        stored = checkpoint_sizes(cell.model)
        sizes = size_summary(stored, stored, "plain", expandable=True)
        record = _record(
            replace(cell, description=cell.baseline), clock, evaluation, sizes, {"model": cell.fingerprint}
        )
        store.write(record, evaluation.samples)
        if tracker is not None:
            tracker.log_cell(record, evaluation.samples, root)
    return record


def _record(
    cell: Cell,
    clock: Clock,
    evaluation: Evaluation,
    sizes: dict[str, Any],
    fingerprints: dict[str, str],
    plan: dict[str, Any] | None = None,
    collected: Collected | None = None,
    contained: dict[str, dict[str, int]] | None = None,
) -> Record:
    return Record(
        cell=cell.description,
        config=cell.config,
        versions=versions(),
        fingerprints=fingerprints,
        scores=evaluation.scores,
        engine=evaluation.engine,
        broken=evaluation.broken,
        sizes=sizes,
        timings=clock.seconds,
        plan=plan or {},
        expert_usage={} if collected is None else collected.usage,
        contamination=contained or {},
    )


def _show(record: Record, store: RecordStore, baseline: Record | None, root: Path) -> None:
    """Print the cell's result table. The table is the reports' own, so both always show the same numbers."""
    others = RecordStore(root, "baseline")
    table = get_method("reports.tables.summary.cell_table")(
        record,
        baseline,
        store.read_samples(record.cell["id"]),
        None if baseline is None else others.read_samples(baseline.cell["id"]),
    )
    print(f"{table}\nrecord: {store.path(record.cell['id'])}", flush=True)
