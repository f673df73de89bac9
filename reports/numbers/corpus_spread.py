"""How much a method depends on its calibration corpus: the standard deviation over corpora of what it scores.

The same items are scored after calibration on each corpus, so errors are paired. The spread s of the scores x_c over C
corpora is itself a contrast of cells, the sum of g_c x_c with g_c = (x_c - mean) / ((C - 1) s), and these weights are
its derivatives: the error of that contrast over items is the spread's (delta method). The difference of two
methods' spreads is that of two such contrasts. Noise in the scores makes a spread too large, a small one more so.
"""

from collections.abc import Sequence

import numpy as np

from reports.numbers.contrasts import Comparer, Term
from reports.numbers.load import Row
from reports.numbers.paired import Comparison
from reports.numbers.statistics import Measure


def spread_terms(comparer: Comparer, measure: Measure, rows: Sequence[Row]) -> list[Term] | None:
    """The spread over rows, each calibrated on another corpus, as a contrast; None for fewer than two or where a score
    is missing.

    Perplexity counts by its logarithm. Rows that all score the same have the spread 0 and equal weights of 0.
    """
    values = [comparer.value(measure, row) for row in rows]
    known = [value for value in values if value is not None]
    if len(rows) < 2 or len(known) < len(rows):
        return None
    scores = np.array(known)
    apart = scores - scores.mean()
    spread = float(scores.std(ddof=1))
    weights = apart / ((len(rows) - 1) * spread) if spread > 0 else np.zeros(len(rows))
    return [Term(float(weight), measure, row) for weight, row in zip(weights, rows, strict=True)]


def corpus_spread(comparer: Comparer, measure: Measure, rows: Sequence[Row]) -> Comparison | None:
    """The spread with its error and interval; None as for ``spread_terms`` or where rows cannot be compared."""
    terms = spread_terms(comparer, measure, rows)
    return None if terms is None else comparer.compare(terms)


def spread_difference(
    comparer: Comparer, measure: Measure, first: Sequence[Row], second: Sequence[Row]
) -> Comparison | None:
    """The spread of the first rows less that of the second, paired over the items of all."""
    one, other = (spread_terms(comparer, measure, rows) for rows in (first, second))
    if one is None or other is None:
        return None
    return comparer.compare([*one, *(Term(-term.weight, term.measure, term.row) for term in other)])
