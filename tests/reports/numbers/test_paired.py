"""Against scipy, closed forms and brute force."""

import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from reports.numbers import paired
from reports.numbers.paired import (
    Comparison,
    arrangements,
    holm,
    interval,
    mcnemar,
    rank_correlation,
    satterthwaite,
    two_sided,
)


@pytest.mark.parametrize("first, second", [(0, 0), (1, 0), (7, 2), (12, 12), (3, 30)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_items(first, second):
    above, below = mcnemar(first, second)
    if first + second == 0:
        assert (above, below) == (1.0, 1.0)
        return
    for p, side in ((above, "greater"), (below, "less")):
        assert p == pytest.approx(stats.binomtest(first, first + second, 0.5, alternative=side).pvalue)
    assert two_sided(above, below) == pytest.approx(stats.binomtest(first, first + second, 0.5).pvalue)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_holm_rejects_what_closed_bonferroni_testing_rejects():
    """Holm's rule is the closed test with Bonferroni's on every intersection (Marcus, Peritz and Gabriel 1976)."""
    p_values = np.random.default_rng(0).uniform(0, 0.1, size=(20, 5))
    for row in p_values:
        corrected = holm(row.tolist())
        for place in range(5):
            sets = [np.array(mask, dtype=bool) for mask in product([0, 1], repeat=5) if mask[place]]
            assert corrected[place] == pytest.approx(min(1.0, max(mask.sum() * row[mask].min() for mask in sets)))


def test_tails_are_students():
    one = Comparison(0.3, 0.0, 0.6, error=0.2, df=7, n=8)
    assert one.p_above() == pytest.approx(stats.t.sf(1.5, 7)) and one.p_below() == pytest.approx(stats.t.cdf(1.5, 7))
    assert one.p_above(0.1) == pytest.approx(stats.t.sf(1.0, 7))
    assert one.p == pytest.approx(2 * stats.t.sf(1.5, 7))


def test_exact_p_values_are_used_against_zero_only():
    one = Comparison(0.3, 0.0, 0.6, error=0.2, df=math.inf, n=8, exact=(0.25, 0.9))
    assert (one.p_above(), one.p_below(), one.p) == (0.25, 0.9, 0.5)
    assert one.p_above(0.1) == pytest.approx(stats.norm.sf(1.0))


def test_without_variance_the_sign_flip_test_has_the_last_word():
    one = Comparison(0.3, 0.3, 0.3, error=0.0, df=math.inf, n=5)
    assert (one.p_above(), one.p_below(), one.p) == (1 / 32, 1.0, 1 / 16)
    none = Comparison(0.0, 0.0, 0.0, error=0.0, df=math.inf, n=5)
    assert none.p == 1.0 and none.items_needed() == math.inf and none.detectable() == 0.0


def test_the_detectable_effect_is_found_with_80_percent_power():
    one = Comparison(0.0, -1.0, 1.0, error=0.5, df=math.inf, n=50)
    effect = one.detectable()
    power = stats.norm.sf(stats.norm.ppf(0.975) - effect / 0.5)  # the other side is negligible
    assert power == pytest.approx(0.8)
    rng = np.random.default_rng(1)
    seen = effect + 0.5 * rng.standard_normal(20_000)
    assert np.mean(seen / 0.5 > stats.norm.ppf(0.975)) == pytest.approx(0.8, abs=0.01)
    assert one.detectable(alpha=0.001) > effect and one.detectable(power=0.5) < effect


@pytest.mark.parametrize("threshold", [0.0, -0.05, 0.3])
def test_items_needed_make_the_effect_just_detectable(threshold):
    one = Comparison(0.1, -0.1, 0.3, error=0.1, df=math.inf, n=100, seed_error=0.02)
    needed = one.items_needed(threshold)
    error = math.sqrt((0.1**2 - 0.02**2) * 100 / needed + 0.02**2)
    later = Comparison(0.1, 0, 0, error=error, df=math.inf, n=int(needed))
    assert later.detectable() == pytest.approx(abs(0.1 - threshold), rel=0.01)
    assert needed > 100 or threshold == 0.3


def test_no_number_of_items_helps_at_the_threshold_or_against_seeds():
    assert Comparison(0.1, 0, 0.2, error=0.1, df=math.inf, n=100).items_needed(0.1) == math.inf
    noisy = Comparison(0.1, 0, 0.2, error=0.2, df=math.inf, n=100, seeds=(3, 1), seed_error=0.19)
    assert noisy.items_needed() == math.inf
    assert noisy.seeds_needed() == math.inf  # the items alone are too few as well
    seeds_alone = Comparison(0.1, 0, 0.2, error=0.06, df=math.inf, n=100, seeds=(3, 1), seed_error=0.058)
    needed = int(seeds_alone.seeds_needed())

    def detectable(seeds: int) -> float:
        items, spread = 0.06**2 - 0.058**2, 0.058**2 * 3 / seeds
        df = satterthwaite([items, spread], [math.inf, seeds - 1])
        return Comparison(0.1, 0, 0.2, error=math.sqrt(items + spread), df=df, n=100).detectable()

    assert detectable(needed) <= 0.1 < detectable(needed - 1) and needed > 3


def test_more_than_enough_items_are_never_fewer():
    assert Comparison(1.0, 0.9, 1.1, error=0.01, df=math.inf, n=100).items_needed() == 100


def test_satterthwaite_is_welchs():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal(12), 3 * rng.standard_normal(7)
    df = satterthwaite([a.var(ddof=1) / 12, b.var(ddof=1) / 7], [11, 6])
    assert df == pytest.approx(stats.ttest_ind(a, b, equal_var=False).df)
    assert satterthwaite([0.0, 0.0], [3, 4]) == math.inf and satterthwaite([1.0], [math.inf]) == math.inf


def test_intervals_are_students_and_keep_the_effect_and_the_bounds():
    low, high = interval(0.2, 0.1, 9)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 9, loc=0.2, scale=0.1))
    assert interval(0.9, 0.1, math.inf, centre=0.5)[1] == 0.9
    assert interval(0.9, 0.2, math.inf, bounds=(-1, 1))[1] == 1


