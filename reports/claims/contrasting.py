"""Contrasts of a claim on a panel: the effect, on which corpora, of which domains, and whether one carries it alone."""

import math
from collections.abc import Sequence
from dataclasses import replace

from reports.claims.corpora import has_parts, has_rule, in_domain, on, on_every, without_domain
from reports.claims.verdicts import Evidence, Finding, OfCorpus, combined
from reports.claims.view import Missing, View
from reports.claims.vocabulary import MATCHED, SHIFTED, Claim, Contrast, Contrasts
from reports.numbers.contrasts import EACH
from reports.numbers.layer_samples import NO_MORE, RANDOM_PAIRS, of_layers, unit_of
from reports.numbers.paired import Comparison
from reports.tables.comparisons import effect_text
from reports.tables.formats import format_value


def of_contrasts(claim: Claim, view: View) -> Finding:
    assert isinstance(claim.test, Contrasts)
    test = _of_suite(on_every(claim.test, view.corpora.present), view)
    concrete = [view.corpora.concrete(contrast) for contrast in test.contrasts]
    absent = [one.terms[0][2] for one, own in zip(test.contrasts, concrete, strict=True) if not own.terms]
    missing = tuple(dict.fromkeys(one for contrast in concrete for one in view.missing(contrast)))
    missing += tuple(Missing(cell, "has no corpus of that kind among the records") for cell in absent)
    if missing:
        return Finding(claim, view, missing=missing)
    evidence = []
    for contrast, own in zip(test.contrasts, concrete, strict=True):
        found = view.compare(own)
        if found is None:
            why = "was not made from the same items or text as the other cells"
            return Finding(claim, view, missing=(Missing(own.terms[0][2], why),))
        evidence.append(_evidence(contrast, own, found, view))
    return Finding(claim, view, tuple(evidence), regions=combined(evidence, test.some))


def _of_suite(test: Contrasts, view: View) -> Contrasts:
    """Of what some contrast has to be: those in the domains that the suite has, where it has any."""
    kept = tuple(one for one in test.contrasts if all(view.knows(name) for _, name, _ in one.terms))
    return replace(test, contrasts=kept) if test.some and kept else test


def _evidence(contrast: Contrast, own: Contrast, found: Comparison, view: View) -> Evidence:
    measure = view.measure(own.terms[0][1])
    kind, items, unit = measure.kind, f"n {found.n:,}", "items"
    if measure.parts[0].of == EACH:
        items, unit = _over_layers(own, found, view)
    text = contrast_text(contrast, kind, found, items)
    return Evidence(contrast.name, kind, found, text, contrast, unit, NO_MORE.get(unit, ""))


def contrast_text(contrast: Contrast, kind: str, found: Comparison, items: str = "") -> str:
    points = " points" if kind == "share" else ""
    bar = "" if contrast.least is None else f", to be above {bound_text(kind, contrast.least)}"
    margin = (
        "" if contrast.least is not None and contrast.least <= 0 else f", margin {bound_text(kind, contrast.margin)}"
    )
    several = set(found.seeds)
    seeds = str(found.seeds[0]) if len(several) == 1 else "/".join(map(str, found.seeds))
    unpaired = "" if found.paired else ", unpaired"
    apart = ""
    if found.plain is not None:
        low, high = (bound_text(kind, end).lstrip("×") for end in found.plain)
        shown = f"[{low}, {high}]"
        apart = f"; as independent items {shown}" if shown not in effect_text(kind, found) else ""
    behind = f"{items or f'n {found.n:,}'}, seeds {seeds}{unpaired}"
    return f"{contrast.name}: {effect_text(kind, found)}{points}{bar}{margin}{apart} ({behind})"


def bound_text(kind: str, value: float) -> str:
    """A margin or a bar: a factor for what is a logarithm."""
    return f"×{math.exp(value):.2f}" if kind == "perplexity" else format_value(kind, value)


def _over_layers(contrast: Contrast, found: Comparison, view: View) -> tuple[str, str]:
    """What the items of a mean over layers are, and in how many layers it is so; their unit."""
    terms = [(weight, view.measure(name).parts[0], view.row(cell)) for weight, name, cell in contrast.terms]
    rows = [row for *_, row in terms if row is not None]
    of_terms = [(weight, of_layers(part, row)) for weight, part, row in terms if row is not None]
    common = [layer for layer in of_terms[0][1] if all(layer in values for _, values in of_terms)]
    above = sum(sum(weight * values[layer] for weight, values in of_terms) > contrast.bar for layer in common)
    unit = unit_of(terms[0][1], rows)
    layers = f"; above {contrast.bar:g} in {above} of {len(common)} layers" if common else ""
    random = " and random pairs" if any(part.metric.startswith(RANDOM_PAIRS) for _, part, _ in terms) else ""
    return f"n {found.n:,} {unit}{random}{layers}", unit


def with_corpora(finding: Finding, views: Sequence[View]) -> Finding:
    """The finding with each contrast on every corpus that its cells were run on, and of every domain.

    ``views`` are the panels of the same model, the finding's own among them: where that lacks a corpus, another is
    looked at. The verdicts are on the finding's own alone. Without any, only what one domain carries alone is told.
    """
    own = finding.view
    ordered = [own, *(view for view in views if view is not own)] if views else []
    evidence = (replace(one, alone=_alone(one, own), corpora=_on_corpora(one, ordered)) for one in finding.evidence)
    return replace(finding, evidence=tuple(evidence))


def _on_corpora(one: Evidence, views: Sequence[View]) -> tuple[OfCorpus, ...]:
    contrast = one.contrast
    if contrast is None or not views or not has_rule(contrast):
        return ()
    whole = _of_corpus("", contrast, views[0])
    shown = [whole] if whole else []
    corpora = dict.fromkeys(corpus for view in views for corpus in view.corpora.present)
    for corpus in [MATCHED, *corpora]:
        found = (_of_corpus(corpus, on(contrast, corpus), view) for view in views)
        if (row := next((row for row in found if row is not None), None)) is not None:
            shown.append(row)
    return tuple(shown)


def _of_corpus(corpus: str, contrast: Contrast, view: View) -> OfCorpus | None:
    try:
        own = view.compare(view.corpora.concrete(contrast))
    except KeyError:  # a domain that no corpus is about
        return None
    if own is None:
        return None
    domains = _domains(contrast, view) if has_parts(contrast) else ()
    parts = {d: view.compare(view.corpora.concrete(in_domain(contrast, d))) for d in domains}
    return OfCorpus(corpus, own, parts, view.panel.suite)


def _domains(contrast: Contrast, view: View) -> tuple[str, ...]:
    """Those that the contrast's averages are over."""
    by_domain = any(cell.calibration in (MATCHED, SHIFTED) for *_, cell in contrast.terms)
    return view.corpora.matched_domains() if by_domain else view.corpora.domains


def _alone(one: Evidence, view: View) -> str:
    """The domain without which the others' mean is not on the same side of 0 by its interval; empty if not one."""
    contrast, c = one.contrast, one.comparison
    if contrast is None or c is None or not has_parts(contrast) or c.low <= 0 <= c.high:
        return ""
    if (domains := _domains(contrast, view)) and len(domains) < 2:
        return ""
    needed = []
    for domain in domains:
        rest = view.compare(view.corpora.concrete(without_domain(contrast, domain, domains)))
        if rest is not None and (rest.low <= 0 if c.low > 0 else rest.high >= 0):
            needed.append(domain)
    return needed[0] if len(needed) == 1 else ""
