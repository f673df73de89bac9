"""Claims about the order of cells: two measures that rank methods alike or not, and errors against their prediction."""

import math
from dataclasses import replace

import numpy as np

from reports.claims.selection import Cell
from reports.claims.verdicts import HOLDS, REVERSED, UNDECIDED, Evidence, Finding
from reports.claims.view import Missing, View
from reports.claims.vocabulary import Claim, FollowsWithin, RanksAgree
from reports.numbers.layer_samples import of_layers
from reports.numbers.paired import Comparison, rank_correlation
from reports.tables.comparisons import effect_text


def of_ranks_agree(claim: Claim, view: View) -> Finding:
    test = claim.test
    assert isinstance(test, RanksAgree)
    seconds = test.second_cells or test.cells
    pairs = [(view.corpora.cell(one), view.corpora.cell(two)) for one, two in zip(test.cells, seconds, strict=True)]
    lacking = [(view.lacks(one, test.first), view.lacks(two, test.second)) for one, two in pairs]
    kept = [pair for pair, lack in zip(pairs, lacking, strict=True) if lack == (None, None)]
    if len(kept) < test.fewest:
        missing = dict.fromkeys(one for lack in lacking for one in lack if one is not None)
        return Finding(claim, view, missing=tuple(missing))
    measures = [view.measure(name) for name in (test.first, test.second)]
    values = np.array([[_better(view, test.first, one), _better(view, test.second, two)] for one, two in kept])
    found = rank_correlation(values[:, 0], values[:, 1])
    regions = _regions(found, test)
    direction = "above" if test.above else "below"
    text = (
        f"rank correlation of {measures[0].label} and {measures[1].label} over {len(kept)} cells: "
        f"{effect_text('number', found)}, to be {direction} {test.bar:g} ({', '.join(one.method for one, _ in kept)})"
    )
    limit = "more methods" if regions else ""
    evidence = Evidence("rank correlation", "number", found, text, unit="methods", limit=limit)
    return Finding(claim, view, (evidence,), regions=regions)


def _better(view: View, name: str, cell: Cell) -> float:
    """The measure of a cell, such that more is better."""
    measure, row = view.measure(name), view.row(cell)
    assert row is not None
    value = view.comparer.value(measure, row)
    assert value is not None
    return value if measure.higher_is_better else -value


def _regions(found: Comparison, test: RanksAgree) -> dict[str, float]:
    """One-sided p-values of atanh(rho) against that of the bar, with the standard error of the interval."""
    rho = min(0.999999, max(-0.999999, found.effect))
    n = found.n
    error = math.sqrt((1 + rho**2 / 2) / (n - 3))
    on_scale = Comparison(math.atanh(rho), 0.0, 0.0, error, math.inf, n)
    bar = math.atanh(test.bar)
    above, below = on_scale.p_above(bar), on_scale.p_below(bar)
    return {HOLDS: above, REVERSED: below} if test.above else {HOLDS: below, REVERSED: above}


def of_follows_within(claim: Claim, view: View) -> Finding:
    """Counts pairs of layers of one cell that both measures put in the same order; a model's layers are no sample."""
    test = claim.test
    assert isinstance(test, FollowsWithin)
    cells = [view.corpora.cell(cell) for cell in test.cells]
    missing = tuple(one for cell in cells if (one := view.lacks(cell, test.first, test.second)) is not None)
    if missing:
        return Finding(claim, view, missing=missing)
    evidence: list[Evidence] = []
    agree = total = layers = 0
    for cell in cells:
        row = view.row(cell)
        assert row is not None
        first, second = (of_layers(view.measure(name).parts[0], row) for name in (test.first, test.second))
        common = [layer for layer in first if layer in second]
        layers = max(layers, len(common))
        pairs = [(a, b) for place, a in enumerate(common) for b in common[:place]]
        own = sum((first[a] - first[b]) * (second[a] - second[b]) > 0 for a, b in pairs)
        agree, total = agree + own, total + len(pairs)
        factors = ", ".join(f"layer {layer} ×{second[layer] / first[layer]:.1f}" for layer in common if first[layer])
        text = f"{cell.method} at {cell.ratio:g}: {own} of {len(pairs)} pairs of layers in order; measured is {factors}"
        evidence.append(Evidence(f"{cell.method} at {cell.ratio:g}", "number", None, f"{text} of the predicted"))
    if not total:
        return Finding(claim, view, missing=(Missing(cells[0], "has fewer than two layers with a prediction"),))
    share = agree / total
    verdict = UNDECIDED if layers < 4 else HOLDS if share >= 0.9 else REVERSED if share <= 0.5 else UNDECIDED
    counted = f"{agree} of {total} pairs of layers within a method and ratio in the predicted order; a count, no sample"
    first_line = Evidence("order", "share", None, counted)
    more = f"{layers} layers are too few to rank within a cell" if layers < 4 else ""
    return replace(Finding(claim, view, (first_line, *evidence)), verdict=verdict, more=more)
