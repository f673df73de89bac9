"""Claims that one method depends more on its calibration corpus than others (``reports.numbers.corpus_spread``)."""

from collections.abc import Sequence
from dataclasses import replace

from reports.claims.contrasting import contrast_text
from reports.claims.selection import Cell
from reports.claims.verdicts import Evidence, Finding, combined
from reports.claims.view import Missing, View
from reports.claims.vocabulary import Claim, Contrast, DependsMost
from reports.numbers.corpus_spread import corpus_spread, spread_terms
from reports.numbers.load import Row
from reports.tables.comparisons import size_text
from reports.tables.formats import format_list


def of_depends_most(claim: Claim, view: View) -> Finding:
    """The spread of the method less that of each other which was run on all the corpora."""
    test = claim.test
    assert isinstance(test, DependsMost)
    cells = {method: test.cells_of(method) for method in (test.method, *test.others)}
    lacking = {
        method: [one for cell in own if (one := view.lacks(cell, test.measure)) is not None]
        for method, own in cells.items()
    }
    others = [method for method in test.others if not lacking[method]]
    if lacking[test.method] or len(others) < test.fewest:
        every = dict.fromkeys(one for own in lacking.values() for one in own)
        return Finding(claim, view, missing=tuple(every))
    evidence = []
    for other in others:
        contrast = _contrast(test, cells[test.method], cells[other], other, view)
        found = view.compare(contrast)
        if found is None:
            why = "was not made from the same items or text as the other cells"
            return Finding(claim, view, missing=(Missing(cells[other][0], why),))
        kind = view.measure(test.measure).kind
        spreads = [f"{name} {_spread(view, test, cells[name])}" for name in (test.method, other)]
        text = f"{contrast_text(contrast, kind, found)}; over {format_list(test.corpora)}: {', '.join(spreads)}"
        # The corpora are what is compared: there is nothing to show by corpus.
        evidence.append(Evidence(contrast.name, kind, found, text, replace(contrast, terms=())))
    return Finding(claim, view, tuple(evidence), regions=combined(evidence))


def _rows(view: View, cells: Sequence[Cell]) -> list[Row]:
    rows = [view.row(cell) for cell in cells]
    return [row for row in rows if row is not None]


def _contrast(test: DependsMost, first: Sequence[Cell], second: Sequence[Cell], other: str, view: View) -> Contrast:
    """The difference of two spreads, as the contrast that it is near the scores that were seen."""
    measure = view.measure(test.measure)
    weighted = []
    for sign, cells in ((1.0, first), (-1.0, second)):
        terms = spread_terms(view.comparer, measure, _rows(view, cells))
        assert terms is not None  # no score is missing
        weighted += [(sign * term.weight, test.measure, cell) for term, cell in zip(terms, cells, strict=True)]
    return Contrast(f"spread over corpora, {test.method} - {other}", tuple(weighted), test.margin)


def _spread(view: View, test: DependsMost, cells: Sequence[Cell]) -> str:
    measure = view.measure(test.measure)
    found = corpus_spread(view.comparer, measure, _rows(view, cells))
    if found is None:
        return "not comparable"
    ends = (size_text(measure.kind, max(0.0, end)) for end in (found.low, found.high))
    return f"{size_text(measure.kind, found.effect)} [{', '.join(ends)}]"
