"""Paired comparisons against scipy's tests, closed forms and brute force."""

import math

import numpy as np
import pytest
from scipy import stats

from harness.contracts.record import Record, Sample, Score
from reports.numbers.contrasts import EACH, SAMPLE_SCORE, Comparer, Term
from reports.numbers.load import Row
from reports.numbers.statistics import Items, Measure, Part

CODE = Measure("code", "code", (Part("code", "pass@1"),))
NUMBER = Measure("code", "code", (Part("code", "pass@1"),), kind="number")
BOTH = Measure("both", "both", (Part("code", "pass@1"), Part("math", "exact_match")))
PERPLEXITY = Measure("p", "p", (Part("perplexity", "perplexity"),), kind="perplexity", higher_is_better=False)
METRICS = {"code": "pass@1", "math": "exact_match"}
_ids = iter(range(10_000))


def row(*seeds: dict[str, np.ndarray], keep_items: bool = True, first: int = 0) -> Row:
    """A row with a record a seed: task -> scores of its items, numbered from ``first``."""
    records, items = [], []
    for of_tasks in seeds:
        scores = [
            Score(t, METRICS[t], float(v.mean()), len(v), float(v.mean()) - 0.04, float(v.mean()) + 0.06)
            for t, v in of_tasks.items()
        ]
        records.append(Record({"id": f"r{next(_ids)}"}, {}, {}, {}, scores, {}, {}))
        samples = [Sample(t, f"{first + i:04}", float(x)) for t, v in of_tasks.items() for i, x in enumerate(v)]
        items.append(Items.from_samples(samples) if keep_items else None)
    return Row("m", 0.5, "mixed", tuple(records), tuple(items))


def outcomes(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def test_numbers_are_tested_like_scipys_paired_t_test():
    a, b = outcomes(0, 2, 40)
    found = Comparer().difference(NUMBER, row({"code": a}), row({"code": b}))
    expected = stats.ttest_rel(a, b)
    assert found.paired and found.n == 40 and found.df == pytest.approx(39) and found.seeds == (1, 1)
    assert found.effect == pytest.approx((a - b).mean())
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_yes_or_no_scores_are_tested_by_mcnemar_with_bonett_and_prices_interval():
    a = np.array([1.0] * 30 + [0.0] * 10 + [1.0] * 6 + [0.0] * 4)
    b = np.array([1.0] * 30 + [0.0] * 10 + [0.0] * 6 + [1.0] * 4)
    found = Comparer().difference(CODE, row({"code": a}), row({"code": b}))
    assert found.p == pytest.approx(stats.binomtest(6, 10, 0.5).pvalue)
    p12, p21 = (6 + 1) / 52, (4 + 1) / 52
    half = stats.t.ppf(0.975, 49) * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 52)
    assert found.effect == pytest.approx(0.04)
    assert (found.low, found.high) == pytest.approx((p12 - p21 - half, p12 - p21 + half))


def test_shares_of_which_all_agree_still_have_an_error():
    ones = np.ones(20)
    same = Comparer().difference(CODE, row({"code": ones}), row({"code": ones}))
    assert same.effect == 0 and same.p == 1 and same.low == pytest.approx(-same.high) and 0 < same.high < 0.2
    apart = Comparer().difference(CODE, row({"code": ones}), row({"code": np.zeros(20)}))
    assert apart.effect == 1 and apart.high == 1 and 0.5 < apart.low < 1
    assert apart.p == pytest.approx(2 * 0.5**20)


def test_numbers_without_variance_do_not_divide_by_zero():
    a = np.full(12, 0.7)
    found = Comparer().difference(NUMBER, row({"code": a}), row({"code": a - 0.5}))
    assert (found.effect, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5)) and found.p < 0.01


def test_an_average_adds_up_the_squared_errors_of_its_tasks():
    code, math_ = outcomes(1, 2, 60), outcomes(2, 2, 200)
    found = Comparer().difference(
        Measure("b", "b", BOTH.parts, kind="number"),
        row({"code": code[0], "math": math_[0]}),
        row({"code": code[1], "math": math_[1]}),
    )
    variances = [np.var(v[0] - v[1], ddof=1) / v.shape[1] / 4 for v in (code, math_)]
    assert found.effect == pytest.approx(np.mean([(v[0] - v[1]).mean() for v in (code, math_)]))
    assert found.error == pytest.approx(math.sqrt(sum(variances)))
    assert found.df == pytest.approx(sum(variances) ** 2 / (variances[0] ** 2 / 59 + variances[1] ** 2 / 199))
    assert found.n == 260


