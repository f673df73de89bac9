"""Against hand computation, exact distributions and a brute-force bootstrap."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, t

from harness.contracts.record import Record, Sample, Score
from reports.numbers import statistics
from reports.numbers.statistics import Items, Measure, Part, difference, estimate, find_score

SHARE = Measure("code", "code", (Part("code", "pass@1"),))
PAIR = Measure("both", "both", (Part("code", "pass@1"), Part("math", "exact_match")))
PERPLEXITY = Measure("p", "p", (Part("perplexity", "perplexity"),), kind="perplexity", higher_is_better=False)


def record(*scores: Score) -> Record:
    return Record({"id": "x"}, {}, {}, {}, list(scores), {}, {})


def of_code(outcomes: list[float], low: float = 0.0, high: float = 1.0) -> tuple[Record, Items]:
    value = float(np.mean(outcomes))
    samples = [Sample("code", f"{i:03}", outcome) for i, outcome in enumerate(outcomes)]
    return record(Score("code", "pass@1", value, len(outcomes), low, high)), Items.from_samples(samples)


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
    found = difference(PERPLEXITY, [ruined], fine)
    assert found.value == np.inf and np.isnan(found.low) and np.isnan(found.high)


def test_domain_of_a_task_with_a_single_score_need_not_be_empty():
    named = record(Score("code", "pass@1", 0.5, 4, 0.1, 0.9, part="code"))
    assert find_score(named, Part("code", "pass@1")).value == 0.5
    assert find_score(named, Part("code", "pass@1", "math")) is None
    two = record(Score("m", "acc", 0.5, 4, 0.1, 0.9, "code"), Score("m", "acc", 0.5, 4, 0.1, 0.9, "math"))
    assert find_score(two, Part("m", "acc")) is None


def test_paired_difference_matches_the_exact_distribution():
    """36 right before, 24 of these now: a resample loses Binomial(40, 0.3) items."""
    base, base_items = of_code([1.0] * 36 + [0.0] * 4)
    cell, items = of_code([1.0] * 24 + [0.0] * 16)
    found = difference(SHARE, [cell], base, [items], base_items)
    assert found.paired and found.value == pytest.approx(-0.3)
    assert -found.high * 40 == pytest.approx(binom.ppf(0.025, 40, 0.3), abs=1)
    assert -found.low * 40 == pytest.approx(binom.ppf(0.975, 40, 0.3), abs=1)


def test_pairing_is_what_narrows_the_interval():
    """The same two shares: nested outcomes give a narrow interval, opposite ones a wide one."""
    base, base_items = of_code([1.0] * 20 + [0.0] * 20)
    nested, nested_items = of_code([1.0] * 18 + [0.0] * 22)
    opposed, opposed_items = of_code([0.0] * 22 + [1.0] * 18)
    narrow = difference(SHARE, [nested], base, [nested_items], base_items)
    wide = difference(SHARE, [opposed], base, [opposed_items], base_items)
    assert narrow.value == wide.value == pytest.approx(-0.05)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_average_is_resampled_within_each_task():
    """Standard error of the mean of two tasks' mean differences, from their variances."""
    rng = np.random.default_rng(0)
    outcomes = {task: rng.random((2, n)) for task, n in (("code", 60), ("math", 200))}

    def cell(side: int) -> tuple[Record, Items]:
        metrics = {"code": "pass@1", "math": "exact_match"}
        scores = [Score(k, metrics[k], float(v[side].mean()), v.shape[1], 0, 1) for k, v in outcomes.items()]
        samples = [Sample(k, f"{i:03}", x) for k, v in outcomes.items() for i, x in enumerate(v[side])]
        return record(*scores), Items.from_samples(reversed(samples))

    (base, base_items), (ours, items) = cell(0), cell(1)
    found = difference(PAIR, [ours], base, [items], base_items)
    error = np.sqrt(sum(np.var(v[1] - v[0]) / v.shape[1] for v in outcomes.values())) / 2
    assert found.paired
    assert found.value == pytest.approx(np.mean([(v[1] - v[0]).mean() for v in outcomes.values()]))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.07)


def test_tasks_of_one_size_are_resampled_independently():
    """Two tasks with the same outcomes: their average has a variance of half of either's, not the same."""
    outcomes = {"base": np.ones(200), "cell": np.arange(200) % 2.0}

    def cell(side: str) -> tuple[Record, Items]:
        tasks = (("code", "pass@1"), ("math", "exact_match"))
        scores = [Score(task, metric, float(outcomes[side].mean()), 200, 0, 1) for task, metric in tasks]
        samples = [Sample(t, f"{i:03}", x) for t, _ in tasks for i, x in enumerate(outcomes[side])]
        return record(*scores), Items.from_samples(samples)

    (base, base_items), (ours, items) = cell("base"), cell("cell")
    found = difference(PAIR, [ours], base, [items], base_items)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.5 / np.sqrt(400), rel=0.07)


