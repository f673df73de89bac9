"""Claims of the literature, tested on the records of sweeps.

A claim is data (``reports/claims/lists``): what it says, where it was claimed, by which rule its cells are calibrated,
and one of a few tests, in the words of ``reports/claims/vocabulary.py``. Verdicts and their p-values are those of
``reports/claims/verdicts.py``. *Not tested* is a claim of which a cell is missing, broken or without the score (which,
and the command that runs it), or that no cell can test (what it would need).

A model is tested once on a claim: on the panel that lacks nothing, and of several on that of most samples. Layers are
no sample: a model has those that it has. A contrast of numbers that each layer has is tested on the samples behind them
(``reports.numbers.layer_samples``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from reports.claims.contrasting import of_contrasts, with_corpora
from reports.claims.counting import of_few_large_groups, of_kept_differ, of_long_tail, of_needs
from reports.claims.ranking import of_follows_within, of_ranks_agree
from reports.claims.spreading import of_depends_most
from reports.claims.verdicts import Finding, judge
from reports.claims.view import View
from reports.claims.vocabulary import (
    Claim,
    Contrasts,
    DependsMost,
    FewLargeGroups,
    FollowsWithin,
    KeptDiffer,
    LongTail,
    Needs,
    RanksAgree,
)
from reports.numbers.contrasts import Comparer
from reports.numbers.groupings import Groupings
from reports.numbers.load import Panel
from reports.numbers.statistics import Measure


def views_of(
    panels: Iterable[tuple[Path | None, Panel]], measures: Mapping[str, Measure], groupings: Groupings | None = None
) -> list[View]:
    return [View(panel, measures, Comparer(groupings), folder) for folder, panel in panels]


def evaluate_claims(
    claims: Sequence[Claim],
    panels: Sequence[Panel],
    measures: Mapping[str, Measure],
    folders: Sequence[Path] = (),
    groupings: Groupings | None = None,
    by_corpus: bool = True,
) -> list[Finding]:
    """Every claim on every model that has what it needs; else once, on the panel that lacks least.

    ``by_corpus``: with each contrast on every corpus and of every domain.
    """
    places: Sequence[Path | None] = folders or [None] * len(panels)
    views = views_of(zip(places, panels, strict=True), measures, groupings)
    found: list[Finding] = []
    for claim in claims:
        of_views = views[:1] if isinstance(claim.test, Needs) else views
        own = [_TESTS[type(claim.test)](claim, view) for view in of_views]
        tested = _best_of_models([finding for finding in own if not finding.missing])
        wanted = [finding for finding in own if finding.panel.suite == claim.suite] or own
        found += tested or [min(wanted, key=lambda finding: len(finding.missing))] * bool(own)
    of_models = {view.model(): [other for other in views if other.model() == view.model()] for view in views}
    return [with_corpora(one, of_models[one.view.model()] if by_corpus else []) for one in judge(found)]


def _best_of_models(tested: Sequence[Finding]) -> list[Finding]:
    best: dict[str, Finding] = {}
    for finding in tested:
        model = finding.view.model()
        if model not in best or _samples(finding) > _samples(best[model]):
            best[model] = finding
    return list(best.values())


def _samples(finding: Finding) -> tuple[int, int]:
    compared = [one.comparison for one in finding.evidence if one.comparison is not None]
    return sum(one.n for one in compared), sum(sum(one.seeds) for one in compared)


_TESTS: dict[type, Callable[[Claim, View], Finding]] = {
    Contrasts: of_contrasts,
    RanksAgree: of_ranks_agree,
    FollowsWithin: of_follows_within,
    FewLargeGroups: of_few_large_groups,
    KeptDiffer: of_kept_differ,
    LongTail: of_long_tail,
    DependsMost: of_depends_most,
    Needs: of_needs,
}
