"""What every task of the reference suite needs: its items, and scores with their intervals."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from typing import TypeVar

from harness.contracts import intervals
from harness.contracts.record import Score
from harness.contracts.task import LogLikelihood
from harness.errors import BrokenModel, WinnowError
from tasks.reference import code, knowledge, writing
from tasks.reference import math as word_problems
from tasks.reference.problem import Problem

T = TypeVar("T")
GENERATORS = {"code": code, "math": word_problems, "writing": writing, "knowledge": knowledge}
# A finite pool repeats itself: after this many repeats in a row it is taken to hold nothing new.
PATIENCE = 20_000


def first_distinct(stream: Iterable[T], items: int, key: Callable[[T], Hashable], source: str) -> tuple[T, ...]:
    """The first ``items`` of ``stream`` that differ by ``key``; WinnowError where there are not as many."""
    if items < 1:
        raise WinnowError(f"items={items}: a task needs at least one evaluation item")
    found: dict[Hashable, T] = {}
    repeats = 0
    for item in stream:
        repeats = repeats + 1 if key(item) in found else 0
        found.setdefault(key(item), item)
        if len(found) == items:
            return tuple(found.values())
        if repeats > PATIENCE:
            break
    raise WinnowError(f"items={items}: {source} has only {len(found)} different evaluation items; ask for fewer")


@lru_cache(maxsize=32)
def evaluation_problems(domain: str, items: int, seed: int) -> tuple[Problem, ...]:
    """The first distinct evaluation problems of a domain, the same for every cell."""
    stream = GENERATORS[domain].problems("evaluation", seed)
    return first_distinct(stream, items, lambda problem: problem.id, domain)


def share_score(task: str, metric: str, outcomes: Sequence[float], domain: str = "") -> Score:
    """The share of right answers among outcomes of 0.0 and 1.0, with Wilson's interval."""
    low, high = intervals.wilson(sum(outcomes), len(outcomes))
    return Score(task, metric, sum(outcomes) / len(outcomes), len(outcomes), low, high, domain)


def mean_score(task: str, metric: str, values: Sequence[float], seed: int, domain: str = "") -> Score:
    """The mean of ``values`` with a bootstrap interval."""
    low, high = intervals.bootstrap_mean(values, seed)
    return Score(task, metric, sum(values) / len(values), len(values), low, high, domain)


def require_finite(results: Sequence[LogLikelihood], task: str) -> None:
    """Raises BrokenModel for a log-likelihood that is not finite: nothing can be ranked or averaged."""
    broken = sum(not math.isfinite(result.logprob) for result in results)
    if broken:
        raise BrokenModel(
            f"{task}: {broken} of {len(results)} log-likelihoods are not finite; check the weights for NaN"
        )
