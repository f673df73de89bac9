"""Five sentences made of the verdicts, with which a report opens: what to take when, how sure, what was not tested."""

from collections.abc import Sequence

from reports.claims.lists.words import NAMES
from reports.claims.verdicts import HOLDS, NEGLIGIBLE, NOT_TESTED, REVERSED, UNDECIDED, Finding
from reports.claims.vocabulary import GENERAL, MATCHED, MIXED, SHIFTED, Contrasts
from reports.numbers.paired import ALPHA
from reports.tables.formats import format_list, format_value

_READINGS = {
    MATCHED: "Calibrated on the domain that is scored",
    GENERAL: "Calibrated on general text",
    MIXED: "Calibrated on the mix of all domains",
}


def opening(findings: Sequence[Finding]) -> list[str]:
    """The sentences; empty where no headline claim could be tested."""
    heads = [one for one in findings if one.claim.headline]
    if all(one.verdict == NOT_TESTED for one in heads):
        return []
    return [*(_of_reading(rule, heads) for rule in _READINGS), _how_sure(findings), _not_tested(findings, heads)]


def _of_reading(rule: str, heads: Sequence[Finding]) -> str:
    own = [one for one in heads if one.claim.corpus == rule and one.verdict != NOT_TESTED and _pair(one)]
    if not own:
        return f"{_READINGS[rule]}: nothing of this was run."
    models = list(dict.fromkeys(one.panel.model for one in own))
    ratios = sorted({_ratio(one) for one in own}, reverse=True)
    texts = []
    for model in models:
        for ratio in ratios:
            found = [one for one in own if one.panel.model == model and _ratio(one) == ratio]
            of = f" ({model})" if len(models) > 1 else ""
            if found:
                texts.append(f"at {100 * ratio:g} %{of} {_verdicts(found)}")
    return f"{_READINGS[rule]} and asked to write: {'; '.join(texts)}."


def _verdicts(found: Sequence[Finding]) -> str:
    texts = []
    for one in found:
        first, second = _pair(one)
        c = one.evidence[0].comparison
        effect = 0.0 if c is None else c.effect
        size = f"{format_value('share', abs(effect))} points"
        alone = f", by {one.evidence[0].alone} alone" if one.evidence[0].alone else ""
        if one.verdict in (HOLDS, REVERSED):
            better, worse = (first, second) if one.verdict == HOLDS else (second, first)
            texts.append(f"{better} beats {worse} (by {size}{alone})")
        elif one.verdict == NEGLIGIBLE:
            texts.append(f"{first} and {second} do not differ in a way that matters")
        else:
            ahead = (first, second) if effect >= 0 else (second, first)
            texts.append(f"{ahead[0]} against {ahead[1]} is undecided (ahead by {size})")
    return format_list(texts)


def _how_sure(findings: Sequence[Finding]) -> str:
    tested = [one for one in findings if one.p is not None]
    decided = sum(one.verdict != UNDECIDED for one in tested)
    heads = [one for one in tested if one.claim.headline]
    items = sorted({one.evidence[0].comparison.n for one in heads if one.evidence and one.evidence[0].comparison})
    n = f", on {items[0]:,} to {items[-1]:,} items" if len(items) > 1 else f", on {items[0]:,} items" if items else ""
    seeds = {seeds for one in tested for e in one.evidence if e.comparison for seeds in e.comparison.seeds}
    single = " most cells have one seed, whose chance is in no interval;" if 1 in seeds else ""
    return (
        f"How sure: {decided} of {len(tested)} tests are decided at {100 * ALPHA:g} %, corrected by "
        f"Holm's rule and beyond a margin that each declares (2 points where the model writes){n};{single} "
        "the verdicts are about this model and these settings."
    )


def _not_tested(findings: Sequence[Finding], heads: Sequence[Finding]) -> str:
    left = [one for one in findings if one.verdict == NOT_TESTED]
    told = []
    for rule in dict.fromkeys(one.claim.corpus for one in heads if _pair(one)):
        own = [one for one in heads if one.claim.corpus == rule and _pair(one)]
        ratios: dict[tuple[str, ...], list[str]] = {}
        for one in own:
            if one.verdict == NOT_TESTED:
                ratios.setdefault(_pair(one), []).append(f"{100 * _ratio(one):g}")
        pairs = [f"{format_list(list(pair))} (at {format_list(of)} %)" for pair, of in ratios.items()]
        if all(one.verdict == NOT_TESTED for one in own):
            told.append(f"{_said_rule(rule)} nothing")
        elif pairs:
            told.append(f"{_said_rule(rule)} {'; '.join(pairs)}")
    shown = f"; of those above, {', '.join(told)}" if told else ""
    return f"Not tested: {len(left)} of {len({one.claim.id for one in findings})} claims{shown}."


def _said_rule(rule: str) -> str:
    words = {
        MATCHED: "on the scored domain",
        GENERAL: "on general text",
        MIXED: "on the mix",
        SHIFTED: "on other domains",
    }
    return words.get(rule, rule)


def _pair(finding: Finding) -> tuple[str, ...]:
    """The two methods of a headline claim, in words; empty where it is not of two methods where the model writes."""
    test = finding.claim.test
    if not isinstance(test, Contrasts) or any(name != "generation" for _, name, _ in test.contrasts[0].terms):
        return ()
    return tuple(NAMES.get(cell.method, cell.method) for *_, cell in test.contrasts[0].terms)


def _ratio(finding: Finding) -> float:
    return finding.claim.cells()[0].ratio
