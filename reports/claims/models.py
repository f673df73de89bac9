"""One effect on several models: what it is over models such as these, and how much models differ.

Effects of models are pooled as meta-analyses pool studies: every model has its own true effect, drawn from a normal
distribution, and is seen with the error that its items leave. A conclusion over models is about the mean of that
distribution; it cannot be surer than the number of models allows, however many items each was asked.

- Variance between models (tau squared): Paule and Mandel's (Journal of Research of the National Bureau of Standards 87,
  1982), by statsmodels. Where a model's error is 0 (all its items agree) weights would be infinite: then all models
  weigh the same, and tau squared is the variance of the effects less the mean squared error.
- Interval and p-values: Student's t with models - 1 degrees of freedom, and the larger of the usual error and that of
  Hartung and Knapp (Statistics in Medicine 20, 2001), which few models need; it never narrows the interval.
- Heterogeneity: Cochran's Q with its p-value, and I squared, the share of the spread that is not error of the items.
- Prediction interval: where the effect of one more such model would lie in 95 % (Higgins, Thompson and Spiegelhalter,
  Journal of the Royal Statistical Society A 172, 2009, equation 12); three models or more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc, stdtrit

from reports.numbers.paired import ALPHA, Comparison, interval


@dataclass(frozen=True)
class Pooled:
    """``over``: the mean effect over models, its ``n`` the number of models. ``q`` and what is made from it are None
    where some model's error is 0. ``weights``: the models' shares of the mean, in their order."""

    over: Comparison
    tau2: float
    q: float | None
    q_p: float | None
    i2: float | None
    prediction: tuple[float, float] | None
    weights: tuple[float, ...]


def pool(effects: Sequence[float], variances: Sequence[float]) -> Pooled | None:
    """The effects of models (k,) with the squared errors of each, in the same unit; None of fewer than two.

    Raises ValueError where lengths differ, a number is not finite, or a variance is negative.
    """
    effect, variance = (np.asarray(values, dtype=np.float64) for values in (effects, variances))
    if effect.shape != variance.shape or effect.ndim != 1:
        raise ValueError(f"effects and variances have the shapes {effect.shape} and {variance.shape}")
    if not np.isfinite([effect, variance]).all() or (variance < 0).any():
        raise ValueError("effects must be finite, and variances finite and not negative")
    if len(effect) < 2:
        return None
    return _equal_weights(effect, variance) if (variance == 0).any() else _random_effects(effect, variance)


def _random_effects(effect: np.ndarray, variance: np.ndarray) -> Pooled:
    from statsmodels.stats.meta_analysis import combine_effects  # a second, which a report on one model does without

    # Below its tolerance of 1e-5, rounding can end the iteration beyond the root, which it takes for 0.
    with np.errstate(divide="ignore"):  # its I squared, where all models are alike
        found = combine_effects(effect, variance, method_re="pm", maxiter=500)
    q, df = max(0.0, float(found.q)), len(effect) - 1
    return _pooled(
        float(found.mean_effect_re),
        max(float(found.sd_eff_w_re), float(found.sd_eff_w_re_hksj)),
        float(found.tau2),
        np.asarray(found.weights_rel_re),
        (q, float(chdtrc(df, q)), max(0.0, 1 - df / q) if q > 0 else 0.0),
    )


def _equal_weights(effect: np.ndarray, variance: np.ndarray) -> Pooled:
    between = float(effect.var(ddof=1))
    tau2 = max(0.0, between - float(variance.mean()))
    error = math.sqrt(max(between, float(variance.mean())) / len(effect))
    return _pooled(float(effect.mean()), error, tau2, np.full(len(effect), 1 / len(effect)), (None, None, None))


def _pooled(
    mean: float,
    error: float,
    tau2: float,
    weights: np.ndarray,
    heterogeneity: tuple[float | None, float | None, float | None],
) -> Pooled:
    models = len(weights)
    over = Comparison(mean, *interval(mean, error, models - 1), error, models - 1, models)
    prediction = None
    if models > 2:
        half = float(stdtrit(models - 2, 1 - ALPHA / 2)) * math.sqrt(tau2 + error**2)
        prediction = (mean - half, mean + half)
    return Pooled(over, tau2, *heterogeneity, prediction, tuple(weights.tolist()))
