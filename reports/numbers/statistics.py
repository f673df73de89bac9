"""Estimates and differences with 95 % intervals, from records and, where they are kept, their samples.

The rules, which every table repeats in words:

- A score's interval is the one in its record. An average over tasks takes the root of the sum of the squares of their
  half-widths, each times the task's weight, side by side, since their items are independent; perplexities are averaged
  by their logarithm, and so are their half-widths.
- A difference from the baseline is bootstrapped over the items that both answered, paired (the same resampled items for
  both), within each task of an average separately. Where samples are missing, or do not give the recorded score, it is
  unpaired: d - sqrt((a - a_low)^2 + (b_high - b)^2) and so on (Newcombe, Statistics in Medicine 17, 1998, method 10).
- Several seeds: the mean over seeds (perplexity: of its logarithm, and intervals likewise). Seeds share their items, so
  the interval's half-width adds in quadrature that of the items (paired: of the scores averaged over seeds; otherwise:
  the mean half-width of the seeds) and that of the seeds (Student's t with seeds - 1 degrees of freedom times the
  standard error of the mean).
"""

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import stdtrit

from harness.contracts.record import Record, Sample, Score

RESAMPLES = 2000
# Where seeds are averaged: perplexities by their logarithm, lest one ruined seed be all that is seen.
_SCALES: dict[str, tuple[Callable, Callable]] = {
    "share": (np.asarray, np.asarray),
    "number": (np.asarray, np.asarray),
    "count": (np.asarray, np.asarray),
    "perplexity": (np.log, np.exp),
}
_LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Part:
    """One score of a record: ``of`` a part of the task, empty for all of it."""

    task: str
    metric: str
    of: str = ""


@dataclass(frozen=True)
class Measure:
    """A column: the mean of its parts, the geometric one for perplexity. ``kind`` is share (0 to 1), perplexity, count
    or number; ``weights`` are those of the parts and add up to 1 (none: all count the same)."""

    name: str
    label: str
    parts: tuple[Part, ...]
    kind: str = "share"
    higher_is_better: bool = True
    ranked: bool = True
    weights: tuple[float, ...] = ()

    def share(self, part: Part) -> float:
        """The weight of one of its parts."""
        return self.weights[self.parts.index(part)] if self.weights else 1 / len(self.parts)


@dataclass(frozen=True)
class Estimate:
    """``n``: samples behind one seed's value, over all parts; ``paired``: whether a difference was taken item
    by item.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1
    paired: bool = False


@dataclass(frozen=True, eq=False)
class Items:
    """A cell's samples as arrays of one length, in the order of (task, domain, item), so that cells line
    up. Two are equal if they are the same object, which lets what was computed from one be remembered.
    """

    task: np.ndarray
    domain: np.ndarray
    item: np.ndarray
    score: np.ndarray
    weight: np.ndarray

    @staticmethod
    def from_columns(columns: Mapping[str, Sequence[Any]]) -> "Items":
        task, domain, item = (np.asarray(columns[name], dtype=np.str_) for name in ("task", "domain", "item"))
        order = np.lexsort((item, domain, task))
        score, weight = (np.asarray(columns[name], dtype=np.float64) for name in ("score", "weight"))
        return Items(task[order], domain[order], item[order], score[order], weight[order])

    @staticmethod
    def from_samples(samples: Iterable[Sample]) -> "Items":
        kept = list(samples)
        return Items.from_columns(
            {name: [getattr(s, name) for s in kept] for name in ("task", "domain", "item", "score", "weight")}
        )

    def select(self, part: Part) -> "Items":
        """The items of a part; of a group (mmlu), whose items are kept by its parts (mmlu_astronomy), those of all."""
        mask = self.task == part.task
        if part.of:
            own = mask & (self.domain == part.of)
            mask = own if own.any() else mask & np.char.startswith(self.domain, f"{part.of}_")
        return Items(*(getattr(self, name)[mask] for name in ("task", "domain", "item", "score", "weight")))

    def joined(self, other: "Items | None") -> "Items":
        """Both together; the other's tasks are none of its own."""
        names = ("task", "domain", "item", "score", "weight")
        return self if other is None else Items(*(np.concatenate([getattr(self, n), getattr(other, n)]) for n in names))

    def same_items(self, other: "Items") -> bool:
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("domain", "item", "weight"))


