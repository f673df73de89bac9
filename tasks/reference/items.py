"""The evaluation items of the reference suite."""

from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from typing import TypeVar

from harness.errors import WinnowError
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
