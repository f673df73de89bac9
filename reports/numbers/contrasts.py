"""Comparisons of cells, paired over their items: one number with its standard error, interval and p-values.

The rules, which every table repeats in words:

- A contrast is a sum of weighted measures of cells; the difference of two cells has the weights 1 and -1. Perplexities
  enter by their logarithm, so that a difference is a ratio.
- It is taken item by item over the items that all its cells answered, within each task (and domain, where the task
  averages over its domains), each task or domain by itself: effects add up, squared errors add up. For perplexity an
  item counts by its tokens (the linearised error of a ratio of sums).
- Scores between 0 and 1 get two made-up items each, one at either extreme of the contrast: for yes-or-no scores that
  is Bonett and Price's interval (Journal of Educational and Behavioral Statistics 37, 2012), and no error is 0 because
  all items happened to agree. One yes-or-no score of two single cells is tested by McNemar's exact test, everything
  else by Student's t with Satterthwaite's degrees of freedom.
- Several seeds of a cell: an item's score is its mean over seeds, and the squared standard error of the seeds' mean,
  with seeds - 1 degrees of freedom, is added to that of the items. A cell with a single seed adds nothing: its chance
  part is unknown, and the number of seeds is shown.
- A score that is given for each layer (or other part) is averaged over them: they are all that the model has. Its
  items are the samples behind it where they are known (``reports.numbers.layer_samples``), else the layers themselves.
- Drift at a position and calibration error are taken over texts and questions (``reports.numbers.detail_samples``).
- Where it is known which items share a template or a field (``reports.numbers.groupings``), the error over these
  clusters takes the place of that over independent items if it is the larger one; the other interval is kept beside.
- Where samples are missing or do not give the recorded score, the squared errors that the recorded intervals imply
  are added up instead, as for independent samples (``paired`` is then False).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from harness.contracts.record import Record
from reports.numbers.comparable import differing
from reports.numbers.detail_samples import samples_of_score
from reports.numbers.groupings import Groupings, clustered_variance, clusters
from reports.numbers.layer_samples import samples_of_each
from reports.numbers.load import Row
from reports.numbers.paired import Comparison, interval, mcnemar, satterthwaite
from reports.numbers.statistics import Items, Measure, Part, find_score, strata_of

SAMPLE_SCORE = ""  # as a part's metric: the mean of the samples' own scores, whatever scores the record has
EACH = "*"  # as what a part is of: the mean over all parts of the task, as of a score that is given for each layer
_NORMAL = 1.959963984540054


@dataclass(frozen=True)
class Term:
    weight: float
    measure: Measure
    row: Row


def _comparable(terms: Sequence[Term]) -> bool:
    tasks = {part.task for term in terms for part in term.measure.parts}
    records = [record for term in terms for record in term.row.records]
    return not any(differing(one, other, tasks) for one, other in combinations(records, 2))


@dataclass(frozen=True)
class _Scored:
    """A part of one record, perplexities by their logarithm: its value and error, and its items where they carry it."""

    value: float
    error: float
    n: int
    items: Items | None
    by_domain: bool = False
    signature: int = 0


@dataclass
class _Over:
    """Effect, the centre of its interval, and over parts and strata: squared errors, their degrees of freedom, items.

    ``clustered`` holds (squared error, degrees of freedom) over clusters of items; empty where none is larger.
    """

    effect: float = 0.0
    centre: float = 0.0
    variances: list[float] = field(default_factory=list)
    dfs: list[float] = field(default_factory=list)
    n: int = 0
    clustered: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Aligned:
    """Of each term its scores, averaged over seeds, on the items that all have; the strata's masks."""

    scores: list[np.ndarray]
    weight: np.ndarray
    item: np.ndarray
    strata: list[np.ndarray]