def find_score(record: Record, part: Part) -> Score | None:
    """The score of that name; a task that scores a single part need not leave its name out."""
    of_metric = [s for s in record.scores if (s.task, s.metric) == (part.task, part.metric)]
    exact = [s for s in of_metric if s.part == part.of]
    if exact:
        return exact[0]
    return of_metric[0] if len(of_metric) == 1 and not part.of else None


def estimate(measure: Measure, records: Sequence[Record]) -> Estimate | None:
    """The measure of one cell, or of cells that differ in their seed only; None where a score is missing."""
    of_seeds = [_of_record(measure, record) for record in records]
    known = [one for one in of_seeds if one is not None]
    if not known or len(known) < len(of_seeds):
        return None
    n = min(one.n for one in known)
    to, back = _SCALES[measure.kind]
    values = np.array([to(one.value) for one in known])
    value = float(back(values.mean()))
    if not np.isfinite(values).all():
        return Estimate(value, np.nan, np.nan, n, len(known))
    below = np.mean([to(one.value) - to(one.low) for one in known])
    above = np.mean([to(one.high) - to(one.value) for one in known])
    spread = _seed_half_width(values)
    low = float(back(values.mean() - np.hypot(below, spread)))
    high = float(back(values.mean() + np.hypot(above, spread)))
    if measure.kind == "share":
        low, high = max(0.0, low), min(1.0, high)
    elif measure.kind == "perplexity":
        low = max(1.0, low)
    return Estimate(value, low, high, n, len(known))


def difference(
    measure: Measure,
    records: Sequence[Record],
    baseline: Record,
    items: Sequence[Items | None] = (),
    baseline_items: Items | None = None,
) -> Estimate | None:
    """The measure of the cells (one a seed) less that of the baseline; None where a score is missing.

    ``items`` holds the samples of each of ``records``. Pairing is used where all of them are there, are of
    the same items as the baseline's, and give the recorded scores.
    """
    ours, base = estimate(measure, records), _of_record(measure, baseline)
    if ours is None or base is None:
        return None
    value = ours.value - base.value
    if not np.isfinite(value):
        return Estimate(value, np.nan, np.nan, ours.n, ours.seeds)
    resampled = _paired_resamples(measure, records, baseline, items, baseline_items)
    if resampled is None:
        low = value - np.hypot(ours.value - ours.low, base.high - base.value)
        high = value + np.hypot(ours.high - ours.value, base.value - base.low)
        return Estimate(value, float(low), float(high), ours.n, ours.seeds)
    to, back = _SCALES[measure.kind]
    on_scale = np.array([to(one.value) for record in records if (one := _of_record(measure, record))])
    spread = _seed_half_width(on_scale)
    spread_below = ours.value - back(to(ours.value) - spread)
    spread_above = back(to(ours.value) + spread) - ours.value
    item_low, item_high = np.percentile(resampled, _LEVELS)
    low = value - np.hypot(max(0.0, value - item_low), spread_below)
    high = value + np.hypot(max(0.0, item_high - value), spread_above)
    return Estimate(value, float(low), float(high), ours.n, ours.seeds, paired=True)


def _of_record(measure: Measure, record: Record) -> Estimate | None:
    scores = [find_score(record, part) for part in measure.parts]
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return None
    if len(known) == 1:
        return Estimate(known[0].value, known[0].low, known[0].high, known[0].n)
    to, back = _SCALES[measure.kind]
    shares = [measure.share(part) for part in measure.parts]
    value = sum(share * to(s.value) for share, s in zip(shares, known, strict=True))
    below, above = (
        np.sqrt(sum((share * (to(s.value) - to(getattr(s, end)))) ** 2 for share, s in zip(shares, known, strict=True)))
        for end in ("low", "high")
    )
    low, high = float(back(value - below)), float(back(value + above))
    return Estimate(float(back(value)), low, high, sum(s.n for s in known))


def _seed_half_width(values: np.ndarray) -> float:
    if len(values) < 2:
        return 0.0
    return float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(len(values)))


