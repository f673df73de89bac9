"""Tests of differences: p-values, the smallest detectable difference, and what more it would take to see one.

Numbers in, numbers out: nothing here knows a record. Two-sided at 5 % and with 80 % power unless said otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, stdtr, stdtrit

ALPHA, POWER = 0.05, 0.8
PERMUTATIONS = 20_000  # drawn where all of them are too many
ALL_PERMUTATIONS = 5040  # as many as are all tried


@dataclass(frozen=True)
class Comparison:
    """An effect (a difference, or a sum of weighted scores) with its interval and what tests of it need.

    ``error`` is the standard error with ``df`` degrees of freedom (infinite: normal); ``seed_error`` is the part of it
    that comes from the spread over seeds, which more items do not shrink. ``n`` items stand behind it. ``exact`` holds
    the one-sided p-values against 0 (that it is greater, that it is less) where an exact test gives them; other tests
    are Student's. ``seeds`` counts the seeds of each cell; ``paired`` says whether the effect was taken item by item.
    ``plain`` holds the interval of independent items where items share a template and that made the error larger.
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
    plain: tuple[float, float] | None = None

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

    def p_within(self, margin: float) -> float:
        """The larger of two one-sided tests, that the effect is above ``-margin`` and below ``margin`` (Schuirmann,
        Journal of Pharmacokinetics and Biopharmaceutics 15, 1987): small where it lies inside."""
        return max(self.p_above(-margin), self.p_below(margin))

    @property
    def p(self) -> float:
        """Two-sided, against no effect."""
        return two_sided(self.p_above(), self.p_below())

    def _tail(self, distance: float) -> float:
        if self.error > 0:
            return float(stdtr(self.df, -distance / self.error)) if math.isfinite(self.error) else 1.0
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
    middle, half = effect if centre is None else centre, float(stdtrit(df, 1 - ALPHA / 2)) * error if error else 0.0
    low, high = min(middle - half, effect), max(middle + half, effect)
    return (low, high) if bounds is None else (max(low, bounds[0]), min(high, bounds[1]))


def satterthwaite(variances: Sequence[float], dfs: Sequence[float]) -> float:
    """Degrees of freedom of a sum of independent variance estimates (Biometrics Bulletin 2, 1946)."""
    total = sum(variances)
    if total <= 0 or not math.isfinite(total):
        return math.inf
    spread = sum((variance / total) ** 2 / df for variance, df in zip(variances, dfs, strict=True) if variance > 0)
    return 1 / spread if spread > 0 else math.inf


def rank_correlation(x: ArrayLike, y: ArrayLike) -> Comparison:
    """Spearman's rho of at least four points, tested by permuting one side (all ways up to 5,040, else 20,000 drawn).

    The points are a list, or a table (R, C) whose rows and columns have something in common, such as cells and layers.
    Of a table whole rows and whole columns are permuted, which is exact where these are exchangeable (Mantel's and the
    quadratic assignment test do the same with square ones): of points that share a row, one says what others do.

    The interval is Bonett and Wright's (Psychometrika 65, 2000): atanh(rho) has the standard error
    sqrt((1 + rho^2 / 2) / (n - 3)), with the effective number of points, 1 + 1 / the variance of rho over all
    permutations, as n (Clifford, Richardson and Hemon, Biometrics 45, 1989); of a list, that is the number of points.
    Of a rho of 1 it reaches down from the next that so many ranks can have. Where 3 or fewer are effective it is
    everything, as it is where one side does not vary; rho is 0 there. ``error`` is the root of that variance.

    Raises ValueError for fewer points or tables that differ in shape.
    """
    first, second = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (x, y))
    n = first.size
    if n < 4 or first.shape != second.shape:
        raise ValueError(f"a rank correlation needs at least four pairs, not {n}")
    one, other = _standard_ranks(first), _standard_ranks(second)
    variance = 0.0 if one is None or other is None else _permutation_variance(one, other)
    if one is None or other is None or variance < 1e-12:
        return Comparison(0.0, -1.0, 1.0, 1 / math.sqrt(n - 1), math.inf, n, exact=(1.0, 1.0))
    rho = float(np.sum(one * other))
    rows, columns, drawn = _permutations(*first.shape)
    by_chance = other[rows[:, :, None], columns[:, None, :]].reshape(len(rows), -1) @ one.ravel()
    above, below = (
        float((np.sum(side * by_chance >= side * rho - 1e-9) + drawn) / (len(rows) + drawn)) for side in (1, -1)
    )
    low, high = -1.0, 1.0
    effective = 1 + 1 / variance
    if effective > 3 + 1e-9:
        largest = 1 - 12 / (n * (n**2 - 1))
        middle = math.atanh(min(largest, max(-largest, rho)))
        low, high = interval(middle, math.sqrt((1 + rho**2 / 2) / (effective - 3)), math.inf)
        low, high = min(rho, math.tanh(low)), max(rho, math.tanh(high))
    return Comparison(rho, low, high, math.sqrt(variance), math.inf, n, exact=(above, below))


def arrangements(rows: int, columns: int) -> int:
    """How many ways there are to permute whole rows and whole columns: no p-value can be below one over that."""
    return math.factorial(rows) * math.factorial(columns)


def _permutations(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(N, rows) and (N, columns), and 1 if they are drawn at random: then the order as it is counts as one of them."""
    if arrangements(rows, columns) <= ALL_PERMUTATIONS:
        pairs = list(product(permutations(range(rows)), permutations(range(columns))))
        return np.array([one for one, _ in pairs]), np.array([other for _, other in pairs]), 0
    generator = np.random.default_rng(0)
    of_columns, of_rows = (
        generator.permuted(np.tile(np.arange(size), (PERMUTATIONS, 1)), axis=1) for size in (columns, rows)
    )
    return of_rows, of_columns, 1


def _permutation_variance(one: np.ndarray, other: np.ndarray) -> float:
    """Variance of <one, other> over all permutations of whole rows and columns of centred tables (R, C).

    Means of rows, means of columns and what is left permute each in its own space, irreducibly, so by Schur's lemma
    each adds the product of the squared lengths over its dimension: R - 1, C - 1 and the product of the two.
    """
    rows, columns = one.shape
    squares = []
    for table in (one, other):
        of_rows = np.broadcast_to(table.mean(1, keepdims=True), table.shape)
        of_columns = np.broadcast_to(table.mean(0, keepdims=True), table.shape)
        squares.append([float(np.sum(part**2)) for part in (of_rows, of_columns, table - of_rows - of_columns)])
    dimensions = (rows - 1, columns - 1, (rows - 1) * (columns - 1))
    return sum(a * b / size for a, b, size in zip(*squares, dimensions, strict=True) if size)


def _standard_ranks(values: np.ndarray) -> np.ndarray | None:
    """Ranks, ties sharing their mean, centred and of length 1, so that their product is rho; None if all are equal."""
    array = values.ravel()
    ranks = (array[:, None] > array).sum(axis=1) + ((array[:, None] == array).sum(axis=1) + 1) / 2
    ranks -= ranks.mean()
    length = float(np.sqrt(ranks @ ranks))
    return (ranks / length).reshape(values.shape) if length > 0 else None
