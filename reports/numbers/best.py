"""Which row of a ratio is the best for certain: what tables print in bold."""

import math
from collections.abc import Sequence
from itertools import groupby

from reports.numbers.contrasts import Comparer
from reports.numbers.load import Row
from reports.numbers.measures import Results
from reports.numbers.paired import ALPHA
from reports.numbers.statistics import Measure

BOLD_NOTE = (
    "bold is the best at its ratio where it differs significantly from the second best (by the tests of this report, p "
    "multiplied by the number of pairs of rows of the ratio, since the same data picked the two)"
)


def clearly_best(results: Results, rows: Sequence[Row], measure: Measure, comparer: Comparer) -> set[int]:
    """Places in ``rows`` of those that are significantly better than the second best of their ratio.

    Rows that were repaired from calibration text compete among themselves (``Row.level``).

    p is two-sided, below 0.05 and Bonferroni-corrected for all pairs of the ratio's rows that have the measure. Rows
    further down are not asked: a poor one with few seeds may spread so widely that nothing differs from it for certain.
    The uncompressed model does not compete, nor a row without a finite value, nor one alone at its ratio.
    """
    values = {
        place: result.estimate.value
        for place, row in enumerate(rows)
        if row is not results.panel.baseline
        and (result := results.get(row, measure)) is not None
        and math.isfinite(result.estimate.value)
    }
    best = set()
    for _, group in groupby(sorted(values, key=lambda place: rows[place].level), key=lambda place: rows[place].level):
        places = sorted(group, key=values.__getitem__, reverse=measure.higher_is_better)
        if len(places) > 1:
            found = comparer.difference(measure, rows[places[0]], rows[places[1]])
            if found is not None and found.p * len(places) * (len(places) - 1) / 2 < ALPHA:
                best.add(places[0])
    return best
