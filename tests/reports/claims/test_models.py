"""Effects pooled over models: against Paule and Mandel's equation solved by other code, and by hand."""

import numpy as np
import pytest
from scipy import optimize, stats

from reports.claims.models import pool


def by_hand(effect: np.ndarray, variance: np.ndarray) -> dict[str, float]:
    """Paule and Mandel's tau squared as the root of Q(tau2) = k - 1, and all that follows from it."""
    k = len(effect)

    def q(tau2: float) -> float:
        w = 1 / (variance + tau2)
        return float(np.sum(w * (effect - np.average(effect, weights=w)) ** 2))

    tau2 = optimize.brentq(lambda t: q(t) - (k - 1), 0, 1e3, xtol=1e-15) if q(0) > k - 1 else 0.0
    w = 1 / (variance + tau2)
    mean = np.average(effect, weights=w)
    error = max(1 / np.sqrt(w.sum()), np.sqrt(np.sum(w * (effect - mean) ** 2) / (k - 1) / w.sum()))
    return {
        "tau2": tau2, "mean": float(mean), "error": float(error), "q": q(0.0), "q_p": stats.chi2.sf(q(0.0), k - 1),
        "i2": max(0.0, 1 - (k - 1) / q(0.0)), "half": stats.t.ppf(0.975, k - 1) * error,
        "prediction": stats.t.ppf(0.975, k - 2) * np.sqrt(tau2 + error**2),
    }  # fmt: skip


@pytest.mark.parametrize("between", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("k", [3, 8])
def test_pooled_as_an_independent_implementation(between: float, k: int) -> None:
    generator = np.random.default_rng(round(100 * between) + k)
    variance = generator.uniform(1e-4, 9e-4, k)
    effect = 0.1 + generator.normal(0, np.sqrt(variance + between**2))
    expected, found = by_hand(effect, variance), pool(effect.tolist(), variance.tolist())
    assert found is not None and found.prediction is not None
    assert found.tau2 == pytest.approx(expected["tau2"], rel=1e-4)
    assert found.over.effect == pytest.approx(expected["mean"], rel=1e-5)
    assert found.over.error == pytest.approx(expected["error"], rel=1e-5)
    assert (found.over.low, found.over.high) == pytest.approx(
        (expected["mean"] - expected["half"], expected["mean"] + expected["half"]), rel=1e-4
    )
    assert (found.q, found.q_p, found.i2) == pytest.approx((expected["q"], expected["q_p"], expected["i2"]), rel=1e-9)
    assert found.prediction[1] - found.over.effect == pytest.approx(expected["prediction"], rel=1e-4)
    assert sum(found.weights) == pytest.approx(1) and found.over.n == k and found.over.df == k - 1
    assert found.over.p_above(0.05) == pytest.approx(
        stats.t.sf((expected["mean"] - 0.05) / expected["error"], k - 1), rel=1e-3
    )


def test_the_variance_between_models_is_found_wherever_there_is_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        variance = generator.uniform(1e-5, 1e-2, 8)
        effect = generator.normal(0, np.sqrt(variance + generator.uniform(0, 0.01)))
        found = pool(effect.tolist(), variance.tolist())
        assert found is not None and found.tau2 == pytest.approx(by_hand(effect, variance)["tau2"], rel=1e-3, abs=1e-9)


def test_models_that_agree_have_no_variance_between_them_and_no_narrower_interval() -> None:
    found = pool([0.1, 0.1, 0.1], [0.01, 0.01, 0.01])
    assert found is not None and found.tau2 == 0 and found.i2 == 0 and found.q == pytest.approx(0, abs=1e-12)
    assert found.over.error == pytest.approx(np.sqrt(0.01 / 3)), "Hartung and Knapp's would be 0"


def test_a_model_without_error_does_not_outweigh_the_others() -> None:
    effects, variances = [0.0, 0.2, 0.4, 0.6], [0.0, 0.01, 0.01, 0.02]
    found = pool(effects, variances)
    assert found is not None and found.q is None and found.weights == (0.25,) * 4
    test = stats.ttest_1samp(effects, 0)
    assert found.over.p == pytest.approx(test.pvalue)
    assert (found.over.low, found.over.high) == pytest.approx(tuple(test.confidence_interval()))
    assert found.tau2 == pytest.approx(np.var(effects, ddof=1) - 0.01)


def test_one_model_is_not_pooled_and_two_predict_nothing() -> None:
    assert pool([0.1], [0.01]) is None and pool([], []) is None
    found = pool([0.1, 0.3], [0.01, 0.02])
    assert found is not None and found.prediction is None and found.over.df == 1


@pytest.mark.parametrize(
    ("effects", "variances"), [([0.1], [0.1, 0.2]), ([0.1, np.nan], [0.1, 0.1]), ([0.1, 0.1], [0.1, -1.0])]
)
def test_what_cannot_be_pooled_is_an_error(effects: list[float], variances: list[float]) -> None:
    with pytest.raises(ValueError, match=r"shapes|finite"):
        pool(effects, variances)
