"""The numbers of a layer: what a plan did to it on calibration text, beside what theory says; and their scores."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from harness.contracts.intervals import bootstrap_mean
from harness.contracts.plan import LayerPlan, NewExpert
from harness.contracts.record import Score
from harness.contracts.statistics import ExpertWeights
from harness.errors import WinnowError
from harness.layers import theory
from harness.layers.theory import Align
from harness.layers.watch import Original, Outputs, Passed, rows_by_expert

TASK = "layers"
_ESTIMATED = ("measured_error", "predicted_error", "spread_ratio")
_COUNTED = ("singleton_share", "largest_group")
_OF_PAIRS = tuple(f"{kind}{name}" for kind in ("", "average_") for name in ("distance", "aligned_distance", "overlap"))


def output_numbers(
    plan: LayerPlan, before: Original, after: Passed, outputs: Outputs, folds: np.ndarray
) -> dict[str, Any]:
    """Of one layer: errors of the MoE output, spread of the experts, load and groups. ``folds`` (T,) are the tokens'.

    ``after`` and ``outputs`` are of the compressed layer on the same tokens. Raises WinnowError where it computes NaN
    or infinity.
    """
    passed, stored = before.passed, [index for index, new in enumerate(plan.experts) if new.sources]
    rows = {new: of_new for new, of_new in rows_by_expert(plan).items() if new in stored}
    chosen = after.indices if len(stored) == len(plan.experts) else after.indices[after.gates != 0]
    tokens = len(passed.gates)
    error = (passed.output.double() - after.output.double()).pow(2).sum(1).numpy()
    if not np.isfinite(error).all():
        raise WinnowError(f"diagnostics: layer {plan.layer} computes NaN or infinity: check the model's weights")
    energy = theory.by_fold(passed.output.double().pow(2).sum(1).numpy(), folds)

    def estimate(name: str, function: Callable[[np.ndarray], float]) -> None:
        value, left_out = theory.leave_one_out(function, folds)
        found[name], found["left_out"][name] = theory.estimated(value, left_out), left_out

    found: dict[str, Any] = {
        "error_square": float(error.mean()),
        "output_square": float(energy.sum()) / tokens,
        "spread_before": float(before.outputs.spread.mean()),
        "spread_after": float(outputs.spread.mean()),
        "explained_before": theory.explained(before.outputs.gram),
        "explained_after": theory.explained(outputs.gram),
        "load_entropy_before": theory.load_entropy(np.bincount(passed.indices.reshape(-1).numpy())),
        "load_entropy_after": theory.load_entropy(np.bincount(chosen.reshape(-1).numpy())),
        "singleton_share": float(np.mean([len(of_new) == 1 for of_new in rows.values()])),
        "largest_group": max(map(len, rows.values())),
        "rows": len(plan.route),
        "experts": len(stored),
        "kept": [row for row, new in enumerate(plan.route) if new in stored] if plan.is_pruning else None,
        "left_out": {},  # without one fold at a time, in the order of the folds
    }
    estimate("measured_error", theory.ratio_of(theory.by_fold(error, folds), energy))
    spreads = (theory.by_fold(one.spread, folds) for one in (outputs, before.outputs))
    estimate("spread_ratio", theory.ratio_of(*spreads))
    found["groups"] = _group_numbers(plan, before, float(energy.sum()) or 1.0)
    if _is_predictable(plan):
        lost = _lost_by_removal(plan, before, folds)
        estimate(
            "predicted_error",
            lambda use: (
                (float(use @ lost) + sum(sums.error(use) for sums in before.groups.values()))
                / (float(use @ energy) or 1.0)
            ),
        )
    return found


def _group_numbers(plan: LayerPlan, before: Original, energy: float) -> list[dict[str, Any]]:
    """Of each merged group; ``energy`` is the sum over tokens of the squared MoE output."""
    everything, rows, found = np.ones(theory.FOLDS), rows_by_expert(plan), []
    for new, sums in before.groups.items():
        covariance, gram = sums.moments(everything)
        found.append(
            {
                "rows": rows[new],
                "mass_square": float(sums.mass_square.sum()) / len(before.passed.gates),
                "policy_variability": theory.policy_variability(covariance),
                "functional_gap": theory.functional_gap(gram),
                "predicted_error": sums.error(everything) / energy,
            }
        )
    return found


def _is_predictable(plan: LayerPlan) -> bool:
    """The theory knows experts that are merged or removed, not channels that go, nor what is fitted or stands in."""
    rows = rows_by_expert(plan)
    return plan.router is None and all(
        new == NewExpert(new.sources) and set(rows[index]) <= {source.expert for source in new.sources}
        for index, new in enumerate(plan.experts)
    )


def _lost_by_removal(plan: LayerPlan, before: Original, folds: np.ndarray) -> np.ndarray:
    """(FOLDS,): ``pruning_error`` of the rows that are removed."""
    removed = [row for row, new in enumerate(plan.route) if new is None]
    gates = before.passed.dense_gates(len(plan.route))
    lost = theory.pruning_error(gates[:, removed], before.outputs.square_norms[:, removed])
    return theory.by_fold(lost, folds)


def weight_numbers(
    plan: LayerPlan, weights: Callable[[int], ExpertWeights], align: Align, count: int
) -> dict[str, Any]:
    """Weight distances and overlaps: of merged experts and the one that weighs most, and of ``count`` random pairs.

    ``pairs`` names the former: [new expert, old expert that weighs most, other old expert]. Empty where nothing is
    merged.
    """
    grouped, of_group = [], []
    for place, new in ((place, new) for place, new in enumerate(plan.experts) if new.sources):
        first = max(new.sources, key=lambda source: source.weight).expert
        others = [source.expert for source in new.sources if source.expert != first]
        grouped += [(first, other) for other in others]
        of_group += [place] * len(others)
    if not grouped:
        return {}
    read = lru_cache(maxsize=2)(weights)
    average = theory.random_pairs(len(plan.route), count)
    compared = {
        f"{kind}{name}": values
        for kind, chosen in (("", grouped), ("average_", average))
        for name, values in theory.compare_pairs(read, chosen, align).items()
    }
    return compared | {"pairs": [[group, *pair] for group, pair in zip(of_group, grouped, strict=True)]}


def scores(layer: int, numbers: Mapping[str, Any], tokens: int) -> list[Score]:
    """Probes with the layer as their ``part``; ``n`` is tokens, pairs of experts, or (of counts, which have no error)
    groups."""

    def score(name: str, value: float, n: int, low: float, high: float) -> Score:
        better = not name.endswith(("error", "distance"))
        return Score(TASK, name, value, n, low, high, str(layer), better, kind="probe")

    found = []
    for name in _ESTIMATED:
        if name in numbers:
            value, low, high = numbers[name]
            found.append(score(name, value, tokens, low, high))
    for name in _COUNTED:
        value = float(numbers[name])
        found.append(score(name, value, numbers["experts"], value, value))
    for name in _OF_PAIRS:
        if values := numbers.get(name):
            found.append(score(name, float(np.mean(values)), len(values), *bootstrap_mean(values)))
    return [each for each in found if math.isfinite(each.value)]
