"""EvoESAP's search over whole numbers, and the budgets of a method that it finds."""

import hashlib
import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from harness.contracts.plan import validate
from harness.contracts.search import searching
from harness.contracts.shape import MoeShape
from harness.errors import WinnowError
from harness.records.identity import without
from methods.chain import Chain
from methods.coverage import Coverage
from methods.criteria import CRITERIA
from methods.evoesap import (
    PATTERNS,
    VERSION,
    Numbers,
    Search,
    child_of,
    evolve,
    first_plans,
    search_from,
    whole_numbers,
)
from methods.prune_experts import ExpertPruning
from methods.schedule import Schedule
from tests.methods.conftest import Case, made_up_case

HALF = Fraction(1, 2)
SHAPE = MoeShape(12, 3, layers=3)


def evoesap(criterion: str = "reap", **search: Any) -> ExpertPruning:
    return ExpertPruning(criterion, criterion, "evoesap", search=search)


# --- whole numbers ----------------------------------------------------------------------------------------------------


def by_hand(weights: list[int], total: int, room: int) -> list[int]:
    """In exact fractions: floors, then the largest fractions, then one after the other."""
    shares = [Fraction(total * weight, sum(weights)) for weight in weights]
    numbers = [min(math.floor(share), room) for share in shares]
    order = sorted(range(len(weights)), key=lambda i: (math.floor(shares[i]) - shares[i], i))
    for i in [i for i in order if numbers[i] < room][: total - sum(numbers)]:
        numbers[i] += 1
    for i in itertools.cycle(range(len(weights))):
        if sum(numbers) == total:
            break
        numbers[i] += numbers[i] < room
    return numbers


@pytest.mark.parametrize("seed", range(200))
def test_whole_numbers_are_those_of_exact_fractions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, room = int(rng.integers(1, 24)), int(rng.integers(1, 40))
    total = int(rng.integers(0, layers * room + 1))
    weights = rng.integers(1, 9, size=layers).tolist()
    weights[0] += -sum(weights) % 64  # the sum is a multiple of 64, so that floats tell fractions apart as they are
    while sum(weights) & (sum(weights) - 1):
        weights[0] += 64
    found = whole_numbers([float(weight) for weight in weights], total, room)
    assert list(found) == by_hand(weights, total, room)
    assert sum(found) == total and all(0 <= number <= room for number in found)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    {
        "uniform": [4, 4, 4, 4, 4, 4, 4, 4], "up": [1, 2, 3, 4, 4, 5, 6, 7], "down": [7, 6, 5, 4, 4, 3, 2, 1],
        "mid": [2, 3, 5, 6, 6, 5, 3, 2], "mid-neg": [6, 5, 3, 2, 2, 3, 5, 6],
        "front-heavy": [8, 7, 5, 4, 3, 2, 2, 1], "back-heavy": [1, 2, 2, 3, 4, 5, 7, 8],
        "block-early": [7, 7, 3, 3, 3, 3, 3, 3], "block-late": [3, 3, 3, 3, 3, 3, 7, 7],
        "alt": [5, 3, 5, 3, 5, 3, 5, 3], "deep-flat": [3, 4, 4, 5, 5, 4, 4, 3],
    }.items(),
)  # fmt: skip
def test_patterns_by_hand(pattern: str, expected: list[int]) -> None:
    """32 experts in 8 layers that can give up 8 each: shares such as 0.89, 1.78, 2.67, 3.56, 4.44, ... of "up"."""
    assert list(whole_numbers(PATTERNS[pattern](8), 32, 8)) == expected
    assert len(PATTERNS) == 11


@pytest.mark.parametrize("layers", range(2, 9))
def test_first_plans_are_different_ones_of_the_total_the_uniform_one_first(layers: int) -> None:
    plans = first_plans(layers, 5 * layers, 9, 20, np.random.default_rng(0))
    assert plans[0] == (5,) * layers
    assert len(set(plans)) == len(plans) == (20 if layers > 2 else 9)  # of two layers there are but nine
    assert all(sum(plan) == 5 * layers and min(plan) >= 0 and max(plan) <= 9 for plan in plans)


