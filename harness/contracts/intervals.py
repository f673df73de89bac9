"""95 % intervals for the three kinds of number a task gives: a share, a mean, a perplexity. Pure numpy.

Every function gives ``(low, high)`` and is deterministic: the resamples come from a seed.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000

Interval = tuple[float, float]


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval for a share of ``n`` yes-or-no outcomes (Wilson 1927).

    Stays inside [0, 1] and keeps a width at 0 and at n successes, where the normal interval has none.
    Raises ValueError without outcomes, or for successes outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: needs n >= 1 and 0 <= successes <= n")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At the ends the formula gives exactly the share; rounding must not put it outside of its own interval.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


@lru_cache(maxsize=4)  # a task asks for the same resamples again and again
def _resample_counts(n: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """How often each of ``n`` items is drawn in each resample with replacement, shape [resamples, n]."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def _percentiles(statistics: NDArray[np.float64], confidence: float) -> Interval:
    low, high = np.quantile(statistics, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
        raise ValueError("an interval needs a vector of at least one value, all of them finite")
    return vector


def bootstrap_mean(
    values: ArrayLike, seed: int = 0, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values`` [n] (Efron 1979); ValueError if empty."""
    vector = _vector(values)
    means = _resample_counts(vector.size, seed, resamples) @ vector / vector.size
    return _percentiles(means, confidence)


def bootstrap_median(
    values: ArrayLike, seed: int = 0, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of the median of ``values`` [n]; ValueError if empty."""
    vector = _vector(values)
    drawn = np.random.default_rng(seed).integers(vector.size, size=(resamples, vector.size))
    return _percentiles(np.median(vector[drawn], axis=1), confidence)


def _log_perplexities(nll: ArrayLike, tokens: ArrayLike, seed: int, resamples: int) -> NDArray[np.float64]:
    total, weight = _vector(nll), _vector(tokens)
    if total.shape != weight.shape or (weight <= 0).any():
        raise ValueError("each document needs one log-likelihood and a positive number of tokens")
    counts = _resample_counts(total.size, seed, resamples)
    return (counts @ total) / (counts @ weight)


def perplexity(nll: ArrayLike, tokens: ArrayLike) -> float:
    """``exp(sum(nll) / sum(tokens))``: every token counts the same, so long documents weigh more."""
    return float(np.exp(_vector(nll).sum() / _vector(tokens).sum()))


def bootstrap_perplexity(
    nll: ArrayLike,
    tokens: ArrayLike,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of the token-weighted perplexity; what is resampled are documents, with all their tokens.

    ``nll`` [n] is the negative log-likelihood of each document in nats, ``tokens`` [n] its number of tokens.
    """
    return _percentiles(np.exp(_log_perplexities(nll, tokens, seed, resamples)), confidence)


def bootstrap_geometric_mean(
    domains: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of the geometric mean of the domains' perplexities: domain -> (nll, tokens) of its documents.

    The documents of each domain are resampled among themselves, each with a seed of its own.
    """
    logs = [_log_perplexities(nll, tokens, seed + i, resamples) for i, (nll, tokens) in enumerate(domains.values())]
    return _percentiles(np.exp(np.mean(logs, axis=0)), confidence)


def jackknife(value: float, leave_one_out: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Normal interval around ``value`` with the delete-one jackknife's standard error (Tukey 1958).

    For statistics that resampling with replacement would bias, such as a share of distinct items.
    """
    left_out = _vector(leave_one_out)
    n = left_out.size
    error = float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2)))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return value - half, value + half
