"""Tests of differences: p-values, the smallest detectable difference, and what more it would take to see one.

Numbers in, numbers out: nothing here knows a record. Two-sided at 5 % and with 80 % power unless said otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy.special import bdtr, stdtr, stdtrit

ALPHA, POWER = 0.05, 0.8
PERMUTATIONS = 20_000  # drawn where all of them are too many
ALL_PERMUTATIONS = 7  # pairs up to which every permutation is tried


@dataclass(frozen=True)
class Comparison:
    """An effect (a difference, or a sum of weighted scores) with its interval and what tests of it need.

    ``error`` is the standard error with ``df`` degrees of freedom (infinite: normal); ``seed_error`` is the part of it
    that comes from the spread over seeds, which more items do not shrink. ``n`` items stand behind it. ``exact`` holds
    the one-sided p-values against 0 (that it is greater, that it is less) where an exact test gives them; other tests
    are Student's. ``seeds`` counts the seeds of each cell; ``paired`` says whether the effect was taken item by item.
    """

    effect: float
    low: float
    high: float
    error: float
    df: float
    n: int
    seeds: tuple[int, ...] = (1,)
    seed_error: float = 0.0
    paired: bool = True
    exact: tuple[float, float] | None = None

    def p_above(self, threshold: float = 0.0) -> float:
        """One-sided: small where the effect is greater than the threshold."""
        if self.exact is not None and threshold == 0.0:
            return self.exact[0]
        return self._tail(self.effect - threshold)

    def p_below(self, threshold: float = 0.0) -> float:
        """One-sided: small where the effect is less than the threshold."""
        if self.exact is not None and threshold == 0.0:
            return self.exact[1]
        return self._tail(threshold - self.effect)

    @property
    def p(self) -> float:
        """Two-sided, against no effect."""
        return two_sided(self.p_above(), self.p_below())

    def _tail(self, distance: float) -> float:
        if self.error > 0:
            return float(stdtr(self.df, -distance / self.error))
        # All items agree: the chance that as many fair coins fall alike (the sign-flip test's smallest p-value).
        return 0.5**self.n if distance > 0 else 1.0

    def detectable(self, alpha: float = ALPHA, power: float = POWER) -> float:
        """The effect that a test of this error finds significant with that power: (t_(1-alpha/2) + t_power) * error."""
        return float(stdtrit(self.df, 1 - alpha / 2) + stdtrit(self.df, power)) * self.error

    def items_needed(self, threshold: float = 0.0, alpha: float = ALPHA, power: float = POWER) -> float:
        """Items at which an effect as far from the threshold as this one would be significant with that power.

        Infinite where it lies on the threshold, or where the spread over seeds alone is too wide: then more seeds are
        what is missing (``seeds_needed``). Never fewer than there are.
        """
        if not 0 < self.error < math.inf:
            return math.inf
        wanted = abs(self.effect - threshold) * self.error / self.detectable(alpha, power)
        left = wanted**2 - self.seed_error**2
        if left <= 0:
            return math.inf
        return max(float(self.n), math.ceil(self.n * (self.error**2 - self.seed_error**2) / left))

    def seeds_needed(self, threshold: float = 0.0, alpha: float = ALPHA, power: float = POWER) -> float:
        """Seeds of the cell that has most at which it would, with as many items; infinite where 10,000 are too few.

        Counts with the degrees of freedom that so many seeds would have, so one more seed can be what is missing.
        """
        have, items = max(self.seeds), self.error**2 - self.seed_error**2
        if have < 2 or self.seed_error == 0:
            return math.inf
        for seeds in (*range(have + 1, 200), *range(200, 10_001, 100)):
            spread = self.seed_error**2 * have / seeds
            df = (items + spread) ** 2 / (spread**2 / (seeds - 1))
            quantiles = float(stdtrit(df, 1 - alpha / 2) + stdtrit(df, power))
            if quantiles * math.sqrt(items + spread) <= abs(self.effect - threshold):
                return float(seeds)
        return math.inf


def two_sided(above: float, below: float) -> float:
    """Twice the smaller of two one-sided p-values, at most 1."""
    return min(1.0, 2 * min(above, below))


def mcnemar(first: int, second: int) -> tuple[float, float]:
    """Exact one-sided p-values, that the first is better and that it is worse (Psychometrika 12, 1947; binomial).

    ``first`` and ``second`` count the items that only the first and only the second of two cells answered.
    """
    total = first + second
    return (float(bdtr(second, total, 0.5)), float(bdtr(first, total, 0.5))) if total else (1.0, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down rule (Scandinavian Journal of Statistics 6, 1979)."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def interval(
    effect: float, error: float, df: float, centre: float | None = None, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """95 %: ``centre`` (the effect, unless the error belongs to a shrunken one) +- t * error, cut at the bounds."""
    middle, half = effect if centre is None else centre, float(stdtrit(df, 1 - ALPHA / 2)) * error
    low, high = min(middle - half, effect), max(middle + half, effect)
    return (low, high) if bounds is None else (max(low, bounds[0]), min(high, bounds[1]))


def satterthwaite(variances: Sequence[float], dfs: Sequence[float]) -> float:
    """Degrees of freedom of a sum of independent variance estimates (Biometrics Bulletin 2, 1946)."""
    total = sum(variances)
    if total <= 0:
        return math.inf
    spread = sum((variance / total) ** 2 / df for variance, df in zip(variances, dfs, strict=True) if variance > 0)
    return 1 / spread if spread > 0 else math.inf


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Comparison:
    """Spearman's rho of at least four pairs, tested by permuting one side (all ways up to 7 pairs, else 20,000 drawn).

    The interval is Bonett and Wright's (Psychometrika 65, 2000): atanh(rho) has the standard error
    sqrt((1 + rho^2 / 2) / (n - 3)). ``error`` is that of rho where there is no correlation, 1 / sqrt(n - 1). Raises
    ValueError for fewer pairs; where one side does not vary, rho is 0 and its interval everything.
    """
    n = len(x)
    if n < 4 or len(y) != n:
        raise ValueError(f"a rank correlation needs at least four pairs, not {n}")
    first, second = _standard_ranks(x), _standard_ranks(y)
    null_error = 1 / math.sqrt(n - 1)
    if first is None or second is None:
        return Comparison(0.0, -1.0, 1.0, null_error, math.inf, n, exact=(1.0, 1.0))
    rho = float(first @ second)
    if n <= ALL_PERMUTATIONS:
        orders = np.array(list(permutations(range(n))))
        drawn = 0
    else:
        generator = np.random.default_rng(0)
        orders = generator.permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1)
        drawn = 1  # the order as it is counts among those drawn
    by_chance = second[orders] @ first
    above, below = (
        float((np.sum(side * by_chance >= side * rho - 1e-9) + drawn) / (len(orders) + drawn)) for side in (1, -1)
    )
    low = high = rho
    if abs(rho) < 1 - 1e-9:
        low, high = interval(math.atanh(rho), math.sqrt((1 + rho**2 / 2) / (n - 3)), math.inf)
        low, high = math.tanh(low), math.tanh(high)
    return Comparison(rho, low, high, null_error, math.inf, n, exact=(above, below))


def _standard_ranks(values: Sequence[float]) -> np.ndarray | None:
    """Ranks, ties sharing their mean, centred and of length 1, so that their product is rho; None if all are equal."""
    array = np.asarray(values, dtype=np.float64)
    ranks = (array[:, None] > array).sum(axis=1) + ((array[:, None] == array).sum(axis=1) + 1) / 2
    ranks -= ranks.mean()
    length = float(np.sqrt(ranks @ ranks))
    return ranks / length if length > 0 else None