def test_a_difference_of_differences_is_taken_item_by_item():
    a, b, c, d = outcomes(3, 4, 50)
    rows = [row({"code": v}) for v in (a, b, c, d)]
    terms = [Term(w, NUMBER, r) for w, r in zip((1, -1, -1, 1), rows, strict=True)]
    expected = stats.ttest_1samp(a - b - c + d, 0)
    found = Comparer().compare(terms)
    assert found.p == pytest.approx(expected.pvalue) and found.effect == pytest.approx((a - b - c + d).mean())


def test_gaps_on_different_tasks_are_independent():
    code, math_ = outcomes(4, 2, 80), outcomes(5, 2, 90)
    rows = [row({"code": code[i], "math": math_[i]}) for i in (0, 1)]
    one = [Measure(t, t, (Part(t, METRICS[t]),), kind="number") for t in METRICS]
    terms = [Term(1, one[0], rows[0]), Term(-1, one[0], rows[1]), Term(-1, one[1], rows[0]), Term(1, one[1], rows[1])]
    found = Comparer().compare(terms)
    assert found.error == pytest.approx(
        math.sqrt(np.var(code[0] - code[1], ddof=1) / 80 + np.var(math_[0] - math_[1], ddof=1) / 90)
    )
    assert found.seeds == (1, 1) and found.n == 170


def test_seeds_are_averaged_item_by_item_and_add_their_spread():
    base, seeds = outcomes(6, 40), outcomes(7, 3, 40)
    found = Comparer().difference(NUMBER, row(*({"code": s} for s in seeds)), row({"code": base}))
    items = np.var(seeds.mean(0) - base, ddof=1) / 40
    spread = np.var(seeds.mean(1), ddof=1) / 3
    assert found.effect == pytest.approx((seeds.mean(0) - base).mean()) and found.seeds == (3, 1)
    assert found.error == pytest.approx(math.sqrt(items + spread)) and found.seed_error == pytest.approx(spread**0.5)
    assert found.df == pytest.approx((items + spread) ** 2 / (items**2 / 39 + spread**2 / 2))
    assert Comparer().difference(NUMBER, row({"code": seeds[0]}), row({"code": base})).seed_error == 0


def test_the_rule_for_seeds_covers():
    """Items, seeds and their interaction drawn anew: the 95 % interval holds the true difference often enough."""
    rng = np.random.default_rng(8)
    hits = 0
    for _ in range(300):
        difficulty = rng.normal(0, 0.3, 40)
        cells = [difficulty + rng.normal(0, 0.1) + rng.normal(0, 0.2, 40) for _ in range(4)]
        other = 0.1 + difficulty + rng.normal(0, 0.2, 40)
        found = Comparer().difference(NUMBER, row(*({"code": c} for c in cells)), row({"code": other}))
        hits += found.low <= -0.1 <= found.high
    assert 0.92 < hits / 300 <= 1


def test_perplexities_are_compared_by_the_logarithm_and_by_token():
    rng = np.random.default_rng(9)
    tokens = rng.integers(5, 60, 50).astype(float)
    nll = {side: tokens * (mean + 0.3 * rng.standard_normal(50)) for side, mean in (("a", 1.2), ("b", 1.0))}

    def cell(side: str) -> Row:
        samples = [Sample("perplexity", f"{i:02}", nll[side][i], weight=tokens[i]) for i in range(50)]
        score = Score("perplexity", "perplexity", float(np.exp(nll[side].sum() / tokens.sum())), 50, 2.0, 4.0)
        record = Record({"id": f"p{side}"}, {}, {}, {}, [score], {}, {})
        return Row(side, 0.5, "mixed", (record,), (Items.from_samples(samples),))

    found = Comparer().difference(PERPLEXITY, cell("a"), cell("b"))
    assert found.effect == pytest.approx((nll["a"].sum() - nll["b"].sum()) / tokens.sum())
    draws = rng.integers(0, 50, (20_000, 50))
    resampled = (nll["a"] - nll["b"])[draws].sum(1) / tokens[draws].sum(1)
    assert found.error == pytest.approx(resampled.std(), rel=0.05)


def test_only_items_that_all_answered_count():
    a, b = outcomes(10, 2, 60)
    found = Comparer().difference(NUMBER, row({"code": a}), row({"code": b[20:]}, first=20))
    assert found.paired and found.n == 40
    assert found.p == pytest.approx(stats.ttest_rel(a[20:], b[20:]).pvalue)
    apart = Comparer().difference(NUMBER, row({"code": a}), row({"code": b}, first=100))
    assert not apart.paired


