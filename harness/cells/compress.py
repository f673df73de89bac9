"""The first half of a cell: calibrate, decide, apply, and what is done to the checkpoint besides.

``compress`` runs in a process of its own (``harness.apart``): where it has ended, nothing of the calibrating model is
left in the memory of a device when the compressed one is loaded.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.calibration.calibrate import calibrate, calibrate_shard
from harness.calibration.collected import Collected
from harness.calibration.gate_ratios import gate_ratio_counts
from harness.calibration.streamed import Model, StreamedModel, open_for_pass
from harness.cells.cell import Cell
from harness.cells.evaluate import Clock
from harness.cells.held_out import HeldOut
from harness.cells.search import check_whole, with_budget
from harness.cells.second_pass import looked_again
from harness.checkpoints.active import choose_fewer
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader, router_rows_reader
from harness.checkpoints.quantize import quantize_checkpoint
from harness.checkpoints.skipping import Threshold, write_thresholds
from harness.contracts.layerwise import LayerwiseMethod, layerwise
from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan
from harness.contracts.plan_files import plan_files, plan_fingerprint
from harness.contracts.statistics import Statistics
from harness.devices import alone_on
from harness.families.table import family_of
from harness.files import write_files
from harness.layerwise.run import decide_by_layer
from harness.refit.recalibrate import recalibrate
from harness.refit.run import refit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compressed:
    """``applied``: sizes, as ``apply_plan`` tells them; ``usage``: of the experts by the calibration text;
    ``recovery`` as in a record."""

    decision: Decision
    usage: dict[str, dict[str, list[int]]]
    applied: dict[str, Any]
    thresholds: dict[int, Threshold]
    seconds: dict[str, float]
    recovery: dict[str, Any] = field(default_factory=dict)


def compress(cell: Cell, folder: Path, checkpoint: Path, root: Path, held_out: HeldOut) -> Compressed:
    """Leaves plan and saliency of the cell in ``folder``, its ``checkpoint``; statistics are shared in ``root``.

    Raises WinnowError for what does not fit together or does not fit on the disk.
    """
    clock = Clock()
    decision, collected = decide(cell, folder / "rounds", root, clock)
    write_files(_decision_files(decision, cell.method.name, folder))
    recovery: dict[str, Any] = {}
    if cell.recovers:
        plan, recovery = recovered(cell, decision.plan, folder / "bare", root, held_out, clock)
        decision = replace(decision, plan=plan)
        write_files(_decision_files(decision, cell.method.name, folder))
    with clock.stage("apply"):
        applied = apply_plan(cell.model, decision.plan, checkpoint, cell.config["layout"], lower_top_k=cell.lower_top_k)
        if cell.active is not None:
            choose_fewer(checkpoint, cell.active)
    thresholds: dict[int, Threshold] = {}
    if cell.skip is not None:
        with clock.stage("skip"):
            thresholds = _skip_experts(cell, checkpoint, root)
    if cell.quantization is not None:
        with clock.stage("quantize"):
            applied |= quantize_checkpoint(checkpoint, checkpoint, cell.quantization)
    usage = {} if collected is None else collected.usage
    return Compressed(decision, usage, applied, thresholds, clock.seconds, recovery)


def decide(cell: Cell, so_far: Path, root: Path, clock: Clock) -> tuple[Decision, Collected | None]:
    """The decision of all rounds together, and what the pass over the intact model collected.

    ``so_far`` holds what the rounds before have left while a round looks at it.
    """
    check_whole(cell, how_to_open(cell.config))
    try:
        with alone_on(cell.config["model"]["device"]):
            return _rounds(cell, so_far, root, clock)
    finally:
        shutil.rmtree(so_far, ignore_errors=True)


def calibrate_intact(cell: Cell, root: Path) -> None:
    """Leaves the statistics of the intact model in ``root``."""
    with alone_on(cell.config["model"]["device"]):
        _statistics(cell, cell.model, cell.contents["model"], cell.statistics, root)


def calibrate_part(cell: Cell, root: Path) -> Path | None:
    """The file of ``calibration.shard``; None where the corpus has too few batches to leave anything for it."""
    settings = cell.config["calibration"]
    with alone_on(cell.config["model"]["device"]):
        return calibrate_shard(
            cell.model,
            _opener(cell, cell.model, root),
            cell.sequences,
            cell.statistics,
            root / "calibration",
            settings["shard"],
            settings["shards"],
            fingerprint=cell.contents["model"],
            **_of_pass(cell),
        )


def plan_again(cell: Cell, so_far: Path, root: Path) -> CompressionPlan:
    """The plan of a cell that did not keep it."""
    plan = decide(cell, so_far, root, Clock())[0].plan
    return recovered(cell, plan, so_far, root, HeldOut([], ""), Clock())[0] if cell.recovers else plan


def recovered(
    cell: Cell, plan: CompressionPlan, scratch: Path, root: Path, held_out: HeldOut, clock: Clock
) -> tuple[CompressionPlan, dict[str, Any]]:
    """The plan refitted, and with recalibrated routers, as the cell asks for; and what a record says of it.

    The model is read one layer at a time, and beside it what the plan leaves, which lies in ``scratch`` meanwhile.
    """
    told: dict[str, Any] = {"heldout": held_out.origin}
    settings, opened = cell.config["calibration"], how_to_open(cell.config) | {"stream": "always"}
    with alone_on(cell.config["model"]["device"]):
        if cell.fits:
            with clock.stage("refit"):
                intact = open_for_pass(cell.model, state=root / "calibration" / "passes", **opened)
                assert isinstance(intact, StreamedModel)
                text = cell.sequences, held_out.sequences
                fitted = refit(intact, plan, cell.fits, *text, settings["batch_size"], settings["all_tokens"])
            plan, told["refit"] = fitted.plan, fitted.told
        if cell.router is not None:
            with clock.stage("router"):
                try:
                    apply_plan(cell.model, plan, scratch, lower_top_k=cell.lower_top_k)
                    both = [open_for_pass(folder, **opened) for folder in (cell.model, scratch)]
                    assert isinstance(both[0], StreamedModel) and isinstance(both[1], StreamedModel)
                    fitted = recalibrate(
                        both[0], both[1], plan, cell.router, cell.sequences, held_out.sequences, settings["batch_size"]
                    )
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
            plan, told["router"] = fitted.plan, fitted.told
    return plan, told


def _rounds(cell: Cell, so_far: Path, root: Path, clock: Clock) -> tuple[Decision, Collected | None]:
    if (asking := layerwise(cell.method)) is not None:
        return _by_layer(cell, asking, root, clock)
    decision: Decision | None = None
    intact, model, fingerprint, wanted = None, cell.model, cell.contents["model"], cell.statistics
    for number, ratio in enumerate(cell.rounds, start=1):
        if decision is not None:
            log.info("round %d of %d: calibrating what the rounds before have left", number, len(cell.rounds))
            with clock.stage("apply"):
                apply_plan(cell.model, decision.plan, so_far, lower_top_k=cell.lower_top_k)
            # The plan tells what the rounds have left, without a hash of all files.
            plan = plan_fingerprint(decision.plan)
            model, fingerprint, wanted = so_far, f"{cell.contents['model']} plan:{plan}", cell.method.requires
        with clock.stage("calibration"):
            statistics, collected = _statistics(cell, model, fingerprint, wanted, root)
        intact = intact or collected
        limited = replace(statistics, top_k=cell.shape.top_k)
        method, search = with_budget(cell, limited, ratio, _opener(cell, model, root), root, clock)
        with clock.stage("plan"):
            found = replace(method.decide(limited, ratio, cell.config["seed"]), search=search)
        by_layer = partial(open_for_pass, model, **how_to_open(cell.config) | {"stream": "always"})
        found = looked_again(cell, method, limited, found, by_layer, fingerprint, root, clock)
        decision = cell.schedule.joined(decision, found)
    assert decision is not None  # a schedule has at least one round
    return decision, intact


def _by_layer(cell: Cell, method: LayerwiseMethod, root: Path, clock: Clock) -> tuple[Decision, Collected]:
    settings = cell.config["calibration"]
    opened = how_to_open(cell.config) | {"stream": "always"}
    with clock.stage("calibration"):
        model = open_for_pass(cell.model, state=root / "calibration" / "passes", **opened)
        assert isinstance(model, StreamedModel)
        return decide_by_layer(
            model,
            method,
            cell.rounds[0],
            cell.config["seed"],
            cell.sequences,
            replace(_without_pass(cell.model), top_k=cell.shape.top_k),
            settings["batch_size"],
            settings["all_tokens"],
            cell.lower_top_k,
            settings["name"],
        )


def _statistics(
    cell: Cell, model: Path, fingerprint: str, wanted: frozenset[str], root: Path
) -> tuple[Statistics, Collected | None]:
    """The statistics of the checkpoint ``model``, and how they came about."""
    if not cell.method.requires:
        return _without_pass(model), None
    return calibrate(
        model,
        _opener(cell, model, root),
        cell.sequences,
        wanted,
        root / "calibration",
        fingerprint=fingerprint,
        shards=cell.config["calibration"]["shards"] if model == cell.model else None,
        device=cell.config["model"]["device"],
        **_of_pass(cell),
    )


def _without_pass(model: Path) -> Statistics:
    """What is known of the checkpoint ``model`` without text."""
    model_config = read_config(model)
    family = family_of(model_config)
    return Statistics(
        num_experts=family.num_experts(model_config),
        top_k=family.top_k(model_config),
        tokens=0,
        layers={layer: {} for layer in family.moe_layers(model_config)},
        n_group=family.router_groups(model_config),
        expert_weights=expert_weights_reader(model, family),
        router_rows=router_rows_reader(model, family),
    )


def _of_pass(cell: Cell) -> dict[str, Any]:
    settings = cell.config["calibration"]
    return {"batch_size": settings["batch_size"], "dtype": cell.config["model"]["dtype"], "corpus": settings["name"]}


def _opener(cell: Cell, model: Path, root: Path) -> Callable[[], Model]:
    return lambda: open_for_pass(model, state=root / "calibration" / "passes", **how_to_open(cell.config))


def how_to_open(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a configuration has a model opened for a pass."""
    model, settings = config["model"], config["calibration"]
    named = {"dtype": model["dtype"], "device": model["device"]}
    return named | {"stream": settings["stream"], "memory_gib": settings["memory_gib"]}


