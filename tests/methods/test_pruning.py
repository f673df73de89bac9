"""Every criterion against a loop over tokens, and what pruning does with a saliency."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.plan import validate
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import ExpertWeights, Statistics
from harness.errors import WinnowError
from methods import criteria
from methods.prune_experts import ExpertPruning
from tests.methods.conftest import Case, RawLayer, made_up_case, relabelled, with_statistic

QUARTER, HALF = Fraction(1, 4), Fraction(1, 2)


def softmax(logits: np.ndarray) -> list[float]:
    return [1 / sum(math.exp(other - own) for other in logits) for own in logits]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def brute_force_saliency(criterion: str, raw: RawLayer, expert: int) -> float:
    routed = raw.routed(expert)
    norm = [math.sqrt(math.fsum(v * v for v in raw.outputs[t, expert])) for t in range(len(raw.logits))]
    if criterion == "reap":
        return mean([gate * norm[t] for t, gate in routed])
    if criterion == "frequency":
        return len(routed)
    if criterion == "gate_sum":
        return math.fsum(gate for _, gate in routed)
    if criterion == "soft_count":
        return math.fsum(softmax(row)[expert] for row in raw.logits)
    if criterion == "importance_product":
        first = [t for t, gate in routed if gate == max(raw.gates[t])]
        return len(first) / len(raw.logits) * math.exp(mean([softmax(raw.logits[t])[expert] for t in first]))
    if criterion == "ean_sum":
        return math.fsum(norm[t] for t, _ in routed)
    if criterion == "ean_mean":
        return mean([norm[t] for t, _ in routed])
    if criterion == "ean":
        units = range(raw.outputs.shape[2])
        return math.fsum(math.sqrt(math.fsum(raw.outputs[t, expert, h] ** 2 for t, _ in routed)) for h in units)
    if criterion == "msan":
        return mean([math.fsum(v * v for v in raw.outputs[t, expert]) for t, _ in routed])
    if criterion == "vocabulary_coverage":
        return len({int(raw.ids[t]) for t, _ in routed}) / raw.vocabulary
    if criterion == "weighted_ean_sum":
        return math.fsum(gate * norm[t] for t, gate in routed)
    if criterion == "max_activation":
        return max([0.0] + [max(raw.outputs[t, expert]) for t, _ in routed])
    raise ValueError(criterion)


def kept_by(decision) -> dict[int, list[int]]:
    return {plan.layer: [expert.sources[0].expert for expert in plan.experts] for plan in decision.plan.layers}


def survivors(saliency: list[float], count: int) -> list[int]:
    """Drop the lowest, one by one, the later of two equals first."""
    left = list(range(len(saliency)))
    while len(left) > count:
        left.remove(min(left, key=lambda j: (saliency[j], -j)))
    return left


@pytest.mark.parametrize("criterion", criteria.FROM_STATISTICS)
def test_saliency_and_kept_experts_equal_the_brute_force(case: Case, criterion: str):
    for ratio in (QUARTER, HALF):
        decision = ExpertPruning(criterion, criterion).decide(case.statistics, ratio, seed=0)
        validate(decision.plan)
        for layer, raw in case.raw.items():
            expected = [brute_force_saliency(criterion, raw, j) for j in range(case.num_experts)]
            np.testing.assert_allclose(decision.saliency[layer], expected, rtol=1e-9)
            count = case.num_experts - int(case.num_experts * ratio)
            kept = kept_by(decision)[layer]
            assert kept == survivors(decision.saliency[layer].tolist(), count)
        assert all(plan.is_pruning for plan in decision.plan.layers)


def test_weight_norm_is_the_frobenius_norm_of_all_three_matrices(case: Case):
    decision = ExpertPruning("weight_norm", "weight_norm").decide(replace(case.statistics, tokens=0), HALF, seed=0)
    for layer in case.raw:
        for j in range(case.num_experts):
            w = case.statistics.expert_weights(layer, j)
            entries = [float(v) for m in (w.gate, w.up, w.down) for v in m.ravel()]
            assert decision.saliency[layer][j] == pytest.approx(math.sqrt(math.fsum(v * v for v in entries)), rel=1e-9)


def brute_force_of_weights(criterion: str, statistics: Statistics, layer: int, expert: int) -> float:
    weights = statistics.expert_weights(layer, expert)
    matrices = [m.astype(np.float64) for m in (weights.gate, weights.up, weights.down)]
    entries = [float(v) for m in matrices for v in m.ravel()]
    if criterion == "aimer":
        spread = math.sqrt(math.fsum(v * v for v in entries) / len(entries))
        return math.fsum(map(abs, entries)) / len(entries) / spread
    if criterion == "stable_rank":
        singular = [np.linalg.svd(m, compute_uv=False).tolist() for m in matrices]
        return mean([math.fsum(v * v for v in values) / max(values) ** 2 for values in singular])
    return math.sqrt(math.fsum(float(v) ** 2 for v in statistics.router_rows(layer)[expert]))


@pytest.mark.parametrize("criterion", ["aimer", "stable_rank", "router_norm"])
def test_criteria_of_weights_drop_the_largest_and_equal_the_brute_force(case: Case, criterion: str):
    bare = replace(case.statistics, tokens=0, layers={layer: {} for layer in case.raw})
    for ratio in (QUARTER, HALF):
        decision = ExpertPruning(criterion, criterion).decide(bare, ratio, seed=0)
        assert decision.largest_goes
        for layer in case.raw:
            expected = [brute_force_of_weights(criterion, bare, layer, j) for j in range(case.num_experts)]
            np.testing.assert_allclose(decision.saliency[layer], expected, rtol=1e-9)
            count = case.num_experts - int(case.num_experts * ratio)
            assert kept_by(decision)[layer] == survivors([-value for value in expected], count)


@pytest.mark.parametrize("criterion", ["aimer", "stable_rank", "router_norm"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_one_outstanding_expert_goes_first(criterion: str, scope: str):
    """A flat expert (all entries of one size, no preferred direction, a long router row) in layer 2 of three."""
    case = made_up_case(3)
    flat = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0][:5] if criterion == "stable_rank" else None
    ones = np.ones((5, 6)) if flat is None else flat

    def weights(layer: int, expert: int) -> ExpertWeights:
        return (
            ExpertWeights(ones, -ones, ones.T)
            if (layer, expert) == (2, 4)
            else case.statistics.expert_weights(layer, expert)
        )

    def rows(layer: int) -> np.ndarray:
        found = case.statistics.router_rows(layer).copy()
        found[4] *= 100 if layer == 2 else 1
        return found

    statistics = replace(case.statistics, expert_weights=weights, router_rows=rows)
    decision = ExpertPruning(criterion, criterion, scope).decide(statistics, Fraction(1, 12), seed=0)
    assert 4 not in kept_by(decision)[2]
    if criterion != "router_norm":
        assert decision.saliency[2][4] == pytest.approx(1.0 if criterion == "aimer" else 5.0)


def test_scaling_an_expert_changes_neither_aimer_nor_stable_rank_and_zeros_are_the_flattest():
    rng = np.random.default_rng(0)
    one = ExpertWeights(*(rng.normal(size=s).astype(np.float32) for s in ((5, 6), (5, 6), (6, 5))))
    twice = ExpertWeights(one.gate * 8, one.up * 8, one.down * 8)
    nothing = ExpertWeights(one.gate * 0, one.up * 0, one.down * 0)
    for function, largest in ((criteria.aimer, 1.0), (criteria.stable_rank, 5.0)):
        values = function([one, twice, nothing])
        assert values[0] == pytest.approx(values[1], rel=1e-12) and values[0] < values[2] == largest
    uneven = criteria.aimer([ExpertWeights(one.gate * 8, one.up, one.down)])
    assert abs(uneven[0] - criteria.aimer([one])[0]) > 1e-3


def test_ean_grows_with_the_root_of_the_tokens_and_msan_does_not():
    squares, count = np.random.default_rng(0).gamma(1.0, size=(4, 6)), np.array([3.0, 0.0, 5.0, 1.0])
    squares[1] = 0
    np.testing.assert_allclose(criteria.ean(squares * 4), 2 * criteria.ean(squares))
    np.testing.assert_allclose(criteria.msan(squares * 4, count * 4), criteria.msan(squares, count))
    assert criteria.ean(squares)[1] == criteria.msan(squares, count)[1] == 0


def test_random_depends_on_seed_and_layer_and_on_nothing_else(case: Case):
    method = ExpertPruning("random", "random")
    bare = replace(case.statistics, layers={layer: {} for layer in case.raw})
    first, again, other = (kept_by(method.decide(bare, HALF, seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    scores = method.decide(bare, HALF, 3).saliency
    assert len({tuple(values) for values in scores.values()}) == len(case.raw)
    drawn = [kept_by(method.decide(bare, HALF, seed))[0] for seed in range(400)]
    share = np.bincount(np.concatenate(drawn), minlength=case.num_experts) / 400
    assert np.all(abs(share - 0.5) < 0.12)  # 4.8 standard deviations
    with pytest.raises(WinnowError, match="seed -1"):
        method.decide(bare, HALF, -1)


@pytest.mark.parametrize("criterion", ["reap", "frequency", "ean_sum"])
@pytest.mark.parametrize("ratio", [Fraction(1, 5), HALF, Fraction(3, 4)])
def test_global_scope_removes_the_exact_total_and_keeps_top_k_everywhere(case: Case, criterion: str, ratio: Fraction):
    decision = ExpertPruning(criterion, criterion, scope="global").decide(case.statistics, ratio, seed=0)
    kept = kept_by(decision)
    removed = int(case.num_experts * ratio) * len(case.raw)
    left = {layer: list(range(case.num_experts)) for layer in case.raw}
    for _ in range(removed):
        choices = [
            (decision.saliency[layer][j], -layer, -j)
            for layer, experts in left.items()
            if len(experts) > case.statistics.top_k
            for j in experts
        ]
        _, layer, j = min(choices)
        left[-layer].remove(-j)
    assert kept == left


def test_global_scope_protects_a_layer_whose_saliencies_are_all_small():
    case = made_up_case(7)
    tiny = with_statistic(case.statistics, 2, "weighted_ean_sum", np.arange(1, 13) * 1e-9)
    kept = kept_by(ExpertPruning("reap", "weighted_ean_sum", scope="global").decide(tiny, HALF, seed=0))
    assert kept[2] == [9, 10, 11]
    assert sum(map(len, kept.values())) == 18


def test_a_group_limited_router_keeps_the_same_number_in_each_group():
    statistics = replace(made_up_case(8).statistics, n_group=4)
    saliency = [9, 8, 7, 1, 2, 3, 100, 200, 300, 0.1, 0.3, 0.2]
    statistics = with_statistic(statistics, 0, "gate_sum", saliency)
    method = ExpertPruning("gate_sum", "gate_sum")
    assert kept_by(method.decide(statistics, Fraction(1, 3), 0))[0] == [0, 1, 4, 5, 7, 8, 10, 11]
    assert kept_by(method.decide(statistics, Fraction(2, 3), 0))[0] == [0, 5, 8, 10]
    with pytest.raises(WinnowError, match="nearest ratios"):
        method.decide(statistics, HALF, 0)
    with pytest.raises(WinnowError, match="scope=layer"):
        replace(method, scope="global").decide(statistics, Fraction(1, 3), 0)


def test_equal_saliencies_keep_the_lower_index_then_the_lower_layer():
    statistics = made_up_case(9).statistics
    for layer in statistics.layers:
        statistics = with_statistic(statistics, layer, "gate_sum", np.ones(12))
    assert kept_by(ExpertPruning("g", "gate_sum").decide(statistics, HALF, 0)) == dict.fromkeys(
        (0, 2, 3), list(range(6))
    )
    everywhere = kept_by(ExpertPruning("g", "gate_sum", "global").decide(statistics, HALF, 0))
    assert everywhere == {0: list(range(12)), 2: [0, 1, 2], 3: [0, 1, 2]}


@pytest.mark.parametrize("criterion", [*criteria.FROM_STATISTICS, *criteria.FROM_WEIGHTS, "router_norm"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_permuting_the_experts_permutes_the_plan(case: Case, criterion: str, scope: str):
    rng = np.random.default_rng(11)
    order = {layer: rng.permutation(case.num_experts) for layer in case.raw}
    method = ExpertPruning(criterion, criterion, scope)
    before = method.decide(case.statistics, QUARTER, 0)
    after = method.decide(relabelled(case.statistics, order), QUARTER, 0)
    kept_before, kept_after = kept_by(before), kept_by(after)
    sign = -1 if before.largest_goes else 1
    before, after = (
        replace(one, saliency={layer: sign * values for layer, values in one.saliency.items()})
        for one in (before, after)
    )
    cuts = {layer: min(before.saliency[layer][kept]) for layer, kept in kept_before.items()}
    for layer, names in order.items():
        np.testing.assert_array_equal(after.saliency[layer], before.saliency[layer][names])
        # Counts can tie at the cut, where the order of the experts decides; above it, it must not.
        cut = min(cuts.values()) if scope == "global" else cuts[layer]
        above = {j for j in kept_before[layer] if before.saliency[layer][j] > cut}
        assert above <= {int(names[j]) for j in kept_after[layer]}
    values = [[v for layer in order for v in sorted(d.saliency[layer][kept_by(d)[layer]])] for d in (before, after)]
    assert values[0] == values[1] or scope == "global"
    assert sorted(values[0]) == sorted(values[1])


def without_tokens_for(case: Case, layer: int, experts: list[int]):
    statistics = case.statistics
    for name in ("frequency", "weighted_ean_sum", "ean_sum", "gate_sum", "output_square_sum", "token_ids"):
        values = statistics.get(layer, name).copy()
        values[experts] = 0
        statistics = with_statistic(statistics, layer, name, values)
    return statistics


@pytest.mark.parametrize(
    "criterion",
    ["reap", "frequency", "ean_mean", "ean_sum", "gate_sum", "weighted_ean_sum", "ean", "msan", "vocabulary_coverage"],
)
def test_never_routed_experts_go_first_with_one_warning(criterion: str):
    statistics = without_tokens_for(made_up_case(10), 2, [0, 5, 6])
    with pytest.warns(UserWarning, match="3 of 36 experts were never routed to") as caught:
        decision = ExpertPruning(criterion, criterion).decide(statistics, QUARTER, 0)
    assert len(caught) == 1
    assert decision.saliency[2][[0, 5, 6]].tolist() == [0, 0, 0]
    assert kept_by(decision)[2] == [1, 2, 3, 4, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_named(bad: float):
    values = made_up_case(10).statistics.get(3, "ean_sum").copy()
    values[4] = bad
    statistics = with_statistic(made_up_case(10).statistics, 3, "ean_sum", values)
    with pytest.raises(WinnowError, match=r"'ean_sum' of layer 3 is NaN or infinite for expert\(s\) 4"):
        ExpertPruning("ean_mean", "ean_mean").decide(statistics, HALF, 0)
    ExpertPruning("reap", "reap").decide(statistics, HALF, 0)  # does not read ean_sum


def test_weights_that_are_not_finite_are_named():
    case = made_up_case(10)

    def broken(layer, expert):
        weights = case.statistics.expert_weights(layer, expert)
        return replace(weights, up=weights.up * np.nan) if (layer, expert) == (2, 7) else weights

    with pytest.raises(WinnowError, match=r"'weight_norm' of layer 2 is NaN or infinite for expert\(s\) 7"):
        ExpertPruning("w", "weight_norm").decide(replace(case.statistics, expert_weights=broken), HALF, 0)


def test_a_statistic_of_the_wrong_length_is_refused():
    statistics = with_statistic(made_up_case(10).statistics, 0, "gate_sum", np.ones(11))
    with pytest.raises(WinnowError, match="layer 0 has shape"):
        ExpertPruning("g", "gate_sum").decide(statistics, HALF, 0)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(WinnowError, match="unknown criterion 'reep'; known: reap, frequency"):
        ExpertPruning("x", "reep")
    with pytest.raises(WinnowError, match="unknown scope 'model'; known: layer, global, list"):
        ExpertPruning("x", "reap", "model")


def test_what_the_router_cannot_run_with_is_refused_before_there_are_statistics():
    everywhere, by_layer = ExpertPruning("r", "reap", "global"), ExpertPruning("r", "reap")
    shape = MoeShape(8, 2, layers=2, width=16, fewest_rows=4)
    with pytest.raises(WinnowError, match="scope=global does not fit a group-limited router; use scope=layer"):
        everywhere.check(MoeShape(8, 2, 2), "1/4")
    with pytest.raises(WinnowError, match="may leave top-k = 2 .*, but the router needs 4; use scope=layer"):
        everywhere.check(shape, "1/4")
    with pytest.raises(WinnowError, match=r"leaves 2 of 8 experts, fewer than the 4 that .* is 0.5 "):
        by_layer.check(replace(shape, n_group=2), "3/4")
    assert (
        by_layer.check(replace(shape, n_group=2), "1/2") == by_layer.check(MoeShape(8, 2, 2), "1/2") == Fraction(1, 2)
    )
