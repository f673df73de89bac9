"""HC-SMoE against naive agglomeration: each step recomputes all distances from the points."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.plan import validate
from harness.errors import WinnowError
from methods.grouping import LINKAGES, agglomerate, renumber
from methods.hc_smoe import HCSMoE
from tests.methods.conftest import Case, made_up_case, partition, relabelled, with_statistic

HALF = Fraction(1, 2)


def cluster_distance(points: np.ndarray, a: frozenset[int], b: frozenset[int], linkage: str) -> float:
    pairs = [math.dist(points[i], points[j]) for i in a for j in b]
    if linkage == "average":
        return math.fsum(pairs) / len(pairs)
    if linkage == "single":
        return min(pairs)
    if linkage == "complete":
        return max(pairs)
    # Ward: the growth of the sum of squares about the centre, on scipy's scale (distance of singletons).
    centres = [points[sorted(c)].mean(0) for c in (a, b)]
    return math.dist(*centres) * math.sqrt(2 * len(a) * len(b) / (len(a) + len(b)))


def naive_clusters(points: np.ndarray, groups: int, linkage: str, limit: int | None = None) -> set[frozenset[int]]:
    clusters = {frozenset([j]) for j in range(len(points))}
    while len(clusters) > groups:
        pairs = [p for p in itertools.combinations(clusters, 2) if limit is None or len(p[0] | p[1]) <= limit]
        a, b = min(pairs, key=lambda p: cluster_distance(points, *p, linkage))
        clusters = clusters - {a, b} | {a | b}
    return clusters


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("ratio", [Fraction(1, 4), HALF])
def test_groups_equal_naive_agglomeration_of_the_mean_outputs(case: Case, linkage: str, ratio: Fraction):
    decision = HCSMoE("hc_smoe", linkage=linkage).decide(case.statistics, ratio, seed=0)
    validate(decision.plan)
    count = case.num_experts - int(case.num_experts * ratio)
    for layer, raw in case.raw.items():
        points = np.array([[math.fsum(raw.outputs[:, j, h]) for h in range(raw.outputs.shape[2])]
                           for j in range(case.num_experts)]) / len(raw.outputs)  # fmt: skip
        assert partition(decision.groups[layer]) == naive_clusters(points, count, linkage)


@pytest.mark.parametrize("merge_weights", ["frequency", "uniform"])
def test_the_plan_averages_each_group_and_keeps_every_router_row(case: Case, merge_weights: str):
    decision = HCSMoE("hc_smoe", merge_weights=merge_weights).decide(case.statistics, HALF, seed=0)
    for plan in decision.plan.layers:
        raw, labels = case.raw[plan.layer], decision.groups[plan.layer]
        assert list(plan.route) == labels
        assert len(plan.experts) == case.num_experts - case.num_experts // 2
        smallest = [min(source.expert for source in expert.sources) for expert in plan.experts]
        assert smallest == sorted(smallest)
        for label, expert in enumerate(plan.experts):
            members = [j for j in range(case.num_experts) if labels[j] == label]
            assert [source.expert for source in expert.sources] == members
            assert expert.channels is None
            assert all(source.permutation is None for source in expert.sources)
            counts = [len(raw.routed(j)) if merge_weights == "frequency" else 1 for j in members]
            expected = [n / sum(counts) for n in counts]
            assert [source.weight for source in expert.sources] == pytest.approx(expected, rel=1e-12)


def test_a_group_that_was_never_routed_to_is_averaged_uniformly():
    case = made_up_case(3)
    labels = HCSMoE("h").decide(case.statistics, HALF, 0).groups[0]
    group = max(partition(labels), key=len)
    frequency = case.statistics.get(0, "frequency").copy()
    frequency[sorted(group)] = 0
    statistics = with_statistic(case.statistics, 0, "frequency", frequency)
    with pytest.warns(UserWarning, match=f"{len(group)} of 36 experts were never routed"):
        plan = HCSMoE("h").decide(statistics, HALF, 0).plan.layers[0]
    merged = plan.experts[labels[min(group)]]
    assert [source.weight for source in merged.sources] == [1 / len(group)] * len(group)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_points_that_coincide_still_give_exactly_the_number_of_groups(linkage: str):
    """A cut of the tree by height would give one cluster here: all distances tie."""
    for limit in (None, 3):
        labels = agglomerate(np.ones((9, 4)), 5, linkage, limit)
        assert sorted(set(labels)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("linkage", LINKAGES)
def test_a_limit_that_does_not_bind_changes_nothing(linkage: str):
    """Also checks the update of distances (Lance-Williams) of the limited clustering."""
    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(14, 3))
        for groups in range(1, 15):
            limited = agglomerate(points, groups, linkage, max_group_size=14)
            assert limited == agglomerate(points, groups, linkage)
            assert partition(limited) == naive_clusters(points, groups, linkage)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_pairs_at_most_are_the_closest_allowed_pairs(linkage: str):
    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(12, 3))
        for groups in (6, 8, 11):
            labels = agglomerate(points, groups, linkage, max_group_size=2)
            assert partition(labels) == naive_clusters(points, groups, linkage, limit=2)


def test_a_limit_that_greedy_merging_cannot_meet_is_met():
    """Three tight pairs, two groups of at most three: the loosest pair must be split."""
    points = np.array([[0.0], [0.1], [5.0], [5.3], [10.0], [10.2]])
    assert agglomerate(points, 2, "average", max_group_size=3) == [0, 0, 0, 1, 1, 1]


def test_every_feasible_limit_gives_the_exact_number_of_groups():
    for seed in range(3):
        for count in (7, 12, 16):
            points = np.random.default_rng(seed).normal(size=(count, 4))
            for groups in range(1, count + 1):
                for limit in range(-(-count // groups), count + 1):
                    sizes = np.bincount(agglomerate(points, groups, "average", limit))
                    assert len(sizes) == groups
                    assert sizes.max() <= limit
                    assert sizes.sum() == count


def test_a_limit_too_small_for_the_experts_is_refused():
    with pytest.raises(WinnowError, match="max_group_size=1 is too small: 6 groups of it hold 6 of 12.*at least 2"):
        HCSMoE("h", max_group_size=1).decide(made_up_case(3).statistics, HALF, 0)
    labels = HCSMoE("h", max_group_size=2).decide(made_up_case(3).statistics, HALF, 0).groups[0]
    assert np.bincount(labels).tolist() == [2] * 6


@pytest.mark.parametrize("linkage", LINKAGES)
def test_permuting_the_experts_permutes_the_plan(case: Case, linkage: str):
    rng = np.random.default_rng(12)
    order = {layer: rng.permutation(case.num_experts) for layer in case.raw}
    method = HCSMoE("h", linkage=linkage)
    before = method.decide(case.statistics, HALF, 0)
    after = method.decide(relabelled(case.statistics, order), HALF, 0)

    def shares(plan, names):
        return {frozenset((int(names[s.expert]), round(s.weight, 12)) for s in e.sources) for e in plan.experts}

    for old, new in zip(before.plan.layers, after.plan.layers, strict=True):
        assert shares(new, order[new.layer]) == shares(old, range(case.num_experts))


def test_labels_are_numbered_by_smallest_member():
    assert renumber([5, 2, 5, 9, 2]) == [0, 1, 0, 2, 1]


def test_bad_options_and_statistics_are_refused():
    with pytest.raises(WinnowError, match="unknown linkage 'centroid'; known: average"):
        HCSMoE("h", linkage="centroid")
    with pytest.raises(WinnowError, match="unknown merge_weights"):
        HCSMoE("h", merge_weights="usage")
    for size in (0, 1.5, True, "many"):
        with pytest.raises(WinnowError, match="max_group_size must be"):
            HCSMoE("h", max_group_size=size)
    values = made_up_case(3).statistics.get(2, "output_mean").copy()
    values[8, 1] = np.nan
    with pytest.raises(WinnowError, match=r"'output_mean' of layer 2 is NaN or infinite for expert\(s\) 8"):
        HCSMoE("h").decide(with_statistic(made_up_case(3).statistics, 2, "output_mean", values), HALF, 0)
    with pytest.raises(WinnowError, match="largest ratio that works is 0.75"):
        HCSMoE("h").decide(made_up_case(3).statistics, Fraction(5, 6), 0)
