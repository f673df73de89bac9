from itertools import cycle

import pytest

from harness.contracts.backend import LogLikelihood
from harness.errors import WinnowError
from tasks.reference.items import evaluation_problems, first_distinct
from tasks.scores import mean_score, require_finite, share_score


def test_items_are_the_first_that_differ() -> None:
    assert first_distinct(iter("aabacab"), 3, str, "letters") == ("a", "b", "c")


@pytest.mark.parametrize("items", [0, 4])
def test_too_few_items_say_how_many_there_are(items: int) -> None:
    with pytest.raises(WinnowError, match=f"items={items}"):
        first_distinct(cycle("abc"), items, str, "letters")


@pytest.mark.parametrize("domain", ["code", "math", "writing", "knowledge"])
def test_evaluation_problems_are_held_out_distinct_and_nested(domain: str) -> None:
    few, more = evaluation_problems(domain, 5, 0), evaluation_problems(domain, 8, 0)
    assert more[:5] == few and len({problem.id for problem in more}) == 8
    assert evaluation_problems(domain, 5, 1) != few
    assert all(problem.domain == domain for problem in more)


def test_scores_carry_their_number_and_interval() -> None:
    score = share_score("code", "pass@1", [1.0, 0.0, 1.0, 1.0])
    assert (score.value, score.n, score.part) == (0.75, 4, "") and score.low < 0.75 < score.high
    mean = mean_score("writing", "elements", [0.2, 0.4, 1.0], seed=0, part="x")
    assert mean.value == pytest.approx(1.6 / 3) and mean.low < mean.value < mean.high and mean.part == "x"


def test_a_log_likelihood_that_is_no_number_is_an_error() -> None:
    require_finite([LogLikelihood(-1.0, 1)], "perplexity")
    with pytest.raises(WinnowError, match="perplexity: 2 of 3"):
        bad = [LogLikelihood(float("nan"), 1), LogLikelihood(-1.0, 1), LogLikelihood(float("-inf"), 1)]
        require_finite(bad, "perplexity")
