"""Claims about what plans and routers hold. Counts: they are no sample and have no p-value."""

from collections.abc import Sequence
from itertools import chain

from harness.errors import WinnowError
from reports.claims.selection import Cell
from reports.claims.verdicts import HOLDS, REVERSED, UNDECIDED, Evidence, Finding
from reports.claims.view import NOT_RUN, Missing, View
from reports.claims.vocabulary import Claim, FewLargeGroups, KeptDiffer, LongTail, Needs
from reports.numbers.kept import jaccard, kept_experts
from reports.numbers.usage import collect_usage, top_quarter_share

_NO_PLAN = "its plan is not kept"


def _counted(claim: Claim, view: View, met: Sequence[bool], of: str, evidence: Sequence[Evidence]) -> Finding:
    share = sum(met) / len(met)
    verdict = HOLDS if share >= 0.9 else REVERSED if share <= 0.5 else UNDECIDED
    line = Evidence(of, "share", None, f"{sum(met)} of {len(met)} {of}; a count, no sample", unit=of)
    more = "it is so in more than half of them, but not in nine of ten" if verdict == UNDECIDED else ""
    return Finding(claim, view, (line, *evidence), verdict=verdict, more=more)


def of_few_large_groups(claim: Claim, view: View) -> Finding:
    test = claim.test
    assert isinstance(test, FewLargeGroups)
    rows = [(cell, view.row(cell)) for cell in map(view.corpora.cell, test.cells)]
    missing = tuple(
        Missing(cell, NOT_RUN if row is None else "its record has no plan")
        for cell, row in rows
        if row is None or not row.records[0].plan
    )
    if missing:
        return Finding(claim, view, missing=missing)
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
            evidence.append(Evidence(f"layer {layer}", "share", None, text, unit="layers"))
    return _counted(claim, view, met, "layers", evidence)


def of_kept_differ(claim: Claim, view: View) -> Finding:
    test = claim.test
    assert isinstance(test, KeptDiffer)
    pairs = [(view.corpora.cell(one), view.corpora.cell(two)) for one, two in test.pairs]
    cells = dict.fromkeys(chain.from_iterable(pairs))
    kept = {cell: _kept(view, cell) for cell in cells}
    missing = tuple(Missing(cell, why) for cell, why in kept.items() if isinstance(why, str))
    if missing:
        return Finding(claim, view, missing=missing)
    evidence, met = [], []
    for one, other in pairs:
        first, second = kept[one], kept[other]
        assert isinstance(first, dict) and isinstance(second, dict)
        common = [layer for layer in first if layer in second]
        found = [jaccard(first[layer], second[layer]) for layer in common]
        met += [index < test.bar for index in found]
        shown = ", ".join(f"layer {layer} {index:.2f}" for layer, index in zip(common, found, strict=True))
        name = f"{_short(one)} and {_short(other)}"
        evidence.append(Evidence(name, "number", None, f"{name}: Jaccard's index of the experts kept, {shown}"))
    if not met:
        return Finding(claim, view, missing=(Missing(pairs[0][0], "its plan has no layer that the other's has"),))
    return _counted(claim, view, met, "layers", evidence)


def _short(cell: Cell) -> str:
    return f"{cell.method} on {cell.calibration}" + "".join(f" {key}={value}" for key, value in cell.settings)


def _kept(view: View, cell: Cell) -> dict[str, list[int]] | str:
    """Layer -> the old experts whose row still leads to an expert; why there is none."""
    row = view.row(cell)
    if row is None:
        return NOT_RUN
    if view.folder is None:
        return _NO_PLAN
    try:
        found = kept_experts(view.folder, row.records[0].cell["id"])
    except WinnowError:
        return "its plan.json is damaged"
    return {layer: kept for layer, (kept, _) in found.items()} or _NO_PLAN


def of_long_tail(claim: Claim, view: View) -> Finding:
    test = claim.test
    assert isinstance(test, LongTail)
    rows = [(cell, view.row(cell)) for cell in map(view.corpora.cell, test.cells)]
    usage = collect_usage(record for _, row in rows if row is not None for record in row.records)
    if not usage:
        return Finding(
            claim, view, missing=tuple(Missing(c, NOT_RUN if r is None else "no usage kept") for c, r in rows)
        )
    shares = {source: top_quarter_share(of) for source, of in usage.items()}
    shown = ", ".join(f"{source} {100 * share:.0f} %" for source, share in shares.items())
    layers = len(next(iter(usage.values())))
    line = f"the most used quarter's share of the tokens, mean over {layers} layers: {shown} (25 % if all alike)"
    evidence = [Evidence("share of the top quarter", "share", None, line)]
    return _counted(claim, view, [share > test.share for share in shares.values()], "sources of text", evidence)


def of_needs(claim: Claim, view: View) -> Finding:
    assert isinstance(claim.test, Needs)
    return Finding(claim, view, more=f"needs {claim.test.what}")
