"""EvoESAP: how many experts each layer gives up, by a search with mutations (after the released code of EvoESAP).

Which experts a layer gives up is fixed by a saliency, so a plan is one whole number a layer. Only their sum is given.
Functions here know neither experts nor models: ``room`` is the most that a layer can give up, and what a plan is worth
is handed in.
"""

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np

from harness.errors import WinnowError

log = logging.getLogger(__name__)

Numbers = tuple[int, ...]  # one for each layer

VERSION = ""  # of the search, behind the method's: " (evoesap 2)" where it finds something else with the same settings
TRIES = 32  # steps that a child may try, allowed or not
REDRAWN = 100  # children that are drawn, for one that has not been seen before


@dataclass(frozen=True)
class Search:
    """Settings of the search.

    ``population`` plans are looked at in each of ``generations`` rounds; the ``elite`` best of all so far stay, and the
    others are their children: at most ``max_steps`` times a layer gives up to ``max_delta`` more experts and another
    as many fewer. None sizes both numbers to the L layers: a population of 2 L within 12 to 32, and 2 L generations
    within 8 to 50. ``samples`` token sequences of the corpus, evenly spaced, are looked at. With ``even`` every layer
    keeps an even number of experts. The released code's README runs population=32 generations=50.

    Raises WinnowError for what does not fit.
    """

    population: int | None = None
    generations: int | None = None
    elite: int = 4
    max_delta: int = 4
    max_steps: int = 3
    samples: int = 64
    even: bool = False

    def __post_init__(self) -> None:
        least = {"population": len(PATTERNS) + 1, "generations": 1, "elite": 1, "max_delta": 1, "max_steps": 1}
        for name, fewest in {**least, "samples": 1}.items():
            value = getattr(self, name)
            if value is None and name in ("population", "generations"):
                continue
            if type(value) is not int or value < fewest:
                raise WinnowError(
                    f"allocation=evoesap: search.{name}={value} should be a whole number from {fewest} on"
                )
        if type(self.even) is not bool:
            raise WinnowError(f"allocation=evoesap: search.even={self.even} should be true or false")
        if self.population is not None and self.elite >= self.population:
            raise WinnowError(
                f"allocation=evoesap: search.elite={self.elite} leaves no room for children in a population of "
                f"{self.population}: lower it"
            )
        if self.population is None and self.elite >= least["population"]:
            raise WinnowError(
                f"allocation=evoesap: search.elite={self.elite} may be as large as the population: set "
                "search.population higher than it"
            )

    def sized(self, layers: int) -> tuple[int, int]:
        """Population and generations for so many layers."""
        population = min(max(len(PATTERNS) + 1, 2 * layers), 32) if self.population is None else self.population
        generations = min(max(8, 2 * layers), 50) if self.generations is None else self.generations
        return population, generations

    def at_once(self, layers: int) -> int:
        return self.sized(layers)[0]

    def evaluations(self, layers: int) -> int:
        """Plans that are looked at, at most: children of the last round are not."""
        population, generations = self.sized(layers)
        return population + (generations - 1) * (population - self.elite)