class Comparer:
    """Compares rows; remembers the parts that it has looked up, by record, and the clusters of items."""

    def __init__(self, groupings: Groupings | None = None) -> None:
        self._groupings = groupings or {}
        self._clusters: dict[int, list[np.ndarray]] = {}
        self._known: dict[tuple[str, str, Part], _Scored | None] = {}

    def difference(self, measure: Measure, first: Row, second: Row) -> Comparison | None:
        return self.compare([Term(1.0, measure, first), Term(-1.0, measure, second)])

    def value(self, measure: Measure, row: Row) -> float | None:
        """The measure, mean over seeds (perplexity: by its logarithm, and given as such); None where it is missing."""
        values = self._seed_values([Term(1.0, measure, row)])
        return None if values is None else float(np.mean(next(iter(values.values()))))

    def compare(self, terms: Sequence[Term]) -> Comparison | None:
        """The sum of the weighted measures; None where a score is missing or not finite, and for cells that were not
        made from the same model, items or calibration text."""
        of_rows = self._seed_values(terms)
        if of_rows is None or not _comparable(terms):
            return None
        seed_variances = [float(np.var(v, ddof=1)) / len(v) for v in of_rows.values() if len(v) > 1]
        seed_dfs: list[float] = [len(v) - 1 for v in of_rows.values() if len(v) > 1]
        items = self._over_items(terms)
        paired = items is not None
        over = items or self._from_intervals(terms, of_rows)

        def of(variances: Sequence[float], dfs: Sequence[float]) -> tuple[float, float, float, float]:
            error = math.sqrt(sum(variances) + sum(seed_variances))
            df = satterthwaite([*variances, *seed_variances], [*dfs, *seed_dfs])
            return error, df, *interval(over.effect, error, df, over.centre, _bounds(terms))

        error, df, low, high = of(over.variances, over.dfs)
        plain = None
        if over.clustered:
            wider = [max(pair) for pair in zip(over.clustered, zip(over.variances, over.dfs, strict=True), strict=True)]
            plain = (low, high)
            error, df, low, high = of(*zip(*wider, strict=True))
        seeds = tuple(len(values) for values in of_rows.values())
        exact = self._exact(terms) if paired else None
        seed_error = math.sqrt(sum(seed_variances))
        return Comparison(over.effect, low, high, error, df, over.n, seeds, seed_error, paired, exact, plain)

    def _seed_values(self, terms: Sequence[Term]) -> dict[int, np.ndarray] | None:
        """Of every row, in the order of the terms: what it adds to the contrast, seed by seed."""
        of_rows: dict[int, np.ndarray] = {}
        for term in terms:
            for part in term.measure.parts:
                found = self._seeds(term, part)
                if found is None or not all(math.isfinite(one.value) for one in found):
                    return None
                added = term.weight * term.measure.share(part) * np.array([one.value for one in found])
                of_rows[id(term.row)] = of_rows.get(id(term.row), 0.0) + added
        return of_rows

    def _seeds(self, term: Term, part: Part) -> list[_Scored] | None:
        found = []
        for record, items in zip(term.row.records, term.row.items, strict=True):
            key = (record.cell["id"], term.measure.kind, part)
            if key not in self._known:
                self._known[key] = _score(term.measure.kind, part, record, items)
            one = self._known[key]
            if one is None:
                return None
            found.append(one)
        return found

    def _from_intervals(self, terms: Sequence[Term], of_rows: dict[int, np.ndarray]) -> "_Over":
        variances, counts = [], []
        for term in terms:
            for part in term.measure.parts:
                found = self._seeds(term, part) or []
                weight = term.weight * term.measure.share(part)
                # Of a single sample nothing is known of how samples vary.
                squares = [(weight * one.error) ** 2 if one.n > 1 else math.inf for one in found]
                variances.append(float(np.mean(squares)))
                counts.append(min(one.n for one in found))
        effect = float(sum(values.mean() for values in of_rows.values()))
        return _Over(effect, effect, variances, [math.inf] * len(variances), min(counts))

    def _over_items(self, terms: Sequence[Term]) -> "_Over | None":
        """None if the items cannot be paired."""
        over = _Over()
        clustered: list[tuple[float, float]] = []
        for part in dict.fromkeys(part for term in terms for part in term.measure.parts):
            members = [term for term in terms if part in term.measure.parts]
            kind = members[0].measure.kind
            aligned = _align([self._seeds(term, part) or [] for term in members])
            if aligned is None:
                return None
            factors = [term.weight * term.measure.share(part) for term in members]
            total = np.sum([factor * each for factor, each in zip(factors, aligned.scores, strict=True)], axis=0)
            extremes = [sum(f for f in factors if f > 0), sum(f for f in factors if f < 0)]
            for mask in aligned.strata:
                own = _stratum(kind, total[mask], aligned.weight[mask], extremes)
                if own is None:
                    return None
                mean, centre, variance, apart = own
                share, n = 1 / len(aligned.strata), int(mask.sum())
                over.effect, over.centre, over.n = over.effect + share * mean, over.centre + share * centre, over.n + n
                over.variances.append(share**2 * variance)
                over.dfs.append(float(n - 1))
                wide = (
                    [clustered_variance(apart, of) for of in self._clusters_of(aligned.item[mask])] if variance else []
                )
                clustered.append(max([(share**2 * v, float(df)) for v, df in wide], default=(0.0, float(n - 1))))
        if any(wide > plain for (wide, _), plain in zip(clustered, over.variances, strict=True)):
            over.clustered = clustered
        return over

    def _clusters_of(self, items: np.ndarray) -> list[np.ndarray]:
        if not self._groupings:
            return []
        key = hash(items.tobytes())
        if key not in self._clusters:
            self._clusters[key] = clusters(items.tolist(), self._groupings)
        return self._clusters[key]

    def _exact(self, terms: Sequence[Term]) -> tuple[float, float] | None:
        """McNemar's test, where the contrast is the difference of two single cells in one yes-or-no score."""
        if [term.weight for term in terms] != [1.0, -1.0] or terms[0].measure != terms[1].measure:
            return None
        parts = terms[0].measure.parts
        if len(parts) > 1 or any(len(term.row.records) > 1 for term in terms):
            return None
        aligned = _align([self._seeds(term, parts[0]) or [] for term in terms])
        if aligned is None or len(aligned.strata) > 1:
            return None
        first, second = aligned.scores
        if not np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
            return None
        return mcnemar(int(np.sum(first > second)), int(np.sum(first < second)))


