"""Differences from the baseline: against exact distributions, closed forms and a brute-force bootstrap."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, t

from harness.contracts.record import Record, Sample, Score
from reports.numbers.contrasts import Comparer
from reports.numbers.differences import difference
from reports.numbers.measures import evaluate
from reports.numbers.statistics import Items, Measure, Part
from reports.tables.comparisons import baseline_tests
from reports.tables.scores import difference_table

SHARE = Measure("code", "code", (Part("code", "pass@1"),))
PAIR = Measure("both", "both", (Part("code", "pass@1"), Part("math", "exact_match")))
PERPLEXITY = Measure("p", "p", (Part("perplexity", "perplexity"),), kind="perplexity", higher_is_better=False)


def record(*scores: Score) -> Record:
    return Record({"id": str(hash(scores))}, {}, {}, {}, list(scores), {}, {})


def of_code(outcomes: list[float], low: float = 0.0, high: float = 1.0) -> tuple[Record, Items]:
    value = float(np.mean(outcomes))
    samples = [Sample("code", f"{i:03}", outcome) for i, outcome in enumerate(outcomes)]
    return record(Score("code", "pass@1", value, len(outcomes), low, high)), Items.from_samples(samples)


def test_infinite_perplexity_has_no_interval():
    ruined = record(Score("perplexity", "perplexity", np.inf, 9, 5.0, np.inf))
    fine = record(Score("perplexity", "perplexity", 4.0, 9, 3.0, 5.0))
    found = difference(PERPLEXITY, [ruined], fine)
    assert found.value == np.inf and np.isnan(found.low) and np.isnan(found.high)


def test_a_page_has_one_interval_for_one_difference(panel):
    results = evaluate(panel)
    shown, tested = difference_table(results, "mixed"), baseline_tests(results, "mixed", Comparer())
    for measure, column in (("code", "Δ code (points)"), ("multiple choice", "Δ multiple choice (points)")):
        ours = {(row[0], row[1]): row[shown.header.index(column)] for row in shown.rows}
        if column not in tested.header:
            continue
        for row in tested.rows:
            assert row[tested.header.index(column)].startswith(ours[row[0], row[1]]), (measure, row)
    assert "Δ multiple choice (points)" in tested.header


def test_a_paired_difference_covers_as_it_should():
    """36 right before, 24 of these now; two items are made up, one at either end (Bonett and Price 2012)."""
    base, base_items = of_code([1.0] * 36 + [0.0] * 4)
    cell, items = of_code([1.0] * 24 + [0.0] * 16)
    found = difference(SHARE, [cell], base, [items], base_items)
    padded = np.array([-1.0] * 12 + [0.0] * 28 + [1.0, -1.0])
    half = t.ppf(0.975, 39) * np.sqrt(padded.var() / 42)
    assert found.paired and found.value == pytest.approx(-0.3)
    assert (found.low, found.high) == pytest.approx((padded.mean() - half, padded.mean() + half))
    # Of samples that lose each item with the chance seen, 95 % have their share inside: Binomial(40, 0.3).
    inside = binom.cdf(-found.low * 40, 40, 0.3) - binom.cdf(-found.high * 40, 40, 0.3)
    assert 0.93 < inside < 0.99


def test_pairing_is_what_narrows_the_interval():
    """The same two shares: nested outcomes give a narrow interval, opposite ones a wide one."""
    base, base_items = of_code([1.0] * 20 + [0.0] * 20)
    nested, nested_items = of_code([1.0] * 18 + [0.0] * 22)
    opposed, opposed_items = of_code([0.0] * 22 + [1.0] * 18)
    narrow = difference(SHARE, [nested], base, [nested_items], base_items)
    wide = difference(SHARE, [opposed], base, [opposed_items], base_items)
    assert narrow.value == wide.value == pytest.approx(-0.05)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_each_task_has_an_error_of_its_own():
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
    padded = [np.append(v[1] - v[0], (1, -1)) for v in outcomes.values()]
    squares = np.array([v.var() / len(v) / 4 for v in padded])
    df = squares.sum() ** 2 / np.sum(squares**2 / [len(v) - 3 for v in padded])
    half = t.ppf(0.975, df) * np.sqrt(squares.sum())
    centre = np.mean([v.mean() for v in padded])
    assert found.paired
    assert found.value == pytest.approx(np.mean([(v[1] - v[0]).mean() for v in outcomes.values()]))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


def test_tasks_of_one_size_are_independent():
    """Two tasks with the same outcomes: their average has a variance of half of either's, not the same."""
    outcomes = {"base": np.ones(200), "cell": np.arange(200) % 2.0}

    def cell(side: str) -> tuple[Record, Items]:
        tasks = (("code", "pass@1"), ("math", "exact_match"))
        scores = [Score(task, metric, float(outcomes[side].mean()), 200, 0, 1) for task, metric in tasks]
        samples = [Sample(t, f"{i:03}", x) for t, _ in tasks for i, x in enumerate(outcomes[side])]
        return record(*scores), Items.from_samples(samples)

    (base, base_items), (ours, items) = cell("base"), cell("cell")
    found = difference(PAIR, [ours], base, [items], base_items)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.5 / np.sqrt(400), rel=0.02)


@pytest.mark.parametrize("average", ["tokens", "domains"])
def test_perplexity_is_compared_by_document_and_logarithm(average):
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
        draws.append(value(*pick[0]) / value(*pick[1]))
    assert found.paired and found.value == pytest.approx(value(nll["cell"], tokens) - value(nll["base"], tokens))
    ends = (end / value(nll["base"], tokens) + 1 for end in (found.low, found.high))
    assert tuple(ends) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.02)


def test_seeds_pair_their_average_and_add_their_spread():
    base, base_items = of_code([1.0] * 30 + [0.0] * 10)
    cells = [of_code([1.0] * right + [0.0] * (40 - right)) for right in (10, 14, 18)]
    found = difference(SHARE, [c for c, _ in cells], base, [i for _, i in cells], base_items)
    lost = np.array([1.0] * 30 + [0.0] * 10) - np.mean([[1.0] * n + [0.0] * (40 - n) for n in (10, 14, 18)], axis=0)
    padded = np.append(-lost, (1, -1))
    squares = np.array([padded.var() / 42, np.var([10 / 40, 14 / 40, 18 / 40], ddof=1) / 3])
    df = squares.sum() ** 2 / (squares[0] ** 2 / 39 + squares[1] ** 2 / 2)
    half = t.ppf(0.975, df) * np.sqrt(squares.sum())
    assert found.paired and found.value == pytest.approx(14 / 40 - 30 / 40) and found.seeds == 3
    assert (found.low, found.high) == pytest.approx((padded.mean() - half, padded.mean() + half))


UNPAIRED = (-0.2 - np.hypot(0.075, 0.075), -0.2 + np.hypot(0.075, 0.075))  # half the widths of the two intervals


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
        again = replace(cell, cell={"id": "another seed"})
        found = difference(SHARE, [cell, again], base, [items, None], base_items)
    assert not found.paired and found.value == pytest.approx(-0.2)
    assert (found.low, found.high) == pytest.approx(UNPAIRED)