@pytest.mark.parametrize("seed", range(100))
def test_a_child_is_a_few_allowed_steps_away(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, room = int(rng.integers(2, 12)), int(rng.integers(2, 20))
    total = int(rng.integers(1, layers * room))
    parent = whole_numbers(rng.random(layers).tolist(), total, room)
    search = Search(max_delta=int(rng.integers(1, 6)), max_steps=int(rng.integers(1, 5)))
    child = child_of(parent, room, search, rng)
    assert sum(child) == total and all(0 <= number <= room for number in child)
    given_up = sum(max(0, before - after) for before, after in zip(parent, child, strict=True))
    assert given_up <= search.max_delta * search.max_steps


# --- the search -------------------------------------------------------------------------------------------------------


def towards(best: Numbers):
    """Worth more the nearer a plan is to ``best``; remembers what it was asked."""
    asked: list[list[Numbers]] = []

    def worth(plans):
        asked.append(list(plans))
        return [-sum((one - other) ** 2 for one, other in zip(plan, best, strict=True)) / 100 for plan in plans]

    return worth, asked


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_best_of_all_of_few_plans(seed: int) -> None:
    best = (1, 3, 8)
    worth, asked = towards(best)
    found = evolve(worth, 3, 12, 12, Search(), seed)
    assert found.best == best and found.worth[best] == 0.0
    flat = [plan for plans in asked for plan in plans]
    assert len(flat) == len(set(flat)) == len(found.worth) <= Search().evaluations(3) == 12 + 7 * 8
    assert all(sum(plan) == 12 for plan in flat)


def test_children_come_from_the_elite_and_rounds_have_the_right_sizes() -> None:
    search = Search(population=12, generations=5, elite=3, max_delta=1, max_steps=1)
    worth, asked = towards((9, 9, 1, 1, 9, 1, 5, 5))
    found = evolve(worth, 8, 40, 9, search, seed=4)
    assert [len(plans) for plans in asked] == [12, 9, 9, 9, 9]
    assert search.evaluations(8) == 48 == len(found.worth)
    seen: dict[Numbers, float] = {}
    for plans in asked:
        elite = sorted(seen, key=lambda plan: -seen[plan])[:3]
        for plan in plans if elite else []:  # one expert away from one of the elite
            assert any(sum(abs(a - b) for a, b in zip(plan, one, strict=True)) == 2 for one in elite)
        seen |= {plan: found.worth[plan] for plan in plans}
    assert found.best == max(seen, key=lambda plan: seen[plan])


def test_the_search_ends_where_no_plan_is_left() -> None:
    worth, asked = towards((1, 1))
    found = evolve(worth, 2, 2, 2, Search(generations=50), seed=0)
    assert sorted(found.worth) == [(0, 2), (1, 1), (2, 0)] and len(asked) == 1


def test_random_plans_come_where_the_elite_have_no_new_children() -> None:
    """All plans are worth the same, so the uniform one stays the only parent, and it has but two children."""
    asked: list[list[Numbers]] = []

    def worth(plans):
        asked.append(list(plans))
        return [1.0] * len(plans)

    evolve(worth, 2, 60, 60, Search(elite=1, max_delta=1, max_steps=1, generations=3), seed=1)
    flat = [plan for plans in asked for plan in plans]
    assert [len(plans) for plans in asked[1:]] == [11, 11] and len(set(flat)) == len(flat)
    assert {(29, 31), (31, 29)} < set(flat) and all(sum(plan) == 60 and min(plan) >= 0 for plan in flat)


def test_a_seed_gives_one_search_and_equals_keep_their_order() -> None:
    runs = []
    for seed in (0, 0, 1):
        worth, asked = towards((0, 9, 3, 8, 5))
        evolve(worth, 5, 25, 9, Search(), seed)
        runs.append(asked)
    assert runs[0] == runs[1] != runs[2]
    assert evolve(lambda plans: [0.5] * len(plans), 5, 25, 9, Search(), 0).best == (5,) * 5


def test_who_changes_what_the_search_looks_at_raises_its_version() -> None:
    worth, asked = towards((0, 9, 3, 8, 5))
    evolve(worth, 5, 25, 9, Search(), 0)
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    assert (digest, VERSION) == ("622c855d5a572f4d", "")


def test_sizes_follow_the_model_unless_they_are_given() -> None:
    assert [Search().sized(layers) for layers in (2, 6, 16, 48)] == [(12, 8), (12, 12), (32, 32), (32, 50)]
    readme = Search(population=32, generations=50)
    assert readme.sized(2) == (32, 50) and 1 + readme.evaluations(2) == 1405
    assert search_from({"population": None, "samples": 8}) == Search(samples=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 11}, "search.population=11 should be a whole number from 12 on"),
        ({"generations": 0}, "search.generations=0 should be a whole number from 1 on"),
        ({"generations": 2.5}, "search.generations=2.5 should be a whole number"),
        ({"elite": -1}, "search.elite=-1 should be"),
        ({"max_delta": 0}, "search.max_delta=0 should be"),
        ({"max_steps": True}, "search.max_steps=True should be"),
        ({"samples": -64}, "search.samples=-64 should be"),
        ({"even": 2}, "search.even=2 should be true or false"),
        ({"population": 16, "elite": 16}, "search.elite=16 leaves no room for children in a population of 16"),
        ({"elite": 12}, "search.elite=12 may be as large as the population: set search.population higher"),
        ({"mutations": 3}, "unknown setting search.mutations; known: population, generations, elite, max_delta"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(WinnowError, match=message):
        evoesap(**settings)


# --- the method -------------------------------------------------------------------------------------------------------


def nearest_to(best: dict[int, int]):
    """Worth more the nearer the numbers of experts are to ``best``."""
    return lambda asked: [1 / (1 + sum((len(kept[layer]) - best[layer]) ** 2 for layer in kept)) for kept in asked]


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_decides_with_the_list_that_was_found(case: Case, name: str) -> None:
    layers, top_k, each = sorted(case.raw), case.statistics.top_k, case.num_experts // 2
    best = dict.fromkeys(layers, each)
    best[layers[0]], best[layers[-1]] = each + 1, each - 1
    assert each - 1 >= top_k
    method, shape = evoesap(name), case.statistics.shape
    asked: list[dict[int, list[int]]] = []

    def overlap(plans):
        asked.extend(plans)
        return nearest_to(best)(plans)

    decides, found = method.with_budget(case.statistics, shape, HALF, 2, overlap)
    assert found.counts == best and found.fitness == 1.0 and found.evaluations == len(asked)
    assert found.uniform == pytest.approx(1 / 3)
    assert decides == ExpertPruning(name, name, "list", list(best.values()))
    decision = decides.decide(case.statistics, HALF, seed=2)
    validate(decision.plan)
    of_plan = {layer.layer: [new.sources[0].expert for new in layer.experts] for layer in decision.plan.layers}
    assert of_plan in asked  # what was looked at is what is decided
    for layer in layers:  # plans are nested: who stays in a smaller one stays in a larger one
        sets = sorted({tuple(kept[layer]) for kept in asked}, key=len)
        assert all(set(small) < set(large) for small, large in itertools.pairwise(sets))


@pytest.mark.parametrize("seed", range(60))
def test_budgets_are_exact(seed: int) -> None:
    """For random models: the total of the ratio, nobody below what the router needs, groups and pairs in full."""
    rng = np.random.default_rng(seed)
    n_group, even = int(rng.choice([1, 1, 2, 4])), bool(rng.integers(2))
    step = math.lcm(n_group, 2 if even else 1)
    experts, top_k = step * int(rng.integers(6, 20)), int(rng.integers(1, 2 * step + 1))
    layers = int(rng.integers(2, 6))
    fewest = n_group * int(rng.integers(1, 3)) if n_group > 1 else 0
    shape = MoeShape(experts, top_k, n_group, layers, fewest_rows=fewest)
    least = -(-max(top_k, fewest) // step) * step
    count = int(rng.integers(least // step + 1, experts // step)) * step
    ratio = Fraction(experts - count, experts)
    saliency = {layer: {"frequency": rng.permutation(experts) + 1.0} for layer in range(layers)}
    statistics = replace(made_up_case(0).statistics, num_experts=experts, top_k=top_k, n_group=n_group, layers=saliency)
    asked: list[dict[int, list[int]]] = []

    def overlap(plans):
        asked.extend(plans)
        return rng.random(len(plans)).tolist()

    decides, found = evoesap("frequency", even=even).with_budget(statistics, shape, ratio, seed, overlap)
    assert found.evaluations == len(asked) == len({tuple(map(len, kept.values())) for kept in asked})
    for kept in asked:
        numbers = [len(experts) for experts in kept.values()]
        assert sum(numbers) == layers * count and min(numbers) >= max(top_k, fewest)
        assert all(number % step == 0 for number in numbers)
        for chosen in kept.values():
            in_group = [sum(j // (experts // n_group) == group for j in chosen) for group in range(n_group)]
            assert len(set(in_group)) == 1
    assert sum(found.counts.values()) == layers * count
    assert len(decides.decide(statistics, ratio, seed).plan.layers) == layers


def test_it_asks_for_a_search_and_a_version_and_a_seed_of_its_own() -> None:
    method = evoesap("weight_norm")
    assert searching(method) is method and method.search == Search()
    assert (method.version, method.uses_seed) == ("1" + VERSION, True)
    plain = ExpertPruning("weight_norm", "weight_norm")
    assert searching(plain) is None and (plain.version, plain.uses_seed) == ("1", False)
    assert method.mean_layer == plain


def test_the_group_sets_the_scope_and_says_nothing_of_defaults() -> None:
    def method(*overrides: str) -> Any:
        with initialize_config_module("conf", version_base="1.3"):
            return compose("config", ["method=frequency", "allocation=evoesap", *overrides]).method

    told = {"name": "frequency", "criterion": "frequency", "scope": "evoesap", "constants": False}
    assert without(method(), ()) == told
    assert without(method("method.search.samples=8"), ()) == told | {"search": {"samples": 8}}
    assert instantiate(method("method.search.even=true")).search == Search(even=True)


@pytest.mark.parametrize(
    ("shape", "ratio", "search", "message"),
    [
        (replace(SHAPE, layers=1), HALF, {}, "one MoE layer leaves nothing to search for; use allocation=uniform"),
        (SHAPE, Fraction(0), {}, "ratio 0 removes 0 of 12 experts a layer, of which at most 9 can go"),
        (SHAPE, Fraction(3, 4), {}, "ratio 0.75 removes 9 of 12 .* at most 9 can go: there is but one budget"),
        (SHAPE, Fraction(5, 6), {}, "leaves 2 of 12 experts, fewer than top-k = 3"),
        (SHAPE, Fraction(1, 4), {"even": True}, "even=true cannot keep 9 of 12 experts a layer.*multiples of 2"),
        (replace(SHAPE, num_experts=11), Fraction(1, 11), {"even": True}, "cannot keep 10 of 11 experts"),
        (MoeShape(12, 3, 2, 3), Fraction(1, 4), {}, "which the router's 2 groups cannot share evenly"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    shape: MoeShape, ratio: Fraction, search: dict[str, Any], message: str
) -> None:
    with pytest.raises(WinnowError, match=message):
        evoesap(**search).check(shape, ratio)


def test_it_stands_alone() -> None:
    statistics = made_up_case(0).statistics
    with pytest.raises(WinnowError, match="scope=evoesap and its settings search go together"):
        ExpertPruning("reap", "reap", "evoesap")
    with pytest.raises(WinnowError, match="scope=evoesap and its settings search go together"):
        ExpertPruning("reap", "reap", search={})
    with pytest.raises(WinnowError, match="allocation=evoesap is not for a stage of another method"):
        evoesap().decide(statistics, HALF, 0)
    with pytest.raises(WinnowError, match="'c': allocation=evoesap is not for a stage of another method"):
        Chain("c", evoesap(), Coverage("coverage"))
    with pytest.raises(WinnowError, match="use method.scope=layer, not evoesap"):
        Schedule("iterative", 2).check(evoesap(), SHAPE, HALF)