@pytest.mark.parametrize("n", [5, 40])
def test_rank_correlation_against_scipy_with_ties(n):
    rng = np.random.default_rng(3)
    x = rng.integers(0, 6, n).astype(float)
    y = x + rng.integers(0, 4, n)
    found = rank_correlation(x.tolist(), y.tolist())
    rho = stats.spearmanr(x, y).statistic
    assert found.effect == pytest.approx(rho)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    middle = math.atanh(rho)
    assert (found.low, found.high) == pytest.approx((math.tanh(middle - half), math.tanh(middle + half)))


def test_rank_correlation_permutes_exactly():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    found = rank_correlation(x, y)

    def rho(order):
        return stats.spearmanr(order, y).statistic

    for p, side in ((found.p_above(), "greater"), (found.p_below(), "less")):
        exact = stats.permutation_test((x,), rho, permutation_type="pairings", alternative=side, n_resamples=np.inf)
        assert p == pytest.approx(exact.pvalue)
    perfect = rank_correlation([1, 2, 3, 4], [10, 20, 30, 40])
    assert perfect.p_above() == pytest.approx(1 / 24) and perfect.p_below() == 1.0


def test_rank_correlation_of_many_pairs_draws_permutations():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((2, 30))
    found = rank_correlation(x, y)
    assert found.p == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.02)
    assert rank_correlation(x, y) == found
    assert 0 < rank_correlation(x, x).p < 0.001


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (3, 4)])
def test_of_a_table_whole_rows_and_columns_are_permuted(shape):
    rows, columns = shape
    x, y = np.random.default_rng(5).integers(0, 6, (2, *shape)).astype(float)
    y += x
    found = rank_correlation(x, y)
    by_chance = np.array(
        [
            stats.spearmanr(x.ravel(), y[np.ix_(one, other)].ravel()).statistic
            for one in permutations(range(rows))
            for other in permutations(range(columns))
        ]
    )
    assert arrangements(rows, columns) == len(by_chance) and found.n == rows * columns
    assert found.effect == pytest.approx(stats.spearmanr(x.ravel(), y.ravel()).statistic)
    assert found.p_above() == pytest.approx(np.mean(by_chance >= found.effect - 1e-9))
    assert found.p_below() == pytest.approx(np.mean(by_chance <= found.effect + 1e-9))
    assert found.error**2 == pytest.approx(np.mean(by_chance**2))  # Schur's lemma against all permutations
    points = 1 + 1 / np.mean(by_chance**2)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + found.effect**2 / 2) / (points - 3)) if points > 3 else math.inf
    middle = math.atanh(found.effect)
    assert (found.low, found.high) == pytest.approx((math.tanh(middle - half), math.tanh(middle + half)))


def test_a_list_is_a_table_of_one_row_or_one_column():
    x, y = np.random.default_rng(6).standard_normal((2, 6))
    assert rank_correlation([x], [y]) == rank_correlation(x, y)
    column = rank_correlation(x[:, None], y[:, None])
    assert (column.p_above(), column.low, column.error) == pytest.approx(
        (rank_correlation(x, y).p_above(), rank_correlation(x, y).low, 1 / math.sqrt(5))
    )


def test_points_that_share_rows_and_columns_are_not_taken_for_so_many(monkeypatch):
    """Tables that have nothing to do with each other, but effects of rows and columns: 5 % are found, at most."""
    monkeypatch.setattr(paired, "PERMUTATIONS", 500)
    rng = np.random.default_rng(7)
    tables = np.zeros((2, 2, 300))
    for trial in range(300):
        x, y = (rng.normal(size=(4, 1)) + rng.normal(size=(1, 4)) + 0.1 * rng.normal(size=(4, 4)) for _ in "xy")
        tables[0, :, trial] = rank_correlation(x, y).p_above(), rank_correlation(x, y).low > 0
        as_list = rank_correlation(x.ravel(), y.ravel())
        tables[1, :, trial] = as_list.p_above(), as_list.low > 0
    found, intervals = (tables[:, 0] < 0.05).mean(1), tables[:, 1].mean(1)
    assert found[0] < 0.08 < found[1] and intervals[0] < 0.06 < intervals[1]


def test_a_perfect_order_is_no_certainty():
    four = rank_correlation([1, 2, 3, 4], [1, 2, 3, 4])
    half = stats.norm.ppf(0.975) * math.sqrt(1.5)
    assert four.high == 1.0 and four.low == pytest.approx(math.tanh(math.atanh(1 - 12 / 60) - half)) and four.low < 0
    many = rank_correlation(np.arange(40), np.arange(40))
    assert 0.99 < many.low < many.high == pytest.approx(1.0)


def test_rank_correlation_of_bad_input():
    with pytest.raises(ValueError, match="at least four pairs"):
        rank_correlation([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError):
        rank_correlation([1, 2, 3, 4], [[1, 2], [3, 4]])
    of_rows, of_columns = [[1, 1], [2, 2]], [[1, 2], [1, 2]]  # what tells rows apart tells nothing of columns
    apart = rank_correlation(of_rows, of_columns)
    assert (apart.effect, apart.low, apart.high, apart.p) == (0.0, -1.0, 1.0, 1.0)
    flat = rank_correlation([1, 1, 1, 1], [1, 2, 3, 4])
    assert (flat.effect, flat.low, flat.high, flat.p) == (0.0, -1.0, 1.0, 1.0)
