"""REAM's decisions from made-up statistics; what the pass measures of a model is compared with loops elsewhere."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from harness.contracts.plan import prune
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import ExpertWeights
from harness.errors import WinnowError
from methods.chain import Chain
from methods.grouping import renumber
from methods.prune_experts import ExpertPruning
from methods.ream import REAM, join
from methods.schedule import Schedule
from tests.methods.conftest import Case, made_up_case, with_statistic

HALF = Fraction(1, 2)


def best_groups(distance: np.ndarray, ranked: list[int], count: int, size: int) -> list[int]:
    """Leaders, one pick after the other."""
    leader = {j: j for j in ranked[:count]}
    for centroid in ranked[:count]:
        for _ in range(size - 1):
            left = [j for j in range(len(distance)) if j not in leader]
            if left:
                leader[min(left, key=lambda j: distance[centroid, j])] = centroid
    return [leader[j] for j in range(len(distance))]


@pytest.mark.parametrize("size", [2, 3, 16])
def test_centroids_in_falling_saliency_take_their_nearest(case: Case, size: int):
    decision = REAM("ream", group_size=size).decide(case.statistics, HALF, 0)
    count = case.num_experts // 2
    for plan in decision.plan.layers:
        raw, layer = case.raw[plan.layer], plan.layer
        saliency = []
        for j in range(case.num_experts):
            norms = [g * np.linalg.norm(raw.outputs[t, j]) for t, g in raw.routed(j)]
            saliency.append(sum(norms) / len(norms) if norms else 0.0)
        np.testing.assert_allclose(decision.saliency[layer], saliency, rtol=1e-9)
        columns = raw.logits / np.linalg.norm(raw.logits, axis=0)
        units = raw.outputs / np.linalg.norm(raw.outputs, axis=2, keepdims=True)
        likeness = columns.T @ columns + np.einsum("tih,tjh->ij", units, units) / len(units)
        ranked = sorted(range(case.num_experts), key=lambda j: -saliency[j])
        leader = best_groups(-likeness, ranked, count, size)
        kept = sorted(ranked[:count])
        assert [kept[label] for label in decision.groups[layer]] == leader
        assert plan.route == tuple(kept.index(j) if j in kept else None for j in range(case.num_experts))
        for place, new in enumerate(plan.experts):
            members = [j for j in range(case.num_experts) if leader[j] == kept[place]]
            total = sum(saliency[j] for j in members)
            assert {s.expert: s.weight for s in new.sources} == pytest.approx(
                {j: saliency[j] / total for j in members}, rel=1e-9
            )
            assert new.is_whole == (len(members) == 1)


def orders(decision) -> dict[tuple[int, int], tuple[int, ...] | None]:
    return {
        (plan.layer, source.expert): source.permutation
        for plan in decision.plan.layers
        for new in plan.experts
        for source in new.sources
        if len(new.sources) > 1
    }


def direct_orders(case: Case, decision, merging: str) -> dict[tuple[int, int], tuple[int, ...] | None]:
    """By distances of unit vectors, one pair of channels after the other."""

    def unit(v: np.ndarray) -> np.ndarray:
        return v / np.linalg.norm(v)

    def vectors(layer: int, expert: int, channel: int) -> list[np.ndarray]:
        weights, look = case.statistics.expert_weights(layer, expert), case.statistics.look(layer)
        parts = np.concatenate([weights.gate[channel], weights.up[channel], weights.down[:, channel]]).astype(float)
        return [
            *([unit(look.channels[:, expert, channel])] if "logits" in merging else []),
            *([unit(parts)] if "weights" in merging else []),
        ]

    found: dict[tuple[int, int], tuple[int, ...] | None] = {}
    for plan in decision.plan.layers:
        kept = [row for row, new in enumerate(plan.route) if new is not None]
        for place, new in enumerate(plan.experts):
            for source in new.sources if len(new.sources) > 1 else ():
                width = len(case.statistics.expert_weights(plan.layer, 0).gate)
                if source.expert == kept[place]:
                    found[plan.layer, source.expert] = None
                    continue
                ours, others = ([vectors(plan.layer, j, c) for c in range(width)] for j in (kept[place], source.expert))
                cost = [
                    [sum(float(np.linalg.norm(x - y)) for x, y in zip(a, b, strict=True)) for b in others] for a in ours
                ]
                found[plan.layer, source.expert] = tuple(linear_sum_assignment(cost)[1].tolist())
    return found


@pytest.mark.parametrize("merging", ["logits+weights", "logits", "weights"])
def test_members_are_permuted_onto_their_centroid(case: Case, merging: str):
    decision = REAM("ream", merging=merging).decide(case.statistics, HALF, 0)
    assert orders(decision) == direct_orders(case, decision, merging)


def test_merging_can_leave_channels_alone_or_prune():
    statistics = made_up_case(1).statistics
    whole = REAM("ream").decide(statistics, HALF, 0)
    plain = REAM("ream", merging="avg").decide(statistics, HALF, 0)
    assert set(orders(plain).values()) == {None} != set(orders(whole).values())
    assert plain.groups == whole.groups
    bare = REAM("ream", group_size=1, merging="none").decide(statistics, HALF, 0)
    assert bare.groups is None
    for layer, plan in zip(whole.plan.layers, bare.plan.layers, strict=True):
        assert plan == prune(plan.layer, 12, [row for row, new in enumerate(layer.route) if new is not None])


def test_without_a_group_size_every_expert_joins_its_nearest_centroid():
    distance = np.array([[0, 3, 2, 1], [3, 0, 1, 2], [2, 1, 0, 5], [1, 2, 5, 0.0]])
    assert join(distance, [1, 0], 0) == [0, 1, 1, 0]
    assert join(distance, [1, 0], 4) == [1 - 1, 1, 1, 1]
    assert join(distance, [1, 0], 2) == [0, 1, 1, 0]
    assert join(np.zeros((4, 4)), [2, 1], 0) == [1, 1, 2, 1]
    assert join(np.zeros((4, 4)), [2, 1], 2) == [2, 1, 2, 1]


def test_the_released_rules_where_they_differ():
    case = made_up_case(1)
    statistics, layer = case.statistics, 2
    look, raw = statistics.look(layer), case.raw[layer]
    method = REAM("ream", "released", 3, merging="weights")
    decision = method.decide(statistics, HALF, 0)
    np.testing.assert_array_equal(decision.saliency[layer], look.document_saliency(2))
    columns = raw.logits / np.linalg.norm(raw.logits, axis=0)
    apart = np.linalg.norm(columns[:, :, None] - columns[:, None], axis=0)
    means = look.output_mean(True)
    units = means / np.linalg.norm(means, axis=1, keepdims=True)
    likeness = (1 - apart / apart.max()) + (units @ units.T + 1) / 2
    ranked = sorted(range(12), key=lambda j: -decision.saliency[layer][j])
    leader = best_groups(-likeness, ranked, 6, 3)
    assert decision.groups[layer] == [sorted(ranked[:6]).index(j) for j in leader]
    features = look.channel_features()
    for (of, expert), order in orders(decision).items():
        if of == layer and order is not None:
            cost = np.linalg.norm(features[leader[expert]][:, None] - features[expert][None], axis=2)
            assert order == tuple(linear_sum_assignment(cost)[1].tolist())
    plain = REAM("ream", "released", 3, gated_sim=False).decide(statistics, HALF, 0)
    np.testing.assert_array_equal(plain.saliency[layer], look.document_saliency(1))


def test_only_the_released_alignment_by_activations_hangs_on_the_seed():
    statistics = made_up_case(2).statistics
    for merging, hangs in (("logits+weights", True), ("weights", False), ("avg", False)):
        method = REAM("ream", "released", merging=merging)
        assert method.uses_seed is hangs
        plans = [method.decide(statistics, HALF, seed).plan for seed in (0, 1)]
        assert (plans[0] != plans[1]) is hangs
    assert not REAM("ream").uses_seed


def test_a_saliency_of_zero_counts_in_the_released_averages_alone():
    statistics = made_up_case(1).statistics
    values = statistics.get(2, "weighted_ean_sum").copy()
    values[3] = 0.0
    statistics = with_statistic(statistics, 2, "weighted_ean_sum", values)
    shares = {
        source.expert: source.weight
        for new in REAM("ream").decide(statistics, HALF, 0).plan.layers[1].experts
        for source in new.sources
    }
    assert shares[3] == 0.0
    look = statistics.look(2)
    nothing = replace(look, raw=replace(look.raw, outputs=look.raw.outputs * (np.arange(12) != 3)[:, None]))
    method = REAM("ream", "released", 12, merging="avg")
    (plan,) = method.decide(
        replace(statistics, layers={2: statistics.layers[2]}, look=lambda layer: nothing), HALF, 0
    ).plan.layers
    (group,) = [{s.expert: s.weight for s in new.sources} for new in plan.experts if len(new.sources) > 1]
    least = min(value for value in nothing.document_saliency(2) if value > 0)
    other = next(j for j in group if j != 3)
    assert group[3] / group[other] == pytest.approx(min(0.5, least) / nothing.document_saliency(2)[other])


def test_a_group_limited_router_keeps_as_many_rows_of_each_group():
    statistics = replace(made_up_case(1).statistics, n_group=3, top_k=3)
    for plan in REAM("ream").decide(statistics, HALF, 0).plan.layers:
        rows = [row for row, new in enumerate(plan.route) if new is not None]
        assert [sum(start <= row < start + 4 for row in rows) for start in (0, 4, 8)] == [2, 2, 2]


def test_what_does_not_fit_is_refused_in_one_line():
    shape = MoeShape(128, 8)
    assert REAM("ream", group_size=2).check(shape, 0.5) == HALF
    with pytest.raises(WinnowError, match="group_size=3 is too small: ratio 0.75 leaves 32 groups, which hold 96 of"):
        REAM("ream", group_size=3).check(shape, 0.75)
    with pytest.raises(WinnowError, match="use at least 4, or a lower ratio"):
        REAM("ream", group_size=3).check(shape, 0.75)
    assert REAM("ream", group_size=0).check(shape, "0.75") == Fraction(3, 4)
    assert REAM("ream", group_size=1, merging="none").check(shape, 0.75) == Fraction(3, 4)
    with pytest.raises(WinnowError, match="the router's 3 groups cannot share evenly"):
        REAM("ream").check(MoeShape(12, 3, 3), "1/3")
    for options, match in (
        ({"group_size": -1}, "group_size must be a whole number of at least 0"),
        ({"group_size": 2.5}, "group_size must be a whole number"),
        ({"variant": "other"}, "unknown variant 'other'; known: exact, released"),
        ({"merging": "logit"}, "unknown merging 'logit'"),
        ({"sequential": "yes"}, "sequential must be true or false, not yes"),
        ({"gated_sim": False}, "gated_sim=false changes nothing of variant=exact"),
    ):
        with pytest.raises(WinnowError, match=match):
            REAM("ream", **options)
    reap = ExpertPruning("reap", "reap")
    for stages in ((REAM("ream"), reap), (reap, REAM("ream"))):
        with pytest.raises(WinnowError, match="cannot decide layer by layer"):
            Chain("both", *stages)
    with pytest.raises(WinnowError, match="method 'ream' needs schedule=one_shot"):
        Schedule("iterative", 2).check(REAM("ream"), shape, HALF)


def test_numbers_that_are_not_finite_are_refused():
    statistics = made_up_case(1).statistics
    bad = statistics.get(2, "router_gram").copy()
    bad[0, 0] = np.nan
    with pytest.raises(WinnowError, match="'router_gram' of layer 2 is NaN or infinite"):
        REAM("ream").decide(with_statistic(statistics, 2, "router_gram", bad), HALF, 0)
    look = statistics.look(0)
    broken = replace(look, channels=np.full_like(look.channels, np.nan))
    weights = ExpertWeights(*(np.full(size, np.nan) for size in ((5, 6), (5, 6), (6, 5))))
    for wrong in (
        replace(statistics, look=lambda layer: broken),
        replace(statistics, expert_weights=lambda layer, expert: weights),
    ):
        with pytest.raises(WinnowError, match="channels cannot be aligned"):
            REAM("ream").decide(wrong, HALF, 0)


def test_labels_are_places_of_new_experts():
    decision = REAM("ream").decide(made_up_case(1).statistics, HALF, 0)
    for plan in decision.plan.layers:
        for place, new in enumerate(plan.experts):
            assert [j for j, label in enumerate(decision.groups[plan.layer]) if label == place] == [
                source.expert for source in new.sources
            ]
        assert len(set(renumber(decision.groups[plan.layer]))) == 6
