"""One cell, from its configuration to its record: calibrate, decide, apply, evaluate, write."""

import json
import logging
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from harness import progress
from harness.backends.choice import choose
from harness.calibration import calibrate, wanted_statistics
from harness.calibration_cache import Collected, model_fingerprint
from harness.checkpoint import check_checkpoint, checkpoint_sizes, expert_weights_reader
from harness.corpora import corpus_fingerprint, load_documents, tokenize
from harness.errors import WinnowError
from harness.families import family_of, read_config
from harness.loading import load_model, load_tokenizer, resolve_checkpoint
from harness.records import Record, Sample, Score
from harness.rewrite import apply_plan
from harness.statistics import Statistics
from harness.store import RecordStore, cell_id, write_files

log = logging.getLogger(__name__)

PACKAGES = ("moe-winnow", "torch", "transformers", "safetensors", "tokenizers", "numpy", "scipy", "datasets")
# What of the calibration node cannot change a result: how the pass is run and what else it collects.
NOT_IDENTITY = ("statistics", "batch_size", "corpus")


@dataclass
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)


@dataclass(frozen=True)
class Evaluation:
    """What a suite gave, and what the backend tells of itself."""

    scores: list[Score] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A cell that is ready to run: nothing of it has been computed, but everything cheap has been checked."""

    config: dict[str, Any]
    description: dict[str, Any]
    baseline: dict[str, Any]
    model: Path
    fingerprint: str
    method: Any
    ratio: Any

    @property
    def id(self) -> str:
        return self.description["id"]


def prepare(config: DictConfig) -> Cell:
    """Resolve the configuration and check what can be checked without loading a weight.

    Settings that the method does not use (a seed where nothing is random, a corpus where no statistic is read) do not
    count: cells that differ only in them are one cell. Raises WinnowError for what does not fit.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise WinnowError(f"settings without a value: {', '.join(missing)}; give them as {missing[0]}=...")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    method = instantiate(config.method)
    folder = resolve_checkpoint(config.model.path)
    model_config = read_config(folder)
    family = family_of(model_config)
    check_checkpoint(folder, family, model_config)
    ratio = method.check(
        family.num_experts(model_config),
        family.top_k(model_config),
        family.router_groups(model_config),
        config.ratio,
    )
    fingerprint = model_fingerprint(folder)
    tasks = [instantiate(node, _convert_="all") for node in config.suite.tasks.values()]
    plain["backend"], why = choose(plain["backend"], model_config, tasks)
    if why:
        log.info("backend %s: %s", plain["backend"]["name"], why)
    calibration = plain["calibration"] if method.requires else {"name": "none"}
    description = {
        "model": config.model.name,
        "method": method.name,
        "ratio": float(ratio),
        "calibration": calibration["name"],
        "seed": config.seed if method.uses_seed else 0,
        "suite": config.suite.name,
        "backend": plain["backend"]["name"],
    }
    identity = {
        "model": {"fingerprint": fingerprint, "dtype": config.model.dtype},
        "method": plain["method"],
        "calibration": {key: value for key, value in calibration.items() if key not in NOT_IDENTITY},
        "suite": plain["suite"],
        "layout": config.layout,
    }
    if plain["backend"]["open"].get("engine"):
        identity["engine"] = plain["backend"]["open"]["engine"]
    description["id"] = cell_id(description, identity)
    baseline = description | {"method": "none", "ratio": 0.0, "calibration": "none", "seed": 0}
    baseline["id"] = cell_id(
        baseline | {"id": ""}, {key: identity[key] for key in ("model", "suite", "engine") if key in identity}
    )
    description["baseline"] = baseline["id"]
    return Cell(plain, description, baseline, folder, fingerprint, method, ratio)


def run_cell(config: DictConfig, in_sweep: bool = False, artifacts_in_output_dir: bool = False) -> Record:
    """Run one cell, or find its record; returns the record. Raises WinnowError."""
    cell = prepare(config)
    tracker = instantiate(config.tracking) if config.tracking else None
    root = Path(config.output_dir)
    baseline = _baseline(config, cell, root, tracker) if config.suite.tasks else None
    if cell.method.name == "none" and baseline is not None:
        _show(baseline, RecordStore(root, "baseline"), None, root)
        return baseline
    store = RecordStore(root)
    with store.claim(cell.id) as ours:
        if ours:
            folder = root if artifacts_in_output_dir else root / "cells" / cell.id
            record, samples = _compute(config, cell, folder, root, in_sweep)
            store.write(record, samples)
            if not config.keep_checkpoint:
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            if tracker is not None:
                tracker.log_cell(record, samples, root.name)
        else:
            log.info("cell %s is finished: skipped", cell.id)
            record = store.read(cell.id)
    _show(record, store, baseline, root)
    return record


def _compute(config: DictConfig, cell: Cell, folder: Path, root: Path, in_sweep: bool) -> tuple[Record, list[Sample]]:
    clock = Clock()
    with clock.stage("calibration"):
        statistics, collected, fingerprints = _statistics(config, cell, root, in_sweep)
    with clock.stage("plan"):
        decision = cell.method.decide(statistics, cell.ratio, config.seed)
    write_files(_decision_files(decision, cell.method.name, folder))
    with clock.stage("apply"):
        applied = apply_plan(cell.model, decision.plan, folder / "checkpoint", config.layout, progress=config.progress)
    evaluation = evaluate(cell.config, folder / "checkpoint", clock)
    before = {key.removesuffix("_before"): value for key, value in applied.items() if key.endswith("_before")}
    whole = all(new is not None for layer in decision.plan.layers for new in layer.route)
    sizes = _sizes(applied, before, applied["layout"], expandable=whole)
    return _record(cell, clock, evaluation, sizes, fingerprints, decision.plan, collected), evaluation.samples


