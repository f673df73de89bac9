import numpy as np
import pytest

from harness.contracts import intervals


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 15 of 148 and 0 of 20.
    assert intervals.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert intervals.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert intervals.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_holds_its_share_at_both_ends() -> None:
    for successes, n in ((0, 7), (7, 7), (3, 7), (1, 1)):
        low, high = intervals.wilson(successes, n)
        assert 0 <= low <= successes / n <= high <= 1 and high > low


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        intervals.wilson(successes, n)


def test_bootstrap_of_a_mean_is_near_the_normal_interval_and_repeats() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = intervals.bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert (low, high) == intervals.bootstrap_mean(values) != intervals.bootstrap_mean(values, seed=1)


def test_bootstrap_covers_the_truth_nineteen_times_of_twenty() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        low, high = intervals.bootstrap_mean(generator.exponential(1.0, 60), seed=i, resamples=500)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.98


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_bootstrap_refuses_nothing_and_nan(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        intervals.bootstrap_mean(values)


def test_perplexity_weighs_documents_by_their_tokens() -> None:
    assert intervals.perplexity([10.0, 2.0], [5, 1]) == pytest.approx(np.exp(2.0))
    nll, tokens = [30.0, 1.0, 12.0, 40.0], [10.0, 1.0, 6.0, 10.0]
    low, high = intervals.bootstrap_perplexity(nll, tokens)
    assert 1 < low < intervals.perplexity(nll, tokens) < high
    mixed = intervals.bootstrap_perplexity([100.0] * 50 + [5.0] * 50, [100] * 50 + [1] * 50)
    assert np.exp(1) < mixed[0] < mixed[1] < 3, "fifty single tokens weigh as much as half a long document"
    # Documents of one perplexity leave no doubt, however long each is.
    assert intervals.bootstrap_perplexity([2.0, 20.0], [1, 10]) == pytest.approx((np.exp(2), np.exp(2)))


def test_perplexity_refuses_documents_without_tokens() -> None:
    with pytest.raises(ValueError, match="positive"):
        intervals.bootstrap_perplexity([1.0], [0])


def test_geometric_mean_of_certain_domains_is_certain() -> None:
    domains = {"a": ([2.0, 4.0], [1.0, 2.0]), "b": ([8.0], [2.0])}
    assert intervals.bootstrap_geometric_mean(domains) == pytest.approx((np.exp(3), np.exp(3)))


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=50)
    left_out = (values.sum() - values) / 49
    low, high = intervals.jackknife(values.mean(), left_out)
    assert (high - low) / 2 == pytest.approx(1.959964 * values.std(ddof=1) / np.sqrt(50))
