"""The best assignment of rows to columns where the values are known within bounds, proven or not found."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

_SWEEPS = 100  # until prices settle; where they do at all, a few are enough
_MOST_EXACT = 0.1  # of all values: where more of them matter, all may as well be exact


def proven_best(
    values: np.ndarray, bounds: np.ndarray, exact: Callable[[np.ndarray, np.ndarray], np.ndarray], margin: float
) -> np.ndarray | None:
    """The one order (n,) of the columns with which the sum of row i's value in column ``order[i]`` is largest; None
    where that is not certain.

    The true values are within ``bounds`` (n, n) of ``values`` (n, n), and within a quarter of ``margin`` of
    ``exact(rows, columns)`` (s,). All are float64; ``margin`` is positive, and far above the rounding of their sums.

    Whoever knows a better order leads rows around a cycle, each to the column of the next. No cycle gains anything, or
    loses nothing, if there are prices (n,) such that each step loses more than the price rises by. The prices of the
    best order of ``values`` tell which steps lose so little that the bound of their value matters. These values are
    asked for, and prices sought that hold for whatever the others may be.
    """
    order = linear_sum_assignment(values, maximize=True)[1]
    n = len(order)
    of_owner = np.take(values, order, axis=1)
    bounds = np.take(bounds, order, axis=1)
    lost = of_owner.diagonal()[:, None] - of_owner + margin  # [i, j]: by row i, in the column of row j
    prices, _ = _settled(lost, np.zeros(n))
    matters = lost + (prices[:, None] - prices) <= 2.0 * bounds
    np.fill_diagonal(matters, True)
    rows, owners = matters.nonzero()
    if len(rows) > 4 * n + _MOST_EXACT * n * n:  # the diagonal, and a step to every row that prices have lowered
        return None
    of_owner[rows, owners] = exact(rows, order[owners])
    bounds[rows, owners] = 0.0
    lost = of_owner.diagonal()[:, None] - of_owner - bounds - margin
    np.fill_diagonal(lost, 0.0)
    return order if _settled(lost, prices)[1] else None


def _settled(costs: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, bool]:
    """Prices (n,) with prices[j] <= prices[i] + costs[i, j], found by lowering the given ones; and whether there are.

    There are none where a cycle of ``costs`` (n, n) sums to less than 0 (Bellman and Ford).
    """
    prices = prices.copy()
    lowered = np.arange(len(prices))
    for _ in range(_SWEEPS):
        before = prices.copy()
        for row in lowered:
            np.minimum(prices, prices[row] + costs[row], out=prices)
        lowered = np.flatnonzero(prices < before)
        if not len(lowered):
            return prices, True
    return prices, False