def _paired_resamples(
    measure: Measure,
    records: Sequence[Record],
    baseline: Record,
    items: Sequence[Items | None],
    baseline_items: Items | None,
) -> np.ndarray | None:
    """RESAMPLES differences, or None where the samples cannot be paired."""
    if measure.kind == "number" or baseline_items is None or len(items) != len(records):
        return None
    to, back = _SCALES[measure.kind]
    ours_total, base_total = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for part in measure.parts:
        base, base_draws = _baseline_resampled(measure.kind, part, baseline_items, find_score(baseline, part))
        if base_draws is None:
            return None
        of_seeds = []
        for record, cell_items in zip(records, items, strict=True):
            ours = None if cell_items is None else cell_items.select(part)
            if ours is None or not ours.same_items(base):
                return None
            draws = _resampled(measure.kind, part, ours, find_score(record, part))
            if draws is None:
                return None
            of_seeds.append(to(draws))
        ours_total += measure.share(part) * np.mean(of_seeds, axis=0)
        base_total += measure.share(part) * to(base_draws)
    return back(ours_total) - back(base_total)


@lru_cache(maxsize=8)
def _baseline_resampled(kind: str, part: Part, items: Items, score: Score | None) -> tuple[Items, np.ndarray | None]:
    """The part's items and ``_resampled`` of them, remembered since every cell is compared with the same baseline."""
    own = items.select(part)
    return own, _resampled(kind, part, own, score)


def _resampled(kind: str, part: Part, items: Items, score: Score | None) -> np.ndarray | None:
    """The score on RESAMPLES resamples of its items; None where the items do not give the recorded score.

    Tasks average either over all items or over their domains; which of the two, the recorded score tells.
    Over domains, each is resampled within itself.
    """
    strata = strata_of(kind, items, score)
    if strata is None:
        return None
    times = [
        _times_drawn(f"{part.task}/{part.of}/{number}/{len(strata)}", int(mask.sum()))
        for number, mask in enumerate(strata)
    ]
    drawn = zip(strata, times, strict=True)
    return _average(kind, [_statistic(kind, items, mask, draws) for mask, draws in drawn])


def strata_of(kind: str, items: Items, score: Score | None) -> list[np.ndarray] | None:
    """Masks of the items whose averages, averaged again, give the recorded score: all of them, or a domain each.

    None where neither does.
    """
    if score is None or not len(items.score):
        return None
    pooled = [np.full(len(items.score), True)]
    by_domain = [items.domain == name for name in np.unique(items.domain)]
    for strata in (pooled, by_domain):
        recomputed = _average(kind, [_statistic(kind, items, mask, np.ones((1, mask.sum()))) for mask in strata])[0]
        if np.isclose(recomputed, score.value, rtol=1e-6, atol=1e-9):
            return strata
    return None


def _statistic(kind: str, items: Items, mask: np.ndarray, times: np.ndarray) -> np.ndarray:
    """One number a row of ``times``, which says how often each item counts: the mean score or, for
    perplexity, the sum of negative log-likelihoods over the sum of tokens.
    """
    total = _summed(times, items.score[mask])
    return total / _summed(times, items.weight[mask]) if kind == "perplexity" else total / mask.sum()


def _summed(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    return (times @ values.astype(times.dtype)).astype(np.float64)


def _average(kind: str, strata: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over strata; the geometric one for perplexity."""
    mean = np.mean(strata, axis=0)
    with np.errstate(over="ignore"):
        return np.exp(mean) if kind == "perplexity" else mean


def _times_drawn(stratum: str, count: int) -> np.ndarray:
    """(RESAMPLES, count): how often each item is drawn. The same for every cell, which is what pairs them.

    Small whole numbers, in single precision because reading them is what a report spends its time on. What was drawn is
    kept, up to ``_MOST_KEPT``, since every cell asks for it.
    """
    key = stratum, count
    if key not in _drawn:
        generator = np.random.default_rng(zlib.crc32(stratum.encode()))
        _drawn[key] = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float32)
        while len(_drawn) > 1 and sum(times.nbytes for times in _drawn.values()) > _MOST_KEPT:
            _drawn.popitem(last=False)
    _drawn.move_to_end(key)
    return _drawn[key]


_drawn: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()  # the latest last
_MOST_KEPT = 2**29  # bytes: 250 items take 2 MB, the 40,000 of all the papers' benchmarks 320 MB