def _statistics(
    config: DictConfig, cell: Cell, root: Path, in_sweep: bool
) -> tuple[Statistics, Collected | None, dict[str, str]]:
    """The statistics, how they came about, and the fingerprints of what they were computed from."""
    fingerprints = {"model": cell.fingerprint}
    if not cell.method.requires:
        model_config = read_config(cell.model)
        family = family_of(model_config)
        empty = Statistics(
            num_experts=family.num_experts(model_config),
            top_k=family.top_k(model_config),
            tokens=0,
            layers={layer: {} for layer in family.moe_layers(model_config)},
            n_group=family.router_groups(model_config),
            expert_weights=expert_weights_reader(cell.model, family),
        )
        return empty, None, fingerprints
    settings = config.calibration
    which = settings.statistics if settings.statistics != "auto" else ("all" if in_sweep else "needed")
    tokenizer = load_tokenizer(cell.model)
    documents = load_documents(settings.corpus)
    sequences = tokenize(
        documents,
        tokenizer,
        settings.max_length,
        settings.packing,
        settings.chat_template,
        settings.max_blocks,
    )
    statistics, collected = calibrate(
        cell.model,
        lambda: load_model(cell.model, config.model.dtype, config.model.device),
        sequences,
        wanted_statistics(which if isinstance(which, str) else list(which), cell.method.requires),
        root / "calibration",
        batch_size=settings.batch_size,
        dtype=config.model.dtype,
        corpus=settings.name,
        progress=config.progress,
    )
    return statistics, collected, fingerprints | {"corpus": corpus_fingerprint(sequences)}


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


def evaluate(config: dict[str, Any], checkpoint: Path, clock: Clock) -> Evaluation:
    """Every task of the suite on the model in ``checkpoint``; nothing is loaded for an empty suite."""
    done = Evaluation()
    if not config["suite"]["tasks"]:
        return done
    model = config["model"]
    with clock.stage("load"):
        backend = instantiate(
            config["backend"]["open"], folder=str(checkpoint), dtype=model["dtype"], device=model["device"]
        )
    with closing(backend), progress.showing(config["progress"]):
        for name, node in config["suite"]["tasks"].items():
            task = instantiate(node, _convert_="all")
            with clock.stage(f"task_{name}"):
                result = task.run_on(done.samples) if hasattr(task, "run_on") else task.run(backend)
            done.scores.extend(result.scores)
            done.samples.extend(result.samples)
        clock.seconds |= {what: round(seconds, 3) for what, seconds in backend.seconds.items()}
        done.engine.update(backend.facts)
    return done


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
        sizes = _sizes(stored, stored, "plain", expandable=True)
        record = _record(
            replace(cell, description=cell.baseline), clock, evaluation, sizes, {"model": cell.fingerprint}
        )
        store.write(record, evaluation.samples)
        if tracker is not None:
            tracker.log_cell(record, evaluation.samples, root.name)
    return record


def _record(
    cell: Cell,
    clock: Clock,
    evaluation: Evaluation,
    sizes: dict[str, Any],
    fingerprints: dict[str, str],
    plan: Any = None,
    collected: Collected | None = None,
) -> Record:
    return Record(
        cell=cell.description,
        config=cell.config,
        versions=_versions(),
        fingerprints=fingerprints,
        scores=evaluation.scores,
        engine=evaluation.engine,
        sizes=sizes,
        timings=clock.seconds,
        plan={} if plan is None else _plan_summary(plan),
        expert_usage={} if collected is None else collected.usage,
    )


def _plan_summary(plan: Any) -> dict[str, Any]:
    """Per layer: how many experts are stored, how many router rows stay, and the sizes of merged groups."""
    return {
        str(layer.layer): {
            "experts": len(layer.experts),
            "rows": sum(new is not None for new in layer.route),
            "group_sizes": sorted((len(e.sources) for e in layer.experts if len(e.sources) > 1), reverse=True),
        }
        for layer in plan.layers
    }


def _sizes(stored: dict[str, Any], before: dict[str, Any], layout: str, expandable: bool) -> dict[str, Any]:
    """Sizes of a checkpoint beside its uncompressed model's.

    ``expanded_weights_bytes``: what the same model takes with a copy of its expert in every router row, at the
    uncompressed width (None where removed rows forbid it, the stored size where nothing is shared).
    ``padding_bytes``: what padding every expert to the widest of its layer adds to what is on disk.
    """
    names = {"weights_bytes": "weight_bytes"} | {n: n for n in ("parameters", "expert_bytes", "expert_parameters")}
    expanded = stored if layout == "plain" else before if expandable else None
    return {
        "layout": layout,
        **{name: stored[key] for name, key in names.items()},
        "padding_bytes": stored["padding_bytes"],
        **{f"baseline_{name}": before[key] for name, key in names.items()},
        "expanded_weights_bytes": expanded and expanded["weight_bytes"],
        "expanded_parameters": expanded and expanded["parameters"],
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _show(record: Record, store: RecordStore, baseline: Record | None, root: Path) -> None:
    """Print the cell's result table. The table is the reports' own, so both always show the same numbers."""
    others = RecordStore(root, "baseline")
    table = get_method("reports.summary.cell_table")(
        record,
        baseline,
        store.read_samples(record.cell["id"]),
        None if baseline is None else others.read_samples(baseline.cell["id"]),
    )
    print(f"{table}\nrecord: {store.path(record.cell['id'])}", flush=True)
