"""Differences from the baseline, as tables show them: the effect and interval of its test, on the scale of scores.

A page has one interval for one quantity, so a difference is the contrast of two cells (``reports.numbers.contrasts``).
Perplexities are compared by their logarithm; their difference is the baseline's times what the factor and its ends add.
"""

import math
from collections.abc import Sequence

from harness.contracts.record import Record
from reports.numbers.contrasts import Comparer
from reports.numbers.load import Row
from reports.numbers.statistics import Estimate, Items, Measure, estimate


def difference(
    measure: Measure,
    records: Sequence[Record],
    baseline: Record,
    items: Sequence[Items | None] = (),
    baseline_items: Items | None = None,
) -> Estimate | None:
    """The measure of the cells (one a seed) less that of the baseline; None where a score is missing.

    ``items`` holds the samples of each of ``records``.
    """
    kept = tuple(items) if len(items) == len(records) else (None,) * len(records)
    rows = (Row("", 0.0, "", tuple(records), kept), Row("", 0.0, "", (baseline,), (baseline_items,)))
    return row_difference(measure, *rows, Comparer())


def row_difference(measure: Measure, row: Row, baseline: Row, comparer: Comparer) -> Estimate | None:
    """The same of rows; without an interval where a score is not finite."""
    ours, base = estimate(measure, row.records), estimate(measure, baseline.records)
    if ours is None or base is None:
        return None
    found = comparer.difference(measure, row, baseline)
    if found is None:
        value = ours.value - base.value
        return None if math.isfinite(value) else Estimate(value, math.nan, math.nan, ours.n, ours.seeds)
    value, low, high = found.effect, found.low, found.high
    if measure.kind == "perplexity":
        value, low, high = (base.value * math.expm1(min(end, 700.0)) for end in (value, low, high))
    return Estimate(value, low, high, found.n, ours.seeds, found.paired)
