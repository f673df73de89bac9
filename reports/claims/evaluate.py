"""Claims of the literature, tested on the records of a sweep: the tests and the verdicts.

A claim is data (``reports/claims/list.py``): what it says, where it was claimed, and one of four tests, in the words of
``reports/claims/vocabulary.py``. Every test gives two one-sided p-values, that the claim holds and that its contrary
does. The verdict:

- p is twice the smaller of the two, corrected by Holm's rule over all claims that could be tested.
- *holds* or *does not hold* where that is below 0.05, by the side which is the smaller.
- *undecided* otherwise, with the items (or seeds) that an effect as large as the one seen would need for 80 % power
  at the level of a single claim, 0.05 over their number.
- *not tested* where a cell is missing, broken or without the score: which, and the command that runs it.

Layers are no sample: a model has those that it has. A contrast of numbers that each layer has is tested on the samples
behind them (``reports.numbers.layer_samples``), and where these are not known, or layers are what is ranked, the
verdict is undecided as long as they are too few, and says so.

A claim of several contrasts holds if all do (its p-value is their largest), and does not hold if one of them
certainly does not (the smallest, times their number). A count of what a plan contains is no sample: it has no p-value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from reports.claims.selection import Cell, matches
from reports.claims.vocabulary import (
    CHOICE,
    GENERATION,
    PERPLEXITY,
    AllAbove,
    Claim,
    Contrast,
    FewLargeGroups,
    RanksDiffer,
    RanksFollow,
    said,
)
from reports.numbers.broken import faults
from reports.numbers.contrasts import EACH, Comparer, Term
from reports.numbers.layer_samples import NO_MORE, PARTS, of_layers, unit_of
from reports.numbers.load import Panel, Row
from reports.numbers.measures import averages, reference_columns
from reports.numbers.paired import ALL_PERMUTATIONS, ALPHA, Comparison, arrangements, holm, rank_correlation, two_sided
from reports.numbers.probes import LAYERS
from reports.numbers.statistics import Measure
from reports.tables.comparisons import effect_text, reverse, size_text
from reports.tables.formats import format_value

HOLDS, FAILS, UNDECIDED, NOT_TESTED = "holds", "does not hold", "undecided", "not tested"
NOT_RUN, BROKEN, NOT_MEASURED = "not run", "broken", "not measured"


@dataclass(frozen=True)
class Evidence:
    """One line of what was seen. ``comparison`` is None for counts; ``limit`` says why there cannot be more items."""

    name: str
    kind: str
    threshold: float
    comparison: Comparison | None
    text: str
    unit: str = "items"
    limit: str = ""


@dataclass(frozen=True)
class Missing:
    cell: Cell
    why: str


@dataclass(frozen=True)
class Finding:
    """A claim on a panel. ``holds`` and ``fails`` are one-sided p-values, None where nothing was tested by one."""

    claim: Claim
    panel: Panel
    evidence: tuple[Evidence, ...] = ()
    missing: tuple[Missing, ...] = ()
    holds: float | None = None
    fails: float | None = None
    verdict: str = NOT_TESTED
    p: float | None = None
    corrected: float | None = None
    more: str = ""


@dataclass
class View:
    """A panel as claims see it. ``averages`` are those over its tasks, by what claims call them."""

    panel: Panel
    measures: Mapping[str, Measure]
    comparer: Comparer = field(default_factory=Comparer)
    averages: Mapping[str, Measure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stand = averages(reference_columns(self.panel.records(), self.panel.baseline_record()))
        of_kinds = {GENERATION: stand.generative, CHOICE: stand.choice, PERPLEXITY: stand.perplexity}
        self.averages = {**stand.domains, **{name: m for name, m in of_kinds.items() if m is not None}}

    def measure(self, name: str) -> Measure:
        """Raises KeyError where the panel has no tasks of that kind or domain."""
        return self.averages[name] if name in self.averages else self.measures[name]

    def row(self, cell: Cell) -> Row | None:
        """The row of a cell, that of most seeds where several match."""
        found = [row for row in self.panel.all_rows() if matches(cell, row)]
        return max(found, key=lambda row: len(row.records)) if found else None

    def lacks(self, cell: Cell, *names: str) -> Missing | None:
        """Why the measures of a cell cannot be compared; None where they can."""
        row = self.row(cell)
        if row is None:
            return Missing(cell, NOT_RUN)
        if row.odd:
            return Missing(cell, f"was made from another {' and '.join(row.odd)} than the other cells")
        for name in names:
            if name not in self.averages and name not in self.measures:
                return Missing(cell, f"suite={self.panel.suite} has no tasks of {said(name)}")
            measure = self.measure(name)
            if self.comparer.value(measure, row) is None:
                return Missing(cell, self._why_missing(measure, row))
        return None

    def _why_missing(self, measure: Measure, row: Row) -> str:
        tasks = list(dict.fromkeys(part.task for part in measure.parts))
        broken = [fault for record in row.records for task in tasks for fault in faults(record, task)]
        if broken:
            return f"{BROKEN} ({'; '.join(broken)})"
        left_out = [why for record in row.records for task, why in record.not_measured.items() if task in tasks]
        if left_out:
            return f"{NOT_MEASURED} ({'; '.join(dict.fromkeys(left_out))})"
        if tasks == [LAYERS]:
            return f"was run without diagnostics=layers, which measures {measure.label}"
        told = (s.task for record in self.panel.records() for s in record.scores)
        if not {*tasks} & {*told}:
            return f"suite={self.panel.suite} does not measure {measure.label}"
        of = "of other cells'" if self.panel.baseline is None else "of the baseline's"
        return f"lacks a score {of}: {measure.label} is not formed over fewer tasks"

    def compare(self, contrast: Contrast) -> Comparison | None:
        terms = [(weight, self.measure(name), self.row(cell)) for weight, name, cell in contrast.terms]
        return self.comparer.compare([Term(weight, m, row) for weight, m, row in terms if row is not None])


def evaluate_claims(claims: Sequence[Claim], panels: Sequence[Panel], measures: Mapping[str, Measure]) -> list[Finding]:
    """Every claim on every panel that has what it needs; else once, on the panel that lacks least."""
    views = [View(panel, measures) for panel in panels]
    found: list[Finding] = []
    for claim in claims:
        own = [_TESTS[type(claim.test)](claim, view) for view in views]
        tested = [finding for finding in own if not finding.missing]
        wanted = [f for f in own if f.panel.suite == claim.suite] or own
        found += tested or [min(wanted, key=lambda finding: len(finding.missing))]
    return judge(found)


def judge(findings: Sequence[Finding]) -> list[Finding]:
    """The same with verdicts, p-values corrected over all of them, and what more it would take."""
    p_values = {
        place: two_sided(finding.holds, finding.fails)
        for place, finding in enumerate(findings)
        if finding.holds is not None and finding.fails is not None
    }
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    judged = []
    for place, finding in enumerate(findings):
        if place not in p_values:
            judged.append(finding)
            continue
        assert finding.holds is not None and finding.fails is not None
        sure = corrected[place] < ALPHA
        verdict = (HOLDS if finding.holds < finding.fails else FAILS) if sure else UNDECIDED
        more = "" if sure else _more(finding, ALPHA / len(p_values))
        judged.append(replace(finding, verdict=verdict, p=p_values[place], corrected=corrected[place], more=more))
    return judged


def _more(finding: Finding, level: float) -> str:
    """What would decide it: for every contrast that does not tell by itself."""
    texts = []
    for one in finding.evidence:
        c = one.comparison
        if c is None or 2 * c.p_above(one.threshold) < level:
            continue
        seen = f" (smallest detectable {size_text(one.kind, c.detectable(level))})" if math.isfinite(c.error) else ""
        texts.append(f"{one.name}: {one.limit or _needed(one, c, level) + seen}")
    return "; ".join(texts)


def _needed(one: Evidence, c: Comparison, level: float) -> str:
    needed = c.items_needed(one.threshold, level)
    if math.isfinite(needed) and one.unit == PARTS:
        return f"{max(1.1, needed / c.n):,.1f} times the calibration tokens (diagnostics.tokens)"
    if math.isfinite(needed):
        return f"{max(1, needed - c.n):,.0f} more {one.unit} than the {c.n:,}"
    if math.isfinite(seeds := c.seeds_needed(one.threshold, level)):
        return f"{seeds:,.0f} seeds instead of {max(c.seeds)}"
    if c.seed_error > 0:
        return f"more seeds than {max(c.seeds)} and more {one.unit} than the {c.n:,}"
    return f"more {one.unit}, but the effect seen is no guide to how many"


def _all_above(claim: Claim, view: View) -> Finding:
    assert isinstance(claim.test, AllAbove)
    contrasts = claim.test.contrasts
    lacking = [view.lacks(cell, name) for contrast in contrasts for _, name, cell in contrast.terms]
    missing = tuple(dict.fromkeys(one for one in lacking if one is not None))
    if missing:
        return Finding(claim, view.panel, missing=missing)
    evidence = []
    for contrast in contrasts:
        found = view.compare(contrast)
        assert found is not None  # nothing is missing
        measure = view.measure(contrast.terms[0][1])
        evidence.append(
            _over_layers(contrast, measure.kind, found, view)
            if measure.parts[0].of == EACH
            else _contrast_evidence(contrast.name, measure.kind, contrast.threshold, found)
        )
    above = [one.comparison.p_above(one.threshold) for one in evidence if one.comparison]
    below = [one.comparison.p_below(one.threshold) for one in evidence if one.comparison]
    return Finding(claim, view.panel, tuple(evidence), holds=max(above), fails=min(1.0, len(below) * min(below)))


def _contrast_evidence(name: str, kind: str, threshold: float, found: Comparison, items: str = "") -> Evidence:
    points = " points" if kind == "share" else ""
    bar = f", to be above {format_value(kind, threshold)}" if threshold else ""
    seeds = "/".join(map(str, found.seeds))
    unpaired = "" if found.paired else ", unpaired"
    text = f"{name}: {effect_text(kind, found)}{points}{bar} ({items or f'n {found.n:,}'}, seeds {seeds}{unpaired})"
    return Evidence(name, kind, threshold, found, text)


def _over_layers(contrast: Contrast, kind: str, found: Comparison, view: View) -> Evidence:
    """Says what the items of a mean over layers are, and in how many layers it is so."""
    terms = [(weight, view.measure(name).parts[0], view.row(cell)) for weight, name, cell in contrast.terms]
    rows = [row for *_, row in terms if row is not None]
    of_terms = [(weight, of_layers(part, row)) for weight, part, row in terms if row is not None]
    common = [layer for layer in of_terms[0][1] if all(layer in values for _, values in of_terms)]
    above = sum(sum(weight * values[layer] for weight, values in of_terms) > contrast.threshold for layer in common)
    unit = unit_of(terms[0][1], rows)
    items = f"n {found.n:,} {unit}; above {contrast.threshold:g} in {above} of {len(common)} layers"
    evidence = _contrast_evidence(contrast.name, kind, contrast.threshold, found, items)
    return replace(evidence, unit=unit, limit=NO_MORE.get(unit, ""))


def _ranks_follow(claim: Claim, view: View) -> Finding:
    test = claim.test
    assert isinstance(test, RanksFollow)
    lacking = [view.lacks(cell, test.first, test.second) for cell in test.cells]
    missing = tuple(one for one in lacking if one is not None)
    if missing:
        return Finding(claim, view.panel, missing=missing)
    rows = [row for cell in test.cells if (row := view.row(cell)) is not None]
    parts = [view.measure(name).parts[0] for name in (test.first, test.second)]
    first, second = ([of_layers(part, row) for row in rows] for part in parts)
    layers = [layer for layer in first[0] if all(layer in values for values in (*first, *second))]
    cells, points = len(rows), len(rows) * len(layers)
    if points < 4:
        return Finding(claim, view.panel, missing=(Missing(test.cells[0], f"{points} layers; at least 4 needed"),))
    tables = [[[values[layer] for layer in layers] for values in of_cells] for of_cells in (first, second)]
    found = rank_correlation(*tables)
    text = f"rank correlation {effect_text('number', found)} over {len(layers)} layers of {cells} cells"
    ways = arrangements(cells, len(layers))
    limit = (
        f"{cells} cells and {len(layers)} layers can be arranged in {ways:,} ways, so p is {2 / ways:.2g} at least; "
        "the model has no more layers, but other ratios and corpora would be more cells"
    )
    evidence = Evidence("rank correlation", "number", 0.0, found, text, "points", limit * (ways <= ALL_PERMUTATIONS))
    return Finding(claim, view.panel, (evidence,), holds=found.p_above(), fails=found.p_below())


def _ranks_differ(claim: Claim, view: View) -> Finding:
    test = claim.test
    assert isinstance(test, RanksDiffer)
    lacking = [view.lacks(cell, test.first, test.second) for cell in test.cells]
    cells = [cell for cell, one in zip(test.cells, lacking, strict=True) if one is None]
    if len(cells) < test.least:
        return Finding(claim, view.panel, missing=tuple(one for one in lacking if one is not None))

    def difference(name: str, one: Cell, other: Cell) -> tuple[str, str, Comparison]:
        measure = view.measure(name)
        contrast = Contrast(f"{measure.label}, {one.method} - {other.method}", ((1, name, one), (-1, name, other)))
        found = view.compare(contrast)
        assert found is not None  # nothing is missing
        return contrast.name, measure.kind, found

    def better(name: str, one: Cell, other: Cell) -> Comparison:
        found = difference(name, one, other)[2]
        return found if view.measure(name).higher_is_better else reverse(found)

    reversals: list[tuple[float, Cell, Cell]] = []
    same_order: dict[frozenset[Cell], float] = {}
    for one, other in permutations(cells, 2):
        first, second = better(test.first, one, other), better(test.second, one, other)
        reversals.append((max(first.p_above(), second.p_below()), one, other))
        agree = min(1.0, 2 * max(first.p_above(), second.p_above()))
        same_order[frozenset((one, other))] = min(agree, same_order.get(frozenset((one, other)), 1.0))
    p, winner, loser = min(reversals, key=lambda reversal: reversal[0])
    text = (
        f"clearest of {len(reversals)} possible reversals among {len(cells)} cells: {winner.method} over {loser.method}"
    )
    evidence = [Evidence("clearest reversal", "number", 0.0, None, text)]
    for name in (test.first, test.second):
        label, kind, found = difference(name, winner, loser)
        evidence.append(_contrast_evidence(label, kind, 0.0, found))
    holds = min(1.0, len(reversals) * p)
    return Finding(claim, view.panel, tuple(evidence), holds=holds, fails=max(same_order.values()))


def _few_large_groups(claim: Claim, view: View) -> Finding:
    test = claim.test
    assert isinstance(test, FewLargeGroups)
    rows = [(cell, view.row(cell)) for cell in test.cells]
    missing = tuple(
        Missing(cell, NOT_RUN if row is None else "its record has no plan")
        for cell, row in rows
        if row is None or not row.records[0].plan
    )
    if missing:
        return Finding(claim, view.panel, missing=missing)
    evidence, met = [], []
    for cell, row in rows:
        assert row is not None
        for layer, plan in row.records[0].plan.items():
            groups, largest = plan["experts"], max(plan["group_sizes"], default=1)
            alone = (groups - len(plan["group_sizes"])) / groups
            mean = plan["rows"] / groups
            met.append(alone > test.singletons and largest >= test.times_mean * mean)
            text = (
                f"{cell.method} at {cell.ratio:g}, layer {layer}: {100 * alone:.0f} % of {groups} groups are single "
                f"experts, the largest has {largest} (mean {mean:.1f})"
            )
            evidence.append(Evidence(f"layer {layer}", "share", test.singletons, None, text, "layers"))
    share = sum(met) / len(met)
    verdict = HOLDS if share >= 0.9 else FAILS if share <= 0.5 else UNDECIDED
    counted = Evidence("layers", "share", 0.9, None, f"{sum(met)} of {len(met)} layers; a count, no sample", "layers")
    return Finding(claim, view.panel, (counted, *evidence), verdict=verdict)


_TESTS: dict[type, Callable[[Claim, View], Finding]] = {
    AllAbove: _all_above,
    RanksFollow: _ranks_follow,
    RanksDiffer: _ranks_differ,
    FewLargeGroups: _few_large_groups,
}