def search_from(given: Mapping[str, Any]) -> Search:
    """Settings as they are in a configuration, where null is the default. Raises WinnowError for one not known."""
    known = [field.name for field in fields(Search)]
    for name in given:
        if name not in known:
            raise WinnowError(f"allocation=evoesap: unknown setting search.{name}; known: {', '.join(known)}")
    return Search(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Found:
    """``best`` is what the search ends with, ``worth`` that of every plan it has looked at."""

    best: Numbers
    worth: dict[Numbers, float]


def _by_place(weight: Callable[[int, int], float]) -> Callable[[int], list[float]]:
    return lambda layers: [weight(place, layers) for place in range(layers)]


def _from_middle(place: int, layers: int) -> float:
    return abs((layers - 1) / 2 - place)


# Weights of the layers in the plans that a search starts from; a random one is the twelfth of the released code.
PATTERNS: dict[str, Callable[[int], list[float]]] = {
    "uniform": _by_place(lambda i, n: 1.0),
    "up": _by_place(lambda i, n: i + 1.0),
    "down": _by_place(lambda i, n: float(n - i)),
    "mid": _by_place(lambda i, n: (n - 1) / 2 - _from_middle(i, n) + 1),
    "mid-neg": _by_place(lambda i, n: _from_middle(i, n) + 1),
    "front-heavy": _by_place(lambda i, n: 0.7**i + 1e-4),
    "back-heavy": _by_place(lambda i, n: 1.3**i),
    "block-early": _by_place(lambda i, n: 2.0 if i < max(1, n // 4) else 1.0),
    "block-late": _by_place(lambda i, n: 2.0 if i >= n - max(1, n // 4) else 1.0),
    "alt": _by_place(lambda i, n: 1.0 + (i % 2 == 0)),
    "deep-flat": _by_place(lambda i, n: 1.0 - 0.5 * abs(2 * i / max(n - 1, 1) - 1)),
}


def whole_numbers(weights: Sequence[float], total: int, room: int) -> Numbers:
    """Whole numbers of sum ``total``, in proportion to ``weights``, none above ``room``.

    Rounded down; what is left over goes one each to the layers of the largest fraction, the first of equals first, then
    to one layer with room after the other. ``total`` is at most ``room`` a layer.
    """
    shares = [total * weight / sum(weights) for weight in weights]
    numbers = [min(int(share), room) for share in shares]
    left = total - sum(numbers)
    with_room = [place for place, number in enumerate(numbers) if number < room]
    for place in sorted(with_room, key=lambda place: int(shares[place]) - shares[place])[:left]:
        numbers[place] += 1
    left = total - sum(numbers)
    while left > 0:
        for place, number in enumerate(numbers):
            if left > 0 and number < room:
                numbers[place] += 1
                left -= 1
    return tuple(numbers)


def first_plans(layers: int, total: int, room: int, population: int, rng: np.random.Generator) -> list[Numbers]:
    """Different plans of sum ``total``: the patterns, then random ones, ``population`` of them where so many are found.

    The uniform one is the first.
    """
    found = dict.fromkeys(whole_numbers(pattern(layers), total, room) for pattern in PATTERNS.values())
    tries = REDRAWN * population
    while len(found) < population and tries > 0:
        found[_random_plan(layers, total, room, rng)] = None
        tries -= 1
    return list(found)[:population]


def child_of(parent: Numbers, room: int, search: Search, rng: np.random.Generator) -> Numbers:
    """``parent`` after a few steps, each of which moves some of a layer's number to another; the sum stays."""
    child, layers = list(parent), len(parent)
    wanted = min(rng.integers(1, search.max_steps + 1, size=2))
    for _ in range(TRIES):
        if wanted == 0:
            break
        givers = [place for place in range(layers) if child[place] > 0]
        takers = [place for place in range(layers) if child[place] < room]
        giver, taker = givers[int(rng.integers(len(givers)))], takers[int(rng.integers(len(takers)))]
        delta = int(rng.integers(1, search.max_delta + 1))
        if giver == taker or child[giver] < delta or child[taker] + delta > room:
            continue
        child[giver] -= delta
        child[taker] += delta
        wanted -= 1
    return tuple(child)


def evolve(
    worth_of: Callable[[Sequence[Numbers]], Sequence[float]],
    layers: int,
    total: int,
    room: int,
    search: Search,
    seed: int,
) -> Found:
    """The plan of sum ``total`` that is worth most of those looked at, each number within 0 to ``room``.

    ``worth_of`` is asked for each plan once, a round's plans together. Equal plans are never looked at twice, so the
    elite are different plans; where these have no new children, random plans take their places, and where there are no
    new plans at all, the search ends early. Of equally good plans the first one
    found wins. It hangs on ``seed`` and what the plans are worth alone.
    """
    rng = np.random.default_rng(seed)
    population, generations = search.sized(layers)
    fresh, worth = first_plans(layers, total, room, population, rng), dict[Numbers, float]()
    for generation in range(generations):
        worth |= zip(fresh, worth_of(fresh), strict=True)
        elite = _best(worth, search.elite)
        log.info("search: round %d of %d, the best so far %.6f", generation + 1, generations, worth[elite[0]])
        if generation + 1 == generations:
            break
        fresh = _children(elite, worth.keys(), population - search.elite, room, search, rng)
        if not fresh:
            log.info("search: no plan is left that has not been looked at")
            break
    return Found(_best(worth, 1)[0], worth)


def _best(worth: dict[Numbers, float], count: int) -> list[Numbers]:
    """A stable sort: the first found of equals."""
    return sorted(worth, key=lambda plan: -worth[plan])[:count]


def _children(
    elite: Sequence[Numbers], seen: Container[Numbers], count: int, room: int, search: Search, rng: np.random.Generator
) -> list[Numbers]:
    """``count`` plans that are new: children of parents drawn from the ``elite``, and random ones where these have no
    more; fewer where no new ones are found at all."""
    layers, total = len(elite[0]), sum(elite[0])
    found: dict[Numbers, None] = {}
    for _ in range(count):
        children = (child_of(elite[int(rng.integers(len(elite)))], room, search, rng) for _ in range(REDRAWN))
        strangers = (_random_plan(layers, total, room, rng) for _ in range(REDRAWN))
        plans = (plan for plan in chain(children, strangers) if plan not in seen and plan not in found)
        if (plan := next(plans, None)) is None:
            break
        found[plan] = None
    return list(found)


def _random_plan(layers: int, total: int, room: int, rng: np.random.Generator) -> Numbers:
    return whole_numbers((rng.random(layers) + 1e-4).tolist(), total, room)