@pytest.mark.parametrize("average", ["tokens", "domains"])
def test_perplexity_is_resampled_by_document(average):
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 50, size=(2, 30)).astype(float)
    nll = {side: tokens * (mean + 0.2 * rng.standard_normal((2, 30))) for side, mean in (("base", 1.0), ("cell", 1.5))}

    def value(total: np.ndarray, count: np.ndarray) -> float:
        if average == "tokens":
            return float(np.exp(total.sum() / count.sum()))
        return float(np.exp((total.sum(1) / count.sum(1)).mean()))

    def cell(side: str) -> tuple[Record, Items]:
        samples = [
            Sample("perplexity", f"{i:02}", nll[side][d, i], weight=tokens[d, i], domain=f"d{d}")
            for d in range(2)
            for i in range(30)
        ]
        score = Score("perplexity", "perplexity", value(nll[side], tokens), 60, 1, 9)
        return record(score), Items.from_samples(samples)

    (base, base_items), (ours, items) = cell("base"), cell("cell")
    found = difference(PERPLEXITY, [ours], base, [items], base_items)

    draws = []
    for _ in range(2000):
        if average == "tokens":
            flat = rng.integers(0, 60, 60)
            pick = [(a.reshape(-1)[flat], tokens.reshape(-1)[flat]) for a in (nll["cell"], nll["base"])]
        else:
            at = rng.integers(0, 30, (2, 30))
            pick = [
                (np.take_along_axis(a, at, 1), np.take_along_axis(tokens, at, 1)) for a in (nll["cell"], nll["base"])
            ]
        draws.append(value(*pick[0]) - value(*pick[1]))
    assert found.paired and found.value == pytest.approx(value(nll["cell"], tokens) - value(nll["base"], tokens))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.03)


def test_seeds_pair_their_average_and_add_their_spread():
    base, base_items = of_code([1.0] * 30 + [0.0] * 10)
    cells = [of_code([1.0] * right + [0.0] * (40 - right)) for right in (10, 14, 18)]
    found = difference(SHARE, [c for c, _ in cells], base, [i for _, i in cells], base_items)
    single = difference(SHARE, [cells[1][0]], base, [cells[1][1]], base_items)
    spread = t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert found.paired and found.value == pytest.approx(14 / 40 - 30 / 40) and found.seeds == 3
    assert found.high - found.value > spread and found.value - found.low > spread
    # Averaging seeds that fail on nested items leaves nearly the middle seed's item noise.
    assert found.high - found.value == pytest.approx(np.hypot(single.high - single.value, spread), rel=0.1)


UNPAIRED = (-0.2 - np.hypot(0.1, 0.05), -0.2 + np.hypot(0.05, 0.1))


@pytest.mark.parametrize("why", ["no samples", "other items", "other score", "one seed without"])
def test_unpaired_where_items_cannot_be_paired(why):
    base, base_items = of_code([1.0] * 14 + [0.0] * 6, low=0.6, high=0.75)
    cell, items = of_code([1.0] * 10 + [0.0] * 10, low=0.4, high=0.55)
    paired = difference(SHARE, [cell], base, [items], base_items)
    assert paired.paired and (paired.low, paired.high) != pytest.approx(UNPAIRED)
    if why == "no samples":
        found = difference(SHARE, [cell], base)
    elif why == "other items":
        found = difference(SHARE, [cell], base, [replace(items, item=np.char.add("x", items.item))], base_items)
    elif why == "other score":
        found = difference(SHARE, [cell], base, [replace(items, score=items.score[::-1] * 0.5)], base_items)
    else:
        found = difference(SHARE, [cell, cell], base, [items, None], base_items)
    assert not found.paired and found.value == pytest.approx(-0.2)
    assert (found.low, found.high) == pytest.approx(UNPAIRED)


def test_same_numbers_every_time():
    base, base_items = of_code([1.0] * 14 + [0.0] * 6)
    cell, items = of_code([1.0] * 10 + [0.0] * 10)
    assert difference(SHARE, [cell], base, [items], base_items) == difference(SHARE, [cell], base, [items], base_items)


def test_what_was_drawn_is_kept_up_to_so_many_bytes(monkeypatch):
    monkeypatch.setattr(statistics, "_drawn", OrderedDict())
    monkeypatch.setattr(statistics, "_MOST_KEPT", 3 * statistics.RESAMPLES * 10 * 4)
    first = statistics._times_drawn("a", 10)
    assert first.sum(axis=1).tolist() == [10] * statistics.RESAMPLES
    assert statistics._times_drawn("a", 10) is first
    for stratum in "bc":
        statistics._times_drawn(stratum, 10)
    statistics._times_drawn("a", 10)
    statistics._times_drawn("d", 10)
    assert [stratum for stratum, _ in statistics._drawn] == ["c", "a", "d"]  # what was asked for longest ago is gone
    assert len(statistics._times_drawn("large", 100)[0]) == 100 and [*statistics._drawn] == [("large", 100)]
    assert np.array_equal(statistics._times_drawn("a", 10), first) and statistics._times_drawn("a", 10) is not first