def _bounds(terms: Sequence[Term]) -> tuple[float, float] | None:
    """The least and the greatest that a contrast of shares can be."""
    if any(term.measure.kind != "share" for term in terms):
        return None
    weights = [term.weight for term in terms]
    return sum(w for w in weights if w < 0), sum(w for w in weights if w > 0)


def _score(kind: str, part: Part, record: Record, items: Items | None) -> _Scored | None:
    to: Callable[[float], float] = math.log if kind == "perplexity" else float
    if part.of == EACH:
        own = samples_of_each(part, items) or _parts_as_items(record, part)
        return None if own is None else _mean(own, [own.domain == name for name in np.unique(own.domain)])
    if part.metric == SAMPLE_SCORE:
        own = None if items is None else items.select(part)
        return None if own is None or not len(own.score) else _mean(own, [np.full(len(own.score), True)])
    if (own := samples_of_score(part, items)) is not None:
        return _mean(own, [np.full(len(own.score), True)])
    score = find_score(record, part)
    if score is None:
        return None
    if not math.isfinite(score.value) or (kind == "perplexity" and score.value <= 0):
        return _Scored(math.nan, math.nan, score.n, None)
    error = (to(score.high) - to(max(score.low, 1.0) if kind == "perplexity" else score.low)) / (2 * _NORMAL)
    own = None if items is None else items.select(part)
    strata = None if own is None else strata_of(kind, own, score)
    if own is None or strata is None or not np.isfinite(own.score).all():
        return _Scored(to(score.value), error, score.n, None)
    return _Scored(to(score.value), error, score.n, own, len(strata) > 1, _signature(own))


def _mean(items: Items, strata: Sequence[np.ndarray]) -> _Scored:
    """The mean of the strata's means; without an error where one of them has a single item."""
    scores = [items.score[mask] for mask in strata]
    variances = [float(np.var(own, ddof=1)) / len(own) if len(own) > 1 else math.inf for own in scores]
    value, error = float(np.mean([own.mean() for own in scores])), math.sqrt(sum(variances)) / len(strata)
    return _Scored(value, error, len(items.score), items, len(strata) > 1, _signature(items))


def _parts_as_items(record: Record, part: Part) -> Items | None:
    scores = [s for s in record.scores if (s.task, s.metric) == (part.task, part.metric) and s.part]
    if not scores:
        return None
    names = [s.part for s in scores]
    return Items.from_columns(
        {"task": [part.task] * len(scores), "domain": [""] * len(scores), "item": names}
        | {"score": [s.value for s in scores], "weight": [1.0] * len(scores)}
    )


def _signature(items: Items) -> int:
    return hash((items.domain.tobytes(), items.item.tobytes(), items.weight.tobytes()))


def _align(of_terms: Sequence[Sequence[_Scored]]) -> _Aligned | None:
    """None where the terms have no items in common, or weigh them differently."""
    found = [one for seeds in of_terms for one in seeds]
    kept = [one.items for one in found if one.items is not None]
    if len(kept) < len(found) or len({one.by_domain for one in found}) > 1:
        return None
    common: np.ndarray | None = None
    if len({one.signature for one in found}) > 1:
        keys = [np.char.add(np.char.add(items.domain, "\n"), items.item) for items in kept]
        common = keys[0]
        for other in keys[1:]:
            common = np.intersect1d(common, other)
        if not len(common):
            return None
        places = [np.searchsorted(key, common, sorter=np.argsort(key)) for key in keys]
        orders = [np.argsort(key)[place] for key, place in zip(keys, places, strict=True)]
    else:
        orders = [np.arange(len(kept[0].score))] * len(kept)
    weight, domain, item = (getattr(kept[0], name)[orders[0]] for name in ("weight", "domain", "item"))
    if any(not np.array_equal(items.weight[order], weight) for items, order in zip(kept, orders, strict=True)):
        return None
    scores = iter([items.score[order] for items, order in zip(kept, orders, strict=True)])
    means = [np.mean([next(scores) for _ in seeds], axis=0) for seeds in of_terms]
    by_domain = found[0].by_domain
    strata = [domain == name for name in np.unique(domain)] if by_domain else [np.full(len(weight), True)]
    return _Aligned(means, weight, item, strata)


def _stratum(
    kind: str, total: np.ndarray, weight: np.ndarray, extremes: Sequence[float]
) -> tuple[float, float, float, np.ndarray] | None:
    """Mean, centre of its interval, its squared error, and the items apart from it; None for too few to tell."""
    n = len(total)
    if n < 2:
        return None
    if kind == "share":
        padded = np.concatenate([total, extremes])
        return float(total.mean()), float(padded.mean()), float(padded.var()) / (n + 2), total - total.mean()
    mean = float(total.sum() / weight.sum()) if kind == "perplexity" else float(total.mean())
    apart = (total - mean * weight) / weight.mean() if kind == "perplexity" else total - mean
    # What rounding alone sets apart is equal: a tiny variance would be a certainty.
    equal = np.max(np.abs(apart)) <= 1e-9 * abs(mean)
    return mean, mean, 0.0 if equal else float(np.var(apart, ddof=1)) / n, apart
