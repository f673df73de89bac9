"""Tables of tests between cells: against the uncompressed model, and against the best of each ratio."""

import math
from collections.abc import Sequence
from itertools import combinations

from reports.numbers.broken import faults
from reports.numbers.contrasts import Comparer
from reports.numbers.load import Row
from reports.numbers.measures import Results
from reports.numbers.paired import ALPHA, Comparison, holm
from reports.numbers.statistics import Measure
from reports.tables.formats import MISSING, Table, format_value

_COMMON_NOTE = (
    "Each entry is the row's score less the other's, its 95 % interval and its p-value, corrected by Holm's rule for "
    "the {tests} tests {family}; shares differ in points, perplexities by a factor. Differences are taken over the "
    "items that both answered (n: {n}); one yes-or-no score of two single cells is tested by McNemar's exact test, "
    "everything else by Student's t with the squared standard errors of the items, each task by itself, and of the "
    "seeds added up{seeds}. Where a difference is not significant, det. is the smallest that would have been found "
    "with 80 % power at the level {level:.1g} of a single one of these tests (none: no difference on the scale "
    "would).{broken}"
)


def compared_measures(results: Results) -> list[Measure]:
    """The main table's ranked columns; of the tasks behind an average only the average."""
    measures = [m for m in results.main if m.ranked]
    parts = {part for m in measures if len(m.parts) > 1 for part in m.parts}
    return [m for m in measures if len(m.parts) > 1 or m.parts[0] not in parts]


def baseline_tests(results: Results, corpus: str, comparer: Comparer) -> Table | None:
    """Every row of a corpus against the uncompressed model; None without one."""
    baseline, rows = results.panel.baseline, results.panel.of_corpus(corpus)
    if baseline is None or not rows:
        return None
    measures = compared_measures(results)
    found = {
        (place, m.name): one
        for m in measures
        for place, row in enumerate(rows)
        if (one := comparer.difference(m, row, baseline)) is not None
    }
    corrected = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    body = [
        _names(row) + [_entry(m, found.get((i, m.name)), corrected.get((i, m.name), 1.0), len(found)) for m in measures]
        for i, row in enumerate(rows)
    ]
    note = _note(list(found.values()), len(found), "of this table", [*rows, baseline])
    return Table("Tests against the baseline", _header(measures), body, note) if found else None


def best_tests(results: Results, corpus: str, comparer: Comparer) -> Table | None:
    """Every row of a corpus against the best of its ratio, measure by measure; None where no ratio has two rows.

    The best is picked by the data that test it, so p-values are corrected for all pairs of rows of a ratio.
    """
    rows = results.panel.of_corpus(corpus)
    measures = compared_measures(results)
    pairs = [(i, j) for i, j in combinations(range(len(rows)), 2) if rows[i].level == rows[j].level]
    found = {
        (i, j, m.name): one
        for m in measures
        for i, j in pairs
        if (one := comparer.difference(m, rows[i], rows[j])) is not None
    }
    if not found:
        return None
    corrected = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    best = {(rows[i].level, m.name): _best(results, rows, rows[i], m) for m in measures for i, _ in pairs}

    def entry(place: int, measure: Measure) -> str:
        other = best.get((rows[place].level, measure.name))
        if other is None or other == place:
            return MISSING if other is None else "best"
        key = (min(place, other), max(place, other), measure.name)
        one = found.get(key)
        turned = one if one is None or place < other else reverse(one)
        return _entry(measure, turned, corrected.get(key, 1.0), len(found))

    body = [_names(row) + [entry(place, m) for m in measures] for place, row in enumerate(rows)]
    family = "between all pairs of rows of a ratio (the best was picked by the same data)"
    return Table(
        "Tests against the best of each ratio",
        _header(measures),
        body,
        _note(list(found.values()), len(found), family, rows),
    )


def reverse(one: Comparison) -> Comparison:
    """The same comparison the other way round."""
    exact = None if one.exact is None else (one.exact[1], one.exact[0])
    return Comparison(
        -one.effect, -one.high, -one.low, one.error, one.df, one.n, one.seeds[::-1], one.seed_error, one.paired, exact
    )


def effect_text(kind: str, one: Comparison) -> str:
    """``+3.2 [1.0, 5.4]`` in points for shares, ``×1.27 [1.22, 1.33]`` for perplexities (from their logarithms)."""
    if kind == "perplexity":
        low, value, high = (_factor(number) for number in (one.low, one.effect, one.high))
        return f"×{value} [{low}, {high}]"
    sign = "+" if one.effect > 0 and format_value(kind, one.effect).strip("0.") else ""
    return f"{sign}{format_value(kind, one.effect)} [{format_value(kind, one.low)}, {format_value(kind, one.high)}]"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def size_text(kind: str, size: float) -> str:
    """The size of an effect without a sign, such as the smallest detectable one."""
    return f"×{_factor(size)}" if kind == "perplexity" else format_value(kind, abs(size))


def detectable_text(kind: str, size: float, scale: float = 1.0) -> str:
    """The smallest detectable effect; "none" where that is larger than any on the scale of shares (``scale`` of 1)."""
    beyond = not math.isfinite(size) or kind == "share" and size >= scale
    return "none" if beyond else size_text(kind, size)


def _factor(logarithm: float) -> str:
    return format_value("perplexity", math.exp(logarithm) if logarithm < 700 else math.inf)


def _entry(measure: Measure, one: Comparison | None, corrected: float, tests: int) -> str:
    if one is None:
        return MISSING
    text = f"{effect_text(measure.kind, one)}, {p_text(corrected)}"
    if corrected < ALPHA:
        return text
    return f"{text}, det. {detectable_text(measure.kind, one.detectable(ALPHA / tests))}"


def _best(results: Results, rows: Sequence[Row], like: Row, measure: Measure) -> int | None:
    values = {
        place: result.estimate.value
        for place, row in enumerate(rows)
        if row.level == like.level
        and (result := results.get(row, measure)) is not None
        and math.isfinite(result.estimate.value)
    }
    return (max if measure.higher_is_better else min)(values, key=values.__getitem__) if values else None


def _names(row: Row) -> list[str]:
    return [f"{row.ratio:g}", row.label]


def _header(measures: Sequence[Measure]) -> list[str]:
    units = {"share": " (points)", "perplexity": " (factor)"}
    return ["ratio", "method", *(f"Δ {m.label}{units.get(m.kind, '')}" for m in measures)]


def _note(found: Sequence[Comparison], tests: int, family: str, rows: Sequence[Row]) -> str:
    counts = sorted({one.n for one in found})
    several = sorted({f"{row.method} {len(row.records)}" for row in rows if len(row.records) > 1})
    seeds = (
        f" (seeds: {', '.join(several)}, every other row 1, whose chance part is unknown)"
        if several
        else " (every row has a single seed, whose chance part is unknown)"
    )
    unpaired = sum(not one.paired for one in found)
    broken = [f"{row.label}: {'; '.join(faults(record))}" for row in rows for record in row.records if faults(record)]
    text = _COMMON_NOTE.format(
        tests=tests,
        family=family,
        n=", ".join(map(str, counts)) if len(counts) < 6 else f"{counts[0]} to {counts[-1]}",
        seeds=seeds,
        level=ALPHA / tests,
        broken=f" Broken cells are not tested: {'. '.join(broken)}." if broken else "",
    )
    if unpaired:
        text += f" {unpaired} of the differences could not be paired: their errors come from the recorded intervals."
    return text
