"""Estimates with 95 % intervals, from records; and the samples of a cell as arrays.

The rules, which every table repeats in words:

- A score's interval is the one in its record. An average over tasks takes the root of the sum of the squares of their
  half-widths, each times the task's weight, side by side, since their items are independent; perplexities are averaged
  by their logarithm, and so are their half-widths.
- Several seeds: the mean over seeds (perplexity: of its logarithm, and intervals likewise). Seeds share their items, so
  the interval's half-width adds in quadrature the mean half-width of the seeds and that of the seeds' spread (Student's
  t with seeds - 1 degrees of freedom times the standard error of the mean).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from harness.contracts.record import Record, Sample, Score

# Where seeds are averaged: perplexities by their logarithm, lest one ruined seed be all that is seen.
_SCALES: dict[str, tuple[Callable, Callable]] = {
    "share": (np.asarray, np.asarray),
    "number": (np.asarray, np.asarray),
    "count": (np.asarray, np.asarray),
    "perplexity": (np.log, np.exp),
}


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


def strata_of(kind: str, items: Items, score: Score | None) -> list[np.ndarray] | None:
    """Masks of the items whose averages, averaged again, give the recorded score: all of them, or a domain each.

    None where neither does.
    """
    if score is None or not len(items.score):
        return None
    pooled = [np.full(len(items.score), True)]
    by_domain = [items.domain == name for name in np.unique(items.domain)]
    for strata in (pooled, by_domain):
        recomputed = _average(kind, [_mean(kind, items, mask) for mask in strata])
        if np.isclose(recomputed, score.value, rtol=1e-6, atol=1e-9):
            return strata
    return None


def _mean(kind: str, items: Items, mask: np.ndarray) -> float:
    """The mean score or, for perplexity, the sum of negative log-likelihoods over the sum of tokens."""
    total = float(items.score[mask].sum())
    return total / float(items.weight[mask].sum() if kind == "perplexity" else mask.sum())


def _average(kind: str, strata: Sequence[float]) -> float:
    """The mean over strata; the geometric one for perplexity."""
    mean = np.mean(strata)
    with np.errstate(over="ignore"):
        return float(np.exp(mean) if kind == "perplexity" else mean)
