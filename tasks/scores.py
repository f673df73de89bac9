"""What every task of the reference suite needs: its items, and scores with their intervals."""

import math
from collections.abc import Sequence

from harness.contracts import intervals
from harness.contracts.backend import LogLikelihood
from harness.contracts.record import Sample, Score
from harness.errors import BrokenModel

# In a sample's detail, where its output holds a thought: the output without it.
WITHOUT_THOUGHT = "without_thought"


def text_of(sample: Sample) -> str:
    """What the model answered: its output without a thought."""
    return str(sample.detail.get(WITHOUT_THOUGHT, sample.output))


def share_score(task: str, metric: str, outcomes: Sequence[float], part: str = "") -> Score:
    """The share of right answers among outcomes of 0.0 and 1.0, with Wilson's interval."""
    low, high = intervals.wilson(sum(outcomes), len(outcomes))
    return Score(task, metric, sum(outcomes) / len(outcomes), len(outcomes), low, high, part)


def mean_score(task: str, metric: str, values: Sequence[float], seed: int, part: str = "") -> Score:
    """The mean of ``values`` with a bootstrap interval."""
    low, high = intervals.bootstrap_mean(values, seed)
    return Score(task, metric, sum(values) / len(values), len(values), low, high, part)


def require_finite(results: Sequence[LogLikelihood], task: str) -> None:
    """Raises BrokenModel for a log-likelihood that is not finite: nothing can be ranked or averaged."""
    broken = sum(not math.isfinite(result.logprob) for result in results)
    if broken:
        raise BrokenModel(
            f"{task}: {broken} of {len(results)} log-likelihoods are not finite; check the weights for NaN"
        )
