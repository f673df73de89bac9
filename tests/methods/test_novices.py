"""Constants for pruned experts: MoNE's scores, and ``constants`` of any criterion, by plain loops in float64."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.plan import CompressionPlan, validate
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods.chain import Chain
from methods.coverage import Coverage
from methods.mone import SCORES, MoNE, variance
from methods.novices import constants
from methods.prune_experts import ExpertPruning
from methods.schedule import Schedule
from tests.brute_force import brute_force_statistics, expert_function, routed_documents, weights_of
from tests.methods.conftest import Case, made_up_case, with_statistic
from tests.tiny import FAMILY_NAMES, tiny_model

HALF = Fraction(1, 2)


def novices(plan: CompressionPlan) -> dict[int, list[int]]:
    return {
        one.layer: [j for j, new in enumerate(one.route) if one.experts[new].constant is not None]
        for one in plan.layers
    }


def around(rows: np.ndarray) -> np.ndarray:
    """Variance with n - 1; of one token 0."""
    return rows.var(axis=0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])


def two_passes(model, layer: int, seen) -> dict[str, list[float]]:
    """Every score, each from the tokens themselves: means first, then what is around them."""
    tokens = sum(len(document.hidden) for document in seen)
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    for j in range(seen[0].logits.shape[1]):
        function, weights = expert_function(model, layer, j), weights_of(model, layer, j)
        inputs, gates = [], []
        for document in seen:
            for x, chosen, shares in zip(document.hidden, document.indices, document.gates, strict=True):
                for expert, gate in zip(chosen, shares, strict=True):
                    if expert == j:
                        inputs.append(x)
                        gates.append(gate)
        x = np.array(inputs)
        f = np.array([function(each) for each in x])
        pre = x @ weights.gate.T.astype(float)
        h = pre / (1 + np.exp(-pre)) * (x @ weights.up.T.astype(float))
        r = sum(gates) / tokens
        found["fusion"].append(np.sqrt(sum(around(f))) * r)
        found["output_fluctuation"].append(np.sqrt(sum(around(f) ** 2)))
        found["routing_score"].append(r)
        found["io_fluctuation"].append(np.linalg.norm(((x - f) ** 2).mean(axis=0)))
        found["token_fluctuation"].append(np.linalg.norm(around(x)))
        columns = [weights.down[:, c].astype(float) @ weights.down[:, c] for c in range(h.shape[1])]
        found["intermediate_fluctuation"].append(np.linalg.norm(around(h) * columns))
    return found


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_scores_are_those_of_two_passes_over_the_tokens(family: str) -> None:
    model = tiny_model(family)
    documents = [np.random.default_rng(7).integers(0, 256, 90).tolist(), list(range(30))]
    statistics = brute_force_statistics(model, documents)
    for layer, seen in routed_documents(model, documents).items():
        want = two_passes(model, layer, seen)
        for name, (function, reads) in SCORES.items():
            bare = {layer: {key: statistics.get(layer, key) for key in (*reads, "frequency")}}
            np.testing.assert_allclose(function(replace(statistics, layers=bare), layer), want[name], rtol=1e-6)


def test_a_variance_survives_a_mean_far_from_zero() -> None:
    rows = np.random.default_rng(0).normal(size=(500, 4)) + 1e4
    found = variance(rows.sum(0)[None], (rows**2).sum(0)[None], np.array([500.0]))
    np.testing.assert_allclose(found[0], rows.var(axis=0, ddof=1), rtol=1e-5)
    assert (variance(np.ones((2, 1)), np.ones((2, 1)), np.array([0.0, 1.0])) == 0).all()


@pytest.mark.parametrize("weights", ["plain", "gate_squared"])
def test_constants_are_means_over_the_routed_tokens(case: Case, weights: str) -> None:
    for layer, raw in case.raw.items():
        found = constants(case.statistics, layer, weights)
        for j in range(case.num_experts):
            routed = raw.routed(j)
            shares = [1.0 if weights == "plain" else gate**2 for _, gate in routed]
            want = sum(w * raw.outputs[t, j] for w, (t, _) in zip(shares, routed, strict=True)) / sum(shares)
            np.testing.assert_allclose(found[j], want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", SCORES)
def test_the_lowest_scores_become_constants_and_every_row_stays(case: Case, score: str) -> None:
    decision = MoNE("mone", score).decide(case.statistics, HALF, seed=0)
    validate(decision.plan, case.num_experts)
    for one in decision.plan.layers:
        assert one.route == tuple(range(case.num_experts))
        scores = decision.saliency[one.layer]
        lowest = sorted(sorted(range(case.num_experts), key=lambda j: (scores[j], -j))[: case.num_experts // 2])
        assert novices(decision.plan)[one.layer] == lowest
        for j, new in enumerate(one.experts):
            if new.constant is not None:
                want = constants(case.statistics, one.layer, "plain")[j].astype(np.float32)
                np.testing.assert_array_equal(new.constant.values, want)
            else:
                assert new.is_whole and new.sources[0].expert == j


def test_all_layers_together_keep_the_exact_total_and_a_real_expert_each() -> None:
    statistics = made_up_case(1).statistics
    low = with_statistic(statistics, 0, "gate_sum", np.full(12, 1e-12))
    for ratio in (HALF, Fraction(1, 4), Fraction(5, 6)):
        gone = novices(MoNE("mone", scope="global").decide(low, ratio, seed=0).plan)
        assert sum(map(len, gone.values())) == int(12 * ratio) * 3
        assert len(gone[0]) <= 11
    assert len(gone[0]) == 11
    equal = statistics
    for layer in statistics.layers:
        equal = with_statistic(equal, layer, "gate_sum", np.ones(12))
    tied = novices(MoNE("mone", "routing_score", "global").decide(equal, HALF, seed=0).plan)
    assert tied == {0: [], 2: list(range(5, 12)), 3: list(range(1, 12))}


def test_an_expert_without_tokens_leaves_zeros_and_is_counted() -> None:
    statistics = made_up_case(1).statistics
    for name in ("frequency", "gate_sum", "output_sum", "output_square_sum"):
        values = statistics.get(2, name).copy()
        values[5] = 0
        statistics = with_statistic(statistics, 2, name, values)
    with pytest.warns(UserWarning, match="1 of 36 experts were never routed to .* they leave zeros"):
        plan = MoNE("mone", "routing_score").decide(statistics, Fraction(1, 12), seed=0).plan
    assert novices(plan)[2] == [5]
    assert not plan.layers[1].experts[5].constant.values.any()


def test_top_k_and_groups_set_no_bound() -> None:
    grouped = replace(made_up_case(1).statistics, n_group=4)
    for method in (MoNE("mone"), ExpertPruning("reap", "reap", constants=True)):
        plan = method.decide(grouped, Fraction(11, 12), seed=0).plan
        assert [len(gone) for gone in novices(plan).values()] == [11, 11, 11]
        with pytest.raises(WinnowError, match="outside"):
            method.check(grouped.shape, 1)
    both = ExpertPruning("reap", "reap", "global", constants=True).decide(grouped, HALF, seed=0).plan
    assert sum(map(len, novices(both).values())) == 18


@pytest.mark.parametrize("criterion", ["reap", "aimer", "random", "router_norm", "frequency"])
def test_constants_is_a_switch_of_every_criterion(case: Case, criterion: str) -> None:
    bare = ExpertPruning("m", criterion).decide(case.statistics, HALF, seed=1)
    for told, weights in ((True, "plain"), ("plain", "plain"), ("gate_squared", "gate_squared")):
        method = ExpertPruning("m", criterion, constants=told)
        found = method.decide(case.statistics, HALF, seed=1)
        for before, after in zip(bare.plan.layers, found.plan.layers, strict=True):
            kept = [new.sources[0].expert for new in before.experts]
            assert [j for j, new in enumerate(after.experts) if new.sources] == kept
            means = constants(case.statistics, after.layer, weights).astype(np.float32)
            assert all((means[j] == after.experts[j].constant.values).all() for j in novices(found.plan)[after.layer])
        for layer in bare.saliency:
            np.testing.assert_array_equal(bare.saliency[layer], found.saliency[layer])
    for off in (None, False):
        method = ExpertPruning("m", criterion, constants=off)
        assert method.decide(case.statistics, HALF, seed=1).plan == bare.plan
        assert method.requires == ExpertPruning("m", criterion).requires and method.leaves is None


def test_a_list_of_counts_goes_with_constants() -> None:
    statistics = made_up_case(1).statistics
    plan = ExpertPruning("reap", "reap", "list", [1, 12, 5], constants=True).decide(statistics, HALF, seed=0).plan
    assert [12 - len(gone) for gone in novices(plan).values()] == [1, 12, 5]


def test_what_does_not_go_with_constants_is_refused() -> None:
    with pytest.raises(WinnowError, match="unknown constants 'mean'; known: "):
        ExpertPruning("reap", "reap", constants="mean")
    with pytest.raises(WinnowError, match="allocation=evoesap searches a budget for experts that are deleted"):
        ExpertPruning("reap", "reap", "evoesap", search={}, constants=True)
    with pytest.raises(WinnowError, match="cannot leave constants for experts"):
        Chain("both", ExpertPruning("reap", "reap", constants=True), Coverage("coverage"))
    shape, method = made_up_case(1).statistics.shape, ExpertPruning("reap", "reap", constants=True)
    with pytest.raises(WinnowError, match=r"use method.constants=false"):
        Schedule("iterative", 2).check(method, shape, HALF)
    for option in ("score", "scope", "weights"):
        with pytest.raises(WinnowError, match=f"unknown {option} 'x'; known: "):
            MoNE("mone", **{option: "x"})


def test_scores_that_are_not_finite_are_refused() -> None:
    statistics: Statistics = made_up_case(1).statistics
    broken = with_statistic(statistics, 3, "gate_sum", np.full(12, np.nan))
    with pytest.raises(WinnowError, match="'gate_sum' of layer 3 is NaN"):
        MoNE("mone").decide(broken, HALF, seed=0)
