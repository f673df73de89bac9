from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan, prune
from harness.contracts.shape import MoeShape
from harness.errors import WinnowError
from methods.budget import kept_experts
from methods.chain import Chain
from methods.coverage import Coverage
from methods.hc_smoe import HCSMoE
from methods.naee import NAEE
from methods.prune_experts import ExpertPruning
from methods.schedule import Schedule

REAP = ExpertPruning("reap", "reap")


def left_after(schedule: Schedule, num_experts: int, n_group: int, ratio: Fraction) -> list[int]:
    left = [num_experts]
    for share in schedule.ratios(MoeShape(num_experts, 1, n_group), ratio):
        left.append(kept_experts(MoeShape(left[-1], 1, n_group), share))
    return left


@pytest.mark.parametrize(
    ("rounds", "num_experts", "n_group", "ratio", "left"),
    [
        (1, 8, 1, "0.5", [8, 4]),
        (2, 8, 1, "0.5", [8, 6, 4]),
        (4, 8, 1, "0.5", [8, 7, 6, 5, 4]),
        (4, 128, 1, "0.25", [128, 120, 112, 104, 96]),
        (3, 60, 1, "0.55", [60, 49, 38, 27]),
        (2, 16, 4, "0.75", [16, 12, 4]),
    ],
)
def test_rounds_remove_equal_shares_and_end_at_the_ratio(rounds, num_experts, n_group, ratio, left):
    exact = Fraction(ratio)
    schedule = Schedule("iterative", rounds)
    schedule.check(REAP, MoeShape(num_experts, 1, n_group), exact)
    assert left_after(schedule, num_experts, n_group, exact) == left
    assert left[-1] == kept_experts(MoeShape(num_experts, 1, n_group), exact)


REFUSED = {
    "merging": (HCSMoE("hc_smoe"), 2, "0.5", "'hc_smoe' needs schedule=one_shot"),
    "channels": (Coverage("coverage"), 2, "0.5", "'coverage' needs schedule=one_shot"),
    "chain": (Chain("both", REAP, Coverage("coverage")), 2, "0.5", "'both' needs schedule=one_shot"),
    "global": (ExpertPruning("reap", "reap", "global"), 2, "0.5", "use method.scope=layer, not global"),
    "random": (ExpertPruning("random", "random"), 2, "0.5", "'random' reads no statistics"),
    "many": (REAP, 5, "0.5", "removes 4 of 8 experts, and a round at least one expert, so use schedule.rounds=4 or"),
    "nothing": (REAP, 2, "0", "ratio 0 removes 0 of 8 experts.*use schedule.rounds=1 or less"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_repeated_is_refused(case):
    method, rounds, ratio, message = REFUSED[case]
    Schedule("one_shot").check(method, MoeShape(8, 1), Fraction(ratio))
    with pytest.raises(WinnowError, match=message):
        Schedule("iterative", rounds).check(method, MoeShape(8, 1), Fraction(ratio))


def test_naee_can_be_repeated():
    Schedule("iterative", 4).check(NAEE("naee"), MoeShape(8, 1), Fraction(1, 2))


@pytest.mark.parametrize("rounds", [0, -1, 2.5, "two"])
def test_a_number_of_rounds_is_at_least_one(rounds):
    with pytest.raises(WinnowError, match=f"rounds must be a whole number of at least 1, not {rounds}"):
        Schedule("iterative", rounds)


def test_a_joined_decision_is_about_the_original_experts():
    first = Decision(CompressionPlan((prune(3, 5, [0, 2, 3]),)), saliency={3: np.array([5.0, 1.0, 4.0, 3.0, 2.0])})
    second = Decision(CompressionPlan((prune(3, 3, [0, 2]),)), saliency={3: np.array([30.0, 10.0, 20.0])})
    assert Schedule.joined(None, first) is first
    joined = Schedule.joined(first, second)
    assert joined.plan == CompressionPlan((prune(3, 5, [0, 3]),))
    assert joined.saliency[3].tolist() == [30.0, 1.0, 10.0, 20.0, 2.0]
