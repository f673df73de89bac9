"""Budgets: ``allocation=uniform|global|list`` for every criterion."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from harness.contracts.plan import validate
from harness.contracts.shape import MoeShape
from harness.errors import WinnowError
from harness.records.identity import without
from methods.chain import Chain
from methods.coverage import Coverage
from methods.criteria import CRITERIA
from methods.prune_experts import ExpertPruning
from tests.methods.conftest import Case, made_up_case

HALF = Fraction(1, 2)


def method(*overrides: str):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", list(overrides)).method


def kept_by(decision) -> dict[int, list[int]]:
    return {plan.layer: [expert.sources[0].expert for expert in plan.experts] for plan in decision.plan.layers}


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_takes_a_list(case: Case, name: str) -> None:
    """As with ``layer``, each layer with a number of its own: cells of one layer each say who stays."""
    layers, top_k = sorted(case.raw), case.statistics.top_k
    numbers = [case.num_experts // 2] * len(layers)
    numbers[0], numbers[-1] = numbers[0] + 1, numbers[-1] - 1
    assert min(numbers) >= top_k
    decision = ExpertPruning(name, name, "list", numbers).decide(case.statistics, HALF, seed=2)
    validate(decision.plan)
    for layer, number in zip(layers, numbers, strict=True):
        scores, sign = decision.saliency[layer], -1 if decision.largest_goes else 1
        best = sorted(range(case.num_experts), key=lambda j, scores=scores, sign=sign: (-sign * scores[j], j))[:number]
        assert kept_by(decision)[layer] == sorted(best)


def test_a_list_of_equal_numbers_is_uniform() -> None:
    statistics = made_up_case(2).statistics
    even = ExpertPruning("reap", "reap", "list", [6, 6, 6]).decide(statistics, HALF, 0)
    assert even.plan == ExpertPruning("reap", "reap").decide(statistics, HALF, 0).plan


def test_the_group_sets_the_scope_and_uniform_leaves_no_trace() -> None:
    plain = method("method=frequency")
    assert method("method=frequency", "allocation=uniform") == plain
    assert plain == {
        "_target_": "methods.prune_experts.ExpertPruning", "name": "frequency", "criterion": "frequency",
        "scope": "layer", "constants": False,
    }  # fmt: skip
    assert method("method=frequency", "allocation=global") == method("method=frequency", "method.scope=global")
    listed = method("method=frequency", "allocation=list", "method.experts=[8,5,5]")
    assert without(listed, ()) == without(plain, ()) | {"scope": "list", "experts": [8, 5, 5]}
    decision = instantiate(listed).decide(made_up_case(0).statistics, HALF, 0)
    assert [len(layer.experts) for layer in decision.plan.layers] == [8, 5, 5]
    assert "scope" not in method("method=hc_smoe", "allocation=uniform")


def test_a_group_limited_router_takes_a_list_of_multiples() -> None:
    statistics = replace(made_up_case(8).statistics, n_group=2)
    plan = ExpertPruning("reap", "reap", "list", [8, 4, 6]).decide(statistics, HALF, 0).plan
    for layer, number in zip(plan.layers, (8, 4, 6), strict=True):
        rows = [row for row, new in enumerate(layer.route) if new is not None]
        assert [sum(row // 6 == group for row in rows) for group in (0, 1)] == [number // 2] * 2


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([6, 6], r"experts=\[6, 6\] are 2 numbers, but the model has 3 MoE layers"),
        ([13, 3, 2], "13 is not possible; a layer keeps 3 to 12"),
        ([12, 4, 2], "2 is not possible; a layer keeps 3 to 12"),
        ([6, 6, 7], "leave 19 experts in all, but ratio 0.5 leaves 18: change the list, or the ratio"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_before_anything_is_computed(experts: list[int], message: str) -> None:
    with pytest.raises(WinnowError, match=message):
        ExpertPruning("reap", "reap", "list", experts).check(MoeShape(12, 3, layers=3), HALF)


def test_scope_and_experts_go_together() -> None:
    with pytest.raises(WinnowError, match=r"experts=\[...\] goes with scope=list"):
        ExpertPruning("reap", "reap", "list")
    with pytest.raises(WinnowError, match=r"experts=\[...\] goes with scope=list"):
        ExpertPruning("reap", "reap", "layer", [6, 6, 6])
    with pytest.raises(WinnowError, match="not all whole numbers"):
        ExpertPruning("reap", "reap", "list", [6, 6.5, 5.5])
    with pytest.raises(WinnowError, match="multiples of the router's 2 groups"):
        ExpertPruning("reap", "reap", "list", [5, 7, 6]).check(MoeShape(12, 3, 2, layers=3), HALF)


def test_the_layer_that_stands_for_all_keeps_as_many_as_the_mean() -> None:
    listed = ExpertPruning("reap", "reap", "list", [8, 5, 5])
    assert listed.mean_layer == ExpertPruning("reap", "reap")
    assert ExpertPruning("reap", "reap", "global").mean_layer.scope == "global"
    chain = Chain("c", listed, Coverage("coverage"))
    assert chain.mean_layer == replace(chain, first=ExpertPruning("reap", "reap"))
