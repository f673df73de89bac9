"""Against hand computation."""

import numpy as np
import pytest
from scipy.stats import t

from harness.contracts.record import Record, Score
from reports.numbers.statistics import Measure, Part, estimate, find_score

SHARE = Measure("code", "code", (Part("code", "pass@1"),))
PAIR = Measure("both", "both", (Part("code", "pass@1"), Part("math", "exact_match")))
PERPLEXITY = Measure("p", "p", (Part("perplexity", "perplexity"),), kind="perplexity", higher_is_better=False)


def record(*scores: Score) -> Record:
    return Record({"id": "x"}, {}, {}, {}, list(scores), {}, {})


def test_one_score_keeps_its_recorded_interval():
    found = estimate(SHARE, [record(Score("code", "pass@1", 0.5, 40, 0.35, 0.62))])
    assert (found.value, found.n, found.seeds) == (0.5, 40, 1)
    assert (found.low, found.high) == pytest.approx((0.35, 0.62))


def test_average_takes_the_root_of_the_summed_squares():
    one = record(Score("code", "pass@1", 0.5, 40, 0.47, 0.6), Score("math", "exact_match", 0.7, 30, 0.66, 0.7))
    found = estimate(PAIR, [one])
    assert found.value == pytest.approx(0.6) and found.n == 70
    assert found.low == pytest.approx(0.6 - 0.05 / 2)  # 3-4-5
    assert found.high == pytest.approx(0.6 + 0.1 / 2)


def test_average_needs_all_its_parts():
    assert estimate(PAIR, [record(Score("code", "pass@1", 0.5, 40, 0.47, 0.6))]) is None


def test_seeds_add_student_t_of_their_spread():
    cells = [record(Score("code", "pass@1", value, 40, value - 0.1, value + 0.2)) for value in (0.4, 0.5, 0.6)]
    found = estimate(SHARE, cells)
    spread = t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert (found.value, found.seeds) == (pytest.approx(0.5), 3)
    assert found.low == pytest.approx(0.5 - np.hypot(0.1, spread))
    assert found.high == pytest.approx(0.5 + np.hypot(0.2, spread))


def test_shares_stay_between_0_and_1():
    cells = [record(Score("code", "pass@1", value, 40, value, 1.0)) for value in (0.0, 1.0)]
    assert (estimate(SHARE, cells).low, estimate(SHARE, cells).high) == (0.0, 1.0)


def test_seeds_of_perplexity_are_averaged_by_the_logarithm():
    cells = [record(Score("perplexity", "perplexity", value, 9, value, value)) for value in (2.0, 8.0)]
    found = estimate(PERPLEXITY, cells)
    spread = t.ppf(0.975, 1) * np.log(4) / np.sqrt(2) / np.sqrt(2)
    assert found.value == pytest.approx(4.0)
    assert found.high == pytest.approx(4 * np.exp(spread)) and found.low == 1.0


def test_infinite_perplexity_has_no_interval():
    ruined = record(Score("perplexity", "perplexity", np.inf, 9, 5.0, np.inf))
    fine = record(Score("perplexity", "perplexity", 4.0, 9, 3.0, 5.0))
    assert estimate(PERPLEXITY, [ruined, fine]).value == np.inf


def test_domain_of_a_task_with_a_single_score_need_not_be_empty():
    named = record(Score("code", "pass@1", 0.5, 4, 0.1, 0.9, part="code"))
    assert find_score(named, Part("code", "pass@1")).value == 0.5
    assert find_score(named, Part("code", "pass@1", "math")) is None
    two = record(Score("m", "acc", 0.5, 4, 0.1, 0.9, "code"), Score("m", "acc", 0.5, 4, 0.1, 0.9, "math"))
    assert find_score(two, Part("m", "acc")) is None
