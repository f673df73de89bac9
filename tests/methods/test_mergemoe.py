"""MergeMoE's groups and weights against loops; its fit is tested with the refits."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.plan import validate
from harness.contracts.recovery import Fit, fit_of
from harness.contracts.statistics import ExpertWeights
from harness.errors import WinnowError
from methods.hc_smoe import HCSMoE
from methods.mergemoe import MergeMoE
from tests.methods.conftest import Case, with_statistic

METHOD = MergeMoE("mergemoe")


def flat(weights: ExpertWeights) -> list[float]:
    return [float(v) for matrix in (weights.up, weights.gate) for v in matrix.ravel()]


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(map(math.prod, zip(a, b, strict=True))) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize("ratio", [Fraction(1, 4), Fraction(1, 2)])
def test_plan_equals_the_brute_force(case: Case, ratio: Fraction) -> None:
    decision = METHOD.decide(case.statistics, ratio, seed=0)
    validate(decision.plan)
    experts = range(case.num_experts)
    count = case.num_experts - int(case.num_experts * ratio)
    for plan in decision.plan.layers:
        raw = case.raw[plan.layer]
        usage = [len(raw.routed(j)) for j in experts]
        centres = sorted(sorted(experts, key=lambda j: (-usage[j], j))[:count])
        vectors = [flat(case.statistics.expert_weights(plan.layer, j)) for j in experts]
        centre_of = [j if j in centres else max(centres, key=lambda c: cosine(vectors[j], vectors[c])) for j in experts]
        assert None not in plan.route
        assert len(plan.experts) == count
        for j in experts:
            group = [i for i in experts if centre_of[i] == centre_of[j]]
            total = sum(usage[i] for i in group)
            found = {source.expert: source.weight for source in plan.experts[plan.route[j]].sources}
            assert found == pytest.approx({i: usage[i] / total if total else 1 / len(group) for i in group})
        assert decision.groups[plan.layer] == list(plan.route)


def test_it_asks_for_a_fit_over_all_tokens() -> None:
    assert fit_of(MergeMoE("mergemoe", alpha=0.1, tokens=64)) == Fit("all_tokens", 0.1, 64)
    assert fit_of(HCSMoE("hc_smoe")) is None


def test_experts_without_weights_resemble_nothing_and_broken_ones_are_refused(case: Case) -> None:
    read = case.statistics.expert_weights

    def changed(factor: float):
        def weights(layer: int, expert: int) -> ExpertWeights:
            found = read(layer, expert)
            some = factor if expert == 1 else 1.0
            return ExpertWeights(found.gate * some, found.up * some, found.down)

        return replace(case.statistics, expert_weights=weights)

    validate(METHOD.decide(changed(0.0), Fraction(1, 2), seed=0).plan)
    with np.errstate(invalid="ignore"), pytest.raises(WinnowError, match="NaN or infinite"):
        METHOD.decide(changed(np.nan), Fraction(1, 2), seed=0)
    layer = min(case.statistics.layers)
    broken = with_statistic(case.statistics, layer, "frequency", np.full(case.num_experts, np.inf))
    with pytest.raises(WinnowError, match="statistic 'frequency'"):
        METHOD.decide(broken, Fraction(1, 2), seed=0)