def test_without_samples_the_recorded_intervals_are_taken_as_independent():
    a, b = outcomes(11, 2, 30)
    found = Comparer().difference(CODE, row({"code": a}, keep_items=False), row({"code": b}))
    assert not found.paired and found.effect == pytest.approx(a.mean() - b.mean())
    assert found.error == pytest.approx(math.sqrt(2) * 0.1 / 2 / stats.norm.ppf(0.975))
    assert found.df == math.inf and found.p == pytest.approx(2 * stats.norm.sf(abs(found.effect) / found.error))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_made_of_broken_or_missing_scores(value):
    fine = row({"code": np.ones(9)})
    score = Score("code", "pass@1", value, 9, value, value)
    broken = Row("b", 0.5, "mixed", (Record({"id": "broken"}, {}, {}, {}, [score], {}, {}),), (fine.items[0],))
    comparer = Comparer()
    assert comparer.difference(CODE, broken, fine) is None and comparer.difference(CODE, fine, broken) is None
    assert comparer.difference(BOTH, fine, fine) is None and comparer.value(BOTH, fine) is None


def test_samples_own_scores_and_scores_of_each_layer():
    a, b = outcomes(12, 2, 30)
    own = Measure("s", "s", (Part("code", SAMPLE_SCORE),), kind="number")
    assert Comparer().difference(own, row({"code": a}), row({"code": b})).p == pytest.approx(
        stats.ttest_rel(a, b).pvalue
    )

    def layers(values: list[float]) -> Row:
        scores = [Score("layers", "spread", v, 9, v - 1, v + 1, f"layer {i}") for i, v in enumerate(values)]
        return Row("l", 0.5, "m", (Record({"id": f"l{next(_ids)}"}, {}, {}, {}, scores, {}, {}),), (None,))

    each = Measure("e", "e", (Part("layers", "spread", EACH),), kind="number")
    x, y = [0.9, 0.8, 0.95, 0.7], [0.5, 0.6, 0.4, 0.45]
    found = Comparer().difference(each, layers(x), layers(y))
    assert found.paired and found.n == 4 and found.p == pytest.approx(stats.ttest_rel(x, y).pvalue)
    single = Comparer().difference(each, layers([0.9]), layers([0.1]))
    assert single.p == 1.0 and single.effect == pytest.approx(0.8)


def test_an_average_over_domains_is_taken_domain_by_domain():
    """Domains of 30 and 90 items that count the same: errors add up as for a mean of two means."""
    values = {"code": outcomes(13, 2, 30), "math": outcomes(14, 2, 90)}

    def cell(side: int) -> Row:
        score = Score("choice", "acc", float(np.mean([v[side].mean() for v in values.values()])), 120, 0.1, 0.9)
        items = [(d, i, float(x)) for d, v in values.items() for i, x in enumerate(v[side])]
        samples = [Sample("choice", f"{i:02}", x, domain=d) for d, i, x in items]
        record = Record({"id": f"c{next(_ids)}"}, {}, {}, {}, [score], {}, {})
        return Row("c", 0.5, "mixed", (record,), (Items.from_samples(samples),))

    found = Comparer().difference(Measure("c", "c", (Part("choice", "acc"),), kind="number"), cell(0), cell(1))
    variances = [np.var(v[0] - v[1], ddof=1) / v.shape[1] / 4 for v in values.values()]
    assert found.paired and found.n == 120
    assert found.effect == pytest.approx(np.mean([(v[0] - v[1]).mean() for v in values.values()]))
    assert found.error == pytest.approx(math.sqrt(sum(variances)))


def test_a_weighted_average_is_weighted_without_samples_and_over_seeds():
    weights = {"code": 0.8, "math": 0.2}
    weighted = Measure("w", "w", BOTH.parts, weights=tuple(weights.values()))
    seeds = [{"code": outcomes(2 * seed, 30), "math": outcomes(2 * seed + 1, 50)} for seed in range(15, 18)]
    other = {"code": outcomes(30, 30), "math": outcomes(31, 50)}
    of_seeds = np.array([sum(w * seed[task].mean() for task, w in weights.items()) for seed in seeds])
    effect = of_seeds.mean() - sum(w * other[task].mean() for task, w in weights.items())
    comparer = Comparer()
    assert comparer.value(weighted, row(*seeds)) == pytest.approx(of_seeds.mean())
    paired = comparer.difference(weighted, row(*seeds), row(other))
    assert paired.paired and paired.effect == pytest.approx(effect)
    assert paired.seed_error == pytest.approx(of_seeds.std(ddof=1) / math.sqrt(3))
    alone = comparer.difference(weighted, row(*seeds[:1], keep_items=False), row(other, keep_items=False))
    half = 0.1 / 2 / stats.norm.ppf(0.975)
    assert not alone.paired and alone.effect == pytest.approx(effect + of_seeds[0] - of_seeds.mean())
    assert alone.error == pytest.approx(math.sqrt(2 * (0.8 * half) ** 2 + 2 * (0.2 * half) ** 2))
