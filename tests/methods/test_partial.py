"""Partial preservation against loops over experts and tokens."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.plan import validate
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import ExpertWeights, Statistics
from harness.errors import WinnowError
from methods.partial import IMPORTANCES, SIMILARITIES, Partial
from tests.methods.conftest import Case, RawLayer, made_up_case, relabelled, with_statistic

QUARTER, HALF = Fraction(1, 4), Fraction(1, 2)


def importance_of(name: str, raw: RawLayer, expert: int) -> float:
    routed = raw.routed(expert)
    if name == "frequency":
        return len(routed)
    if name == "soft_count":
        return math.fsum(math.exp(row[expert]) / math.fsum(map(math.exp, row)) for row in raw.logits)
    norms = [gate * math.sqrt(math.fsum(v * v for v in raw.outputs[t, expert])) for t, gate in routed]
    return math.fsum(norms) / len(norms)


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(map(math.prod, zip(a, b, strict=True))) / math.sqrt(
        math.fsum(v * v for v in a) * math.fsum(v * v for v in b)
    )


def vector_of(name: str, statistics: Statistics, raw: RawLayer, layer: int, expert: int) -> list[float]:
    if name == "router_logits":
        return [float(row[expert]) for row in raw.logits]
    if name == "router_rows":
        return [float(v) for v in statistics.router_rows(layer)[expert]]
    weights = statistics.expert_weights(layer, expert)
    return [float(v) for matrix in (weights.gate, weights.up, weights.down) for v in matrix.ravel()]


def brute_force(
    statistics: Statistics, raw: RawLayer, layer: int, count: int, preserved: int, importance: str, similarity: str
) -> list[list[tuple[int, float]]]:
    """(expert, weight) of every new expert, in the order of the rows that stay."""
    worth = [importance_of(importance, raw, j) for j in range(statistics.num_experts)]
    ranked = sorted(range(len(worth)), key=lambda j: (-worth[j], j))
    whole, bases, rest = ranked[:preserved], ranked[preserved:count], ranked[count:]
    vectors = [vector_of(similarity, statistics, raw, layer, j) for j in range(len(worth))]
    groups = {j: [j] for j in whole + bases}
    for j in sorted(rest):
        groups[max(sorted(bases), key=lambda b: cosine(vectors[j], vectors[b]))].append(j)
    found = []
    for leader in sorted(groups):
        total = math.fsum(worth[j] for j in groups[leader])
        found.append([(j, worth[j] / total) for j in sorted(groups[leader])])
    return found


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_plan_equals_the_brute_force(case: Case, importance: str, similarity: str) -> None:
    for ratio, preserved in ((QUARTER, "0.5"), (HALF, "0.5"), (HALF, "0"), (HALF, "1"), (HALF, "1/3")):
        method = Partial("partial", preserved, importance, similarity)
        decision = method.decide(case.statistics, ratio, seed=0)
        validate(decision.plan)
        count = case.num_experts - int(case.num_experts * ratio)
        whole = min(int(count * Fraction(preserved)), count - 1)
        for plan in decision.plan.layers:
            raw = case.raw[plan.layer]
            wanted = brute_force(case.statistics, raw, plan.layer, count, whole, importance, similarity)
            found = [[(s.expert, pytest.approx(s.weight, rel=1e-9)) for s in new.sources] for new in plan.experts]
            assert wanted == found
            assert all(s.permutation is None for new in plan.experts for s in new.sources)
            rows = [row for row, new in enumerate(plan.route) if new is not None]
            assert len(rows) == count and plan.is_pruning
            assert all(any(s.expert == row for s in plan.experts[plan.route[row]].sources) for row in rows)
            labels = decision.groups[plan.layer]
            assert all(j in [s.expert for s in plan.experts[label].sources] for j, label in enumerate(labels))
            assert sum(len(new.sources) == 1 for new in plan.experts) >= whole


def test_permuting_the_experts_permutes_the_groups() -> None:
    case = made_up_case(4)
    order = {layer: np.random.default_rng(1).permutation(case.num_experts) for layer in case.raw}
    before = Partial("partial").decide(case.statistics, HALF, 0)
    after = Partial("partial").decide(relabelled(case.statistics, order), HALF, 0)
    for one, other in zip(before.plan.layers, after.plan.layers, strict=True):
        names = order[one.layer]
        groups = {frozenset(s.expert for s in new.sources) for new in one.experts}
        assert groups == {frozenset(int(names[s.expert]) for s in new.sources) for new in other.experts}


def test_a_group_limited_router_keeps_equally_many_rows_side_by_side_in_each_group() -> None:
    statistics = replace(made_up_case(8).statistics, n_group=4)
    for layer in Partial("partial").decide(statistics, Fraction(1, 3), 0).plan.layers:
        rows = [row for row, new in enumerate(layer.route) if new is not None]
        assert [row // 3 for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [layer.route[row] for row in rows] == list(range(8))
    with pytest.raises(WinnowError, match="nearest ratios"):
        Partial("partial").check(MoeShape(12, 3, 4), HALF)


def test_never_routed_experts_add_nothing_and_zeros_are_alike_to_nothing() -> None:
    statistics = made_up_case(5).statistics
    for name in ("frequency", "weighted_ean_sum"):
        values = statistics.get(2, name).copy()
        values[[1, 7]] = 0
        statistics = with_statistic(statistics, 2, name, values)

    def weights(layer: int, expert: int) -> ExpertWeights:
        found = made_up_case(5).statistics.expert_weights(layer, expert)
        return ExpertWeights(found.gate * 0, found.up * 0, found.down * 0) if expert == 1 else found

    statistics = replace(statistics, expert_weights=weights)
    with pytest.warns(UserWarning, match="2 of 36 experts were never routed to .* add nothing to their group's"):
        plan = Partial("partial", similarity="weights").decide(statistics, HALF, 0).plan
    shares = {s.expert: s.weight for new in plan.layers[1].experts for s in new.sources}
    assert shares[1] == shares[7] == 0.0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(WinnowError, match="unknown importance 'ean'; known: reap, frequency, soft_count"):
        Partial("partial", importance="ean")
    with pytest.raises(WinnowError, match="unknown similarity 'outputs'; known: router_logits"):
        Partial("partial", similarity="outputs")
    with pytest.raises(WinnowError, match=r"preserved 1.5 is outside \[0, 1\]"):
        Partial("partial", preserved=1.5)
    with pytest.raises(WinnowError, match="preserved 'half' is no number"):
        Partial("partial", preserved="half")
    statistics = made_up_case(5).statistics

    def broken(layer: int, expert: int) -> ExpertWeights:
        found = statistics.expert_weights(layer, expert)
        return replace(found, up=found.up * np.nan) if (layer, expert) == (2, 7) else found

    with pytest.raises(WinnowError, match="similarity by weights of layer 2 is NaN or infinite for expert"):
        Partial("partial", similarity="weights").decide(replace(statistics, expert_weights=broken), HALF, 0)
    rows = np.full((12, 6), np.nan)
    with pytest.raises(WinnowError, match="router of layer 0 is NaN"):
        Partial("partial", similarity="router_rows").decide(
            replace(statistics, router_rows=lambda layer: rows), HALF, 0
        )
