"""Verdicts over models beside those over items: each contrast's effect on every model, and pooled.

The verdict over items is about one model. That over models is about models such as these: the same rules on the pooled
effect (``reports.claims.models``), corrected by Holm's rule over the claims that were tested on several models.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reports.claims.contrasting import bound_text
from reports.claims.models import Pooled, pool
from reports.claims.verdicts import Evidence, Finding, combined, judge
from reports.claims.vocabulary import Contrasts, DependsMost
from reports.numbers.paired import Comparison
from reports.tables.comparisons import effect_text, p_text, size_text
from reports.tables.formats import MISSING, Table

_NOTE = (
    "Effects are pooled over models with a variance between models (Paule and Mandel's), interval and p by Student's "
    "t over models; the verdict over models is corrected by Holm's rule over the claims of this table. I² is the share "
    "of the spread between models that is not error of the items, τ its size, Q's p that all models are alike; "
    "[[a, b]] is where one more such model would lie in 95 %. Verdicts on each model are those over its items."
)


@dataclass(frozen=True)
class OfModels:
    """One contrast on each of several models, in their order, and pooled."""

    models: tuple[str, ...]
    effects: tuple[Comparison, ...]
    pooled: Pooled


@dataclass(frozen=True)
class OverModels:
    """``finding``: the claim on the pooled effects, one line of evidence for each of ``contrasts``. ``verdicts``: over
    the items of each model."""

    finding: Finding
    contrasts: tuple[OfModels, ...]
    verdicts: Mapping[str, str]


def over_models(findings: Iterable[Finding]) -> list[OverModels]:
    """Of claims that were tested by contrasts on two models or more; the findings' order."""
    of_claims: dict[str, list[Finding]] = {}
    for finding in findings:
        if isinstance(finding.claim.test, Contrasts | DependsMost) and finding.regions:
            of_claims.setdefault(finding.claim.id, []).append(finding)
    pooled = [one for own in of_claims.values() if (one := _of_claim(own)) is not None]
    judged = judge([one.finding for one in pooled])
    return [replace(one, finding=finding) for one, finding in zip(pooled, judged, strict=True)]


def _of_claim(findings: Sequence[Finding]) -> OverModels | None:
    """None where no contrast was seen on two models. A contrast that only some models have is left out."""
    if len({finding.view.model() for finding in findings}) < 2:
        return None
    first = findings[0]
    models = tuple(finding.panel.model for finding in findings)
    evidence, contrasts = [], []
    for one in first.evidence:
        lines = [next((e for e in finding.evidence if e.name == one.name), None) for finding in findings]
        effects = tuple(line.comparison for line in lines if line is not None and line.comparison is not None)
        if len(effects) < len(findings) or one.contrast is None:
            continue
        pooled = pool([c.effect for c in effects], [c.error**2 for c in effects])
        assert pooled is not None  # two models at least
        contrasts.append(OfModels(models, effects, pooled))
        evidence.append(Evidence(one.name, one.kind, pooled.over, pooled_text(one, pooled), one.contrast, "models"))
    if not contrasts:
        return None
    some = isinstance(first.claim.test, Contrasts) and first.claim.test.some
    finding = Finding(first.claim, first.view, tuple(evidence), regions=combined(evidence, some))
    return OverModels(finding, tuple(contrasts), {one.panel.model: one.verdict for one in findings})


def pooled_text(one: Evidence, pooled: Pooled) -> str:
    """The pooled effect in words, with how much models differ."""
    points = " points" if one.kind == "share" else ""
    told = [f"{effect_text(one.kind, pooled.over)}{points} over {pooled.over.n} models"]
    if pooled.prediction is not None:
        low, high = pooled.prediction
        told.append(f"one more [[{bound_text(one.kind, low)}, {bound_text(one.kind, high)}]]")
    if pooled.q is None or pooled.i2 is None or pooled.q_p is None:
        told.append("models weigh the same, since one has no error")
    else:
        told.append(f"I² {100 * pooled.i2:.0f} %, τ {size_text(one.kind, pooled.tau2**0.5)}, Q's {p_text(pooled.q_p)}")
    return f"{one.name}: {'; '.join(told)}"


def models_table(found: Sequence[OverModels]) -> Table | None:
    if not found:
        return None
    models = list(dict.fromkeys(model for one in found for model in one.verdicts))
    body = []
    for one in found:
        claim, finding = one.finding.claim, one.finding
        for number, (line, contrast) in enumerate(zip(finding.evidence, one.contrasts, strict=True)):
            of_model = dict(zip(contrast.models, contrast.effects, strict=True))
            start = (
                [claim.id, claim.corpus, finding.verdict, p_text(finding.corrected or 0.0)] if not number else [""] * 4
            )
            effects = [effect_text(line.kind, of_model[m]) if m in of_model else MISSING for m in models]
            verdicts = [f" ({one.verdicts[m]})" if m in one.verdicts and not number else "" for m in models]
            body.append([*start, line.text, *(f"{e}{v}" for e, v in zip(effects, verdicts, strict=True))])
    return Table("Over models", ["claim", "corpus", "over models", "p", "pooled", *models], body, _NOTE)


def as_json(one: OverModels) -> dict[str, Any]:
    """What ``claims.json`` says of a claim on several models; contrasts in the order of ``evidence``."""
    finding = one.finding
    return {
        "verdict": finding.verdict,
        "p": finding.p,
        "p_corrected": finding.corrected,
        "more": finding.more,
        "verdicts": dict(one.verdicts),
        "contrasts": [_contrast_as_json(*pair) for pair in zip(finding.evidence, one.contrasts, strict=True)],
    }


def _contrast_as_json(line: Evidence, of: OfModels) -> dict[str, Any]:
    pooled = of.pooled
    numbers = {name: getattr(pooled.over, name) for name in ("effect", "low", "high", "error", "df")}
    spread = {name: getattr(pooled, name) for name in ("tau2", "q", "q_p", "i2", "prediction")}
    models = [
        {"model": model, "effect": c.effect, "low": c.low, "high": c.high, "error": c.error, "weight": weight}
        for model, c, weight in zip(of.models, of.effects, pooled.weights, strict=True)
    ]
    return {"name": line.name, "kind": line.kind, "verdict": line.verdict, **numbers, **spread, "models": models}


def plain(found: Sequence[OverModels]) -> list[str]:
    """Lines for the terminal; none where there is one model."""
    lines = ["", "Over models:"] if found else []
    for one in found:
        finding = one.finding
        lines.append(f"{finding.verdict.upper():17} {finding.claim.id}  ({p_text(finding.corrected or 0.0)})")
        lines += [f"    {line.text}" for line in finding.evidence]
    return lines