def _skip_experts(cell: Cell, checkpoint: Path, root: Path) -> dict[int, Threshold]:
    """Set each layer's threshold by the gate values of the compressed model, in whose config.json it is written."""
    assert cell.skip is not None
    settings, config = cell.config["calibration"], read_config(checkpoint)
    family = family_of(config)
    with alone_on(cell.config["model"]["device"]):
        counts = gate_ratio_counts(
            _opener(cell, checkpoint, root)(), cell.sequences, family, settings["batch_size"], corpus=settings["name"]
        )
    thresholds = {layer: cell.skip.threshold(bins, family.top_k(config)) for layer, bins in counts.items()}
    write_thresholds(checkpoint, thresholds)
    return thresholds


def _decision_files(decision: Decision, method: str, folder: Path) -> dict[Path, bytes]:
    """plan.json and saliency.json: why each expert was kept, into which group it went, and what a search found."""
    why: dict[str, Any] = {"method": method}
    if decision.saliency is not None:
        why["layers"] = {str(layer): [float(v) for v in values] for layer, values in decision.saliency.items()}
        if decision.largest_goes:
            why["largest_goes"] = True
    if decision.groups is not None:
        why["groups"] = {str(layer): list(labels) for layer, labels in decision.groups.items()}
    if decision.all_tokens is not None:
        why["all_tokens"] = decision.all_tokens
    if decision.unexplained is not None:
        why["unexplained"] = {str(layer): shares for layer, shares in decision.unexplained.items()}
    if decision.search is not None:
        why |= decision.search.to_json()
    return {
        **plan_files(decision.plan, folder),
        folder / "saliency.json": json.dumps(why).encode(),
    }
