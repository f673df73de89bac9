"""Verdicts by a margin: holds, reversed, negligible, undecided; and what would decide.

A contrast of effect d with the margin m (the smallest effect that matters) has up to four one-sided p-values:

- *holds*: d > m (or d > the size that was stated; or, for a loss of at most b, d > -b).
- *reversed*: d < -m, the opposite of what is said.
- *negligible*: -m < d < m, by two one-sided tests.
- *smaller than said*, where a size was stated: d is below it.

Of these regions an effect is in one (smaller than said holds reversed and negligible within it), so twice the one-sided
p-value keeps the level whichever of them is asserted, and what is asserted at 5 % is what the 95 % interval shows: it
lies in the region. A claim of several contrasts holds if all do (the largest p-value), and is reversed, negligible or
smaller if one of them is (the smallest, times their number); of a claim that some contrast is so, the other way round.

p-values are corrected by Holm's rule over all claims that were tested by one. What is smaller than said is called
reversed or negligible where that too is certain at Bonferroni's level.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from reports.claims.view import Missing, View
from reports.claims.vocabulary import Claim, Contrast
from reports.numbers.layer_samples import PARTS
from reports.numbers.load import Panel
from reports.numbers.paired import ALPHA, Comparison, holm
from reports.tables.comparisons import detectable_text

HOLDS, REVERSED, NEGLIGIBLE, SMALLER = "holds", "reversed", "negligible", "smaller than said"
UNDECIDED, NOT_TESTED = "undecided", "not tested"
_MOST_TIMES = 200  # as many items as no one will score
VERDICTS = (HOLDS, REVERSED, NEGLIGIBLE, SMALLER, UNDECIDED, NOT_TESTED)


@dataclass(frozen=True)
class OfCorpus:
    """A contrast on one corpus (or by one rule), and the same of each domain; None where cells are missing."""

    corpus: str
    whole: Comparison | None
    parts: Mapping[str, Comparison | None]
    of: str = ""


@dataclass(frozen=True)
class Evidence:
    """One line of what was seen. ``comparison`` is None for counts; ``limit`` says why there cannot be more items.

    ``verdict`` is the contrast's own, corrected as the claim's; ``corpora`` hold it on other corpora, the claim's
    first; ``alone`` names the domain without which it would not be so.
    """

    name: str
    kind: str
    comparison: Comparison | None
    text: str
    contrast: Contrast | None = None
    unit: str = "items"
    limit: str = ""
    verdict: str = ""
    corpora: tuple[OfCorpus, ...] = ()
    alone: str = ""

    def p_values(self) -> dict[str, float]:
        """Region -> its one-sided p-value."""
        contrast, c = self.contrast, self.comparison
        if contrast is None or c is None:
            return {}
        found = {HOLDS: c.p_above(contrast.bar)}
        if contrast.least is not None:
            found[SMALLER if contrast.least > 0 else REVERSED] = c.p_below(contrast.least)
        if contrast.least is None or contrast.least > 0:
            found |= {REVERSED: c.p_below(-contrast.margin), NEGLIGIBLE: c.p_within(contrast.margin)}
        return found


@dataclass(frozen=True)
class Finding:
    """A claim on a panel. ``regions`` holds one-sided p-values by verdict, empty where nothing was tested by one."""

    claim: Claim
    view: View
    evidence: tuple[Evidence, ...] = ()
    missing: tuple[Missing, ...] = ()
    regions: Mapping[str, float] | None = None
    verdict: str = NOT_TESTED
    p: float | None = None
    corrected: float | None = None
    more: str = ""

    @property
    def panel(self) -> Panel:
        return self.view.panel


def combined(evidence: Sequence[Evidence], some: bool = False) -> dict[str, float]:
    """The one-sided p-values of a claim of several contrasts, by region."""
    own = [one.p_values() for one in evidence]
    names = {name for each in own for name in each}
    found = {}
    for name in names:
        values = [each.get(name, 1.0) for each in own]
        # "All hold" needs each of them; its contrary is one that is not so. "Some hold" the other way round.
        found[name] = max(values) if (name == HOLDS) != some else min(1.0, len(values) * min(values))
    return found


def main_p(regions: Mapping[str, float]) -> float:
    """Two-sided: of what is asserted first."""
    asserted = [HOLDS, SMALLER] if SMALLER in regions else list(regions)
    return min(1.0, 2 * min(regions[name] for name in asserted))


def verdict_of(regions: Mapping[str, float], sure: bool, level: float) -> str:
    """``sure``: whether ``main_p`` is significant; ``level``: of what refines it."""
    if not sure:
        return UNDECIDED
    asserted = [HOLDS, SMALLER] if SMALLER in regions else list(regions)
    verdict = min(asserted, key=lambda name: regions[name])
    if verdict != SMALLER:
        return verdict
    finer = min((REVERSED, NEGLIGIBLE), key=lambda name: regions.get(name, 1.0))
    return finer if 2 * regions.get(finer, 1.0) < level else SMALLER


def judge(findings: Sequence[Finding]) -> list[Finding]:
    """The same with verdicts, p-values corrected over all of them, and what more it would take."""
    p_values = {place: main_p(one.regions) for place, one in enumerate(findings) if one.regions}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    level = ALPHA / max(1, len(p_values))
    judged = []
    for place, finding in enumerate(findings):
        if not finding.regions:
            judged.append(finding)
            continue
        sure = corrected[place] < ALPHA
        verdict = verdict_of(finding.regions, sure, level)
        evidence = tuple(_judged(one, level) for one in finding.evidence)
        more = _more(replace(finding, evidence=evidence), level) if verdict == UNDECIDED else ""
        judged.append(
            replace(
                finding, verdict=verdict, p=p_values[place], corrected=corrected[place], more=more, evidence=evidence
            )
        )
    return judged


def _judged(one: Evidence, level: float) -> Evidence:
    own = one.p_values()
    return replace(one, verdict=verdict_of(own, main_p(own) < level, level)) if own else one


def _more(finding: Finding, level: float) -> str:
    """What would decide it: for every contrast that does not tell by itself."""
    texts = []
    for one in finding.evidence:
        c, contrast = one.comparison, one.contrast
        if contrast is None and one.limit:
            texts.append(f"{one.name}: {one.limit}")
        if c is None or contrast is None or one.verdict == HOLDS:
            continue
        near = nearest_bound(contrast, c.effect)
        texts.append(
            f"{one.name}: {_direction(one)}{one.limit or _needed(one, c, near, level)}{_detectable(one, level)}"
        )
    return "; ".join(texts)


def nearest_bound(contrast: Contrast, effect: float) -> float:
    """The end of the region that the effect lies in which is nearest to it."""
    bounds = [contrast.bar] if contrast.least is not None else [contrast.margin, -contrast.margin]
    return min(bounds, key=lambda bound: abs(bound - effect))


def _direction(one: Evidence) -> str:
    """That the sign is certain, where it is, of the interval shown."""
    c, contrast = one.comparison, one.contrast
    assert c is not None and contrast is not None
    if contrast.least is None and (c.low > 0 or c.high < 0):
        sign = "above" if c.low > 0 else "below"
        return f"{sign} 0 by its own interval, not yet beyond the margin or within it; "
    return ""


def _detectable(one: Evidence, level: float) -> str:
    c = one.comparison
    assert c is not None and one.contrast is not None
    scale = max(1.0, sum(abs(weight) for weight, *_ in one.contrast.terms) / 2)
    return f" (smallest detectable: {detectable_text(one.kind, c.detectable(level), scale)})"


def _needed(one: Evidence, c: Comparison, bound: float, level: float) -> str:
    needed = c.items_needed(bound, level)
    if math.isfinite(needed) and needed > _MOST_TIMES * c.n:
        return f"more {one.unit}, but the effect seen is too near the end of its region to tell how many"
    if math.isfinite(needed) and one.unit == PARTS:
        return f"{max(1.1, needed / c.n):,.1f} times the calibration tokens (diagnostics.tokens)"
    if math.isfinite(needed):
        return f"{max(1, needed - c.n):,.0f} more {one.unit} than the {c.n:,}"
    if math.isfinite(seeds := c.seeds_needed(bound, level)):
        return f"{seeds:,.0f} seeds instead of {max(c.seeds)}"
    if c.seed_error > 0:
        return f"more seeds than {max(c.seeds)} and more {one.unit} than the {c.n:,}"
    return f"more {one.unit}, but the effect seen is no guide to how many"
