"""Logit drift: how far the compressed model's next-token distributions are from the uncompressed model's.

Along the text that the uncompressed model (the baseline) wrote, both models are asked what they expect next:

- teacher-forced: at each of the first ``positions`` tokens of that text, whatever the compressed model would write;
- free-running (``free_*``): up to the position at which the two models' own greedy texts part, that one included. Up to
  there both have written the same, so its distributions are the ones that the model saw while it wrote.

Cross-perplexity is the perplexity of the compressed model's own text under the baseline; its running form takes the
tokens up to a position. Measures and formulas: ``tasks.probes.divergence``.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from harness.contracts import intervals
from harness.contracts.backend import Backend, Distributions, TokenCounter
from harness.contracts.record import Sample, Score
from harness.contracts.task import Need, TaskResult, TwoModelsTask
from harness.errors import BrokenModel, WinnowError
from tasks.probes.divergence import MEASURES, divergences, truncated_divergences
from tasks.scores import mean_score, share_score

# An answer that is read again takes more tokens where some of them were no text: each becomes this character. Twice as
# many are reckoned with in any case, since a model may write a text in fewer tokens than a tokenizer takes for it.
NO_TEXT, AT_LEAST = "\ufffd", 2
HIGHER_IS_BETTER = {"esap", "top1_agreement", "same_text", "parting_position"}


@dataclass(frozen=True)
class Pair:
    """What both models wrote after one prompt; ``task`` and ``item`` are those of the samples that hold it."""

    task: str
    item: str
    prompt: str
    baseline: str
    ours: str


class Spool:
    """Distributions by place, in a temporary file that is gone with the process: they are too many for memory."""

    def __init__(self) -> None:
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115
        self._starts: dict[int, int] = {}

    def write(self, place: int, seen: Distributions) -> None:
        self._starts[place] = self._file.seek(0, 2)
        for array in (seen.expected, seen.expected_tokens):
            np.save(self._file, np.zeros(0) if array is None else array)

    def read(self, place: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """``expected`` and ``expected_tokens``, the latter empty where all tokens are there."""
        self._file.seek(self._starts[place])
        return np.load(self._file), np.load(self._file)


@dataclass(frozen=True)
class Seen:
    """What ``DriftTask.observe`` leaves for ``compare``: the texts, and what the model expected along them."""

    pairs: tuple[Pair, ...]
    spool: Spool = field(default_factory=Spool)


@dataclass(frozen=True)
class Curve:
    """Of one pair: each of ``MEASURES`` at the first positions of the baseline's text, the 1-based position at which
    the texts part, and the negative log-likelihood (nats) of each token of our own text under the baseline."""

    pair: Pair
    measures: dict[str, NDArray[np.float64]]
    parting: int
    same: bool
    nll: NDArray[np.float64]

    def along(self, measure: str, free: bool) -> NDArray[np.float64]:
        return self.measures[measure][: self.parting if free else None]


def parting(one: Sequence[int], other: Sequence[int]) -> int:
    """The 1-based position of the first token that differs or that one of them lacks; past the end where none does."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other))) + 1


def spans(positions: int) -> list[tuple[int, int]]:
    """Stretches of positions that double: [0, 1), [1, 2), [2, 4), [4, 8) and so on up to ``positions``."""
    ends = [1]
    while ends[-1] < positions:
        ends.append(min(2 * ends[-1], positions))
    return list(zip([0, *ends], ends, strict=False))


def choose(pairs: Iterable[Pair], count: int) -> tuple[Pair, ...]:
    """The first ``count`` pairs, taking one of each task in turn."""
    turns: dict[str, int] = {}
    ranked = []
    for pair in pairs:
        turns[pair.task] = turns.get(pair.task, -1) + 1
        ranked.append((turns[pair.task], pair))
    return tuple(pair for _, pair in sorted(ranked, key=lambda one: one[0])[:count])


@dataclass(frozen=True)
class DriftTask(TwoModelsTask):
    """Drift on ``texts`` prompts of the tasks before it (all that write, or ``sources``), as many of each as can be.

    ``js``, ``kl_from_baseline`` and the other ``MEASURES`` are means over texts of a text's mean over its positions,
    with bootstrap intervals over texts; with the domain ``position A-B`` over these positions only, of the texts that
    reach them; ``js`` also for each source. ``same_text`` is the share of texts that never part, ``parting_position``
    the median position (in tokens, from 1) at which the others do. ``cross_perplexity`` is over all tokens of the
    compressed model's texts; ``running_cross_perplexity`` with the domain ``position 1-B`` over their first B. Empty
    texts of the baseline have no distributions and empty ones of the compressed model no perplexity: a score's ``n``
    says how many had. A sample's score is its ``js``; its detail has every measure by position.

    ``observe`` runs with the compressed model, ``compare`` with the baseline once that has been closed; in between,
    ``texts`` x ``positions`` x vocabulary float32 values lie in a temporary file (64 x 64 x 4,096: 67 MB). transformers
    gives whole distributions; vLLM the ``max_logprobs`` likeliest tokens, for which ``truncated_divergences`` says how
    far off the measures can be. Raises WinnowError where nothing was written to compare, BrokenModel for logits of NaN.
    """

    kind: ClassVar[str] = "probe"
    version: ClassVar[int] = 1

    texts: int = 64
    positions: int = 64
    sources: tuple[str, ...] = ()
    seed: int = 0
    name: str = "drift"
    domain: str = ""

    def __post_init__(self) -> None:
        if self.texts < 1 or self.positions < 1:
            raise WinnowError(f"drift: texts={self.texts}, positions={self.positions}: both need at least 1")

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need | None:
        """The texts of the tasks before it, read again; None where it is unknown how long they are."""
        sources = [need for name, need in before.items() if not self.sources or name in self.sources]
        if None in sources:
            return None
        factor = max(AT_LEAST, counter.longest([NO_TEXT]))
        written = [need for need in sources if need is not None and need.written]
        return Need(max((need.tokens + (factor - 1) * need.written for need in written), default=0))

    def observe(self, backend: Backend, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Seen:
        """What the model expects along the baseline's texts; ``baseline`` is None where the model is the baseline."""
        own = {(sample.task, sample.item): sample for sample in samples if sample.prompt}
        theirs = {(s.task, s.item): s for s in (samples if baseline is None else baseline) if s.prompt}
        seen = Seen(
            choose(
                (
                    Pair(*key, sample.prompt, sample.output, own[key].output)
                    for key, sample in theirs.items()
                    if key in own and (not self.sources or key[0] in self.sources)
                ),
                self.texts,
            )
        )
        if not seen.pairs:
            raise WinnowError(
                f"{self.name}: no text of the uncompressed model to compare with: put tasks that write before it in "
                "the suite, and keep the .parquet file beside the baseline's record"
            )
        for place, found in self._expected(backend, seen, f"{self.name}: scoring"):
            seen.spool.write(place, found)
        return seen

    def compare(self, seen: Seen, backend: Backend) -> TaskResult:
        """Scores of what ``observe`` saw against the baseline, whose backend this is."""
        tokens: dict[int, list[int]] = {}
        measures = {}
        for place, found in self._expected(backend, seen, f"{self.name}: the uncompressed model"):
            tokens[place] = found.tokens.tolist()
            measures[place] = self._measures(found, *seen.spool.read(place))
        written = [i for i, pair in enumerate(seen.pairs) if pair.ours]
        texts = [(seen.pairs[i].prompt, seen.pairs[i].ours) for i in written]
        own: dict[int, Distributions] = {}
        for place, found in backend.distributions(texts, 0, f"{self.name}: cross-perplexity") if texts else ():
            self._require(bool(np.isfinite(found.logprobs).all()), written[place], seen)
            own[written[place]] = found
        curves = []
        for i, pair in enumerate(seen.pairs):
            ours = own[i].tokens.tolist() if i in own else []
            where = parting(tokens.get(i, []), ours)
            nll = -own[i].logprobs.astype(np.float64) if i in own else np.zeros(0)
            curves.append(Curve(pair, measures.get(i, {}), where, ours == tokens.get(i, []), nll))
        return TaskResult(self._scores(curves), [self._sample(curve) for curve in curves if curve.measures])

    def _expected(self, backend: Backend, seen: Seen, progress: str) -> Iterable[tuple[int, Distributions]]:
        """(place among the pairs, what the model expects along the baseline's text) of the texts that are not empty."""
        places = [i for i, pair in enumerate(seen.pairs) if pair.baseline]
        texts = [(seen.pairs[i].prompt, seen.pairs[i].baseline) for i in places]
        for place, found in backend.distributions(texts, self.positions, progress) if texts else ():
            self._require(not np.isnan(found.expected).any(), places[place], seen)
            yield places[place], found

    def _require(self, sound: bool, place: int, seen: Seen) -> None:
        if not sound:
            pair = seen.pairs[place]
            raise BrokenModel(
                f"{self.name}: the logits after the prompt of {pair.task} {pair.item} are not finite; check the "
                "weights for NaN"
            )

    def _measures(
        self, found: Distributions, expected: NDArray[Any], expected_tokens: NDArray[Any]
    ) -> dict[str, NDArray[np.float64]]:
        if found.expected_tokens is None:
            return divergences(found.expected, expected)
        return truncated_divergences(found.expected_tokens, found.expected, expected_tokens, expected)

    def _scores(self, curves: Sequence[Curve]) -> list[Score]:
        scores = [
            score
            for form in ("", "free_")
            for measure in MEASURES
            for domain, first, last in [("", 0, self.positions), *_domains(self.positions)]
            for score in self._mean(curves, form, measure, domain, first, last)
        ]
        for source in dict.fromkeys(curve.pair.task for curve in curves):
            of_source = [curve for curve in curves if curve.pair.task == source]
            scores += self._mean(of_source, "", "js", source, 0, self.positions)
        parted = [float(curve.parting) for curve in curves if not curve.same]
        if parted:
            low, high = intervals.bootstrap_median(parted, self.seed)
            scores.append(Score(self.name, "parting_position", float(np.median(parted)), len(parted), low, high))
        scores.append(share_score(self.name, "same_text", [float(curve.same) for curve in curves]))
        nll = [curve.nll for curve in curves if len(curve.nll)]
        if nll:
            scores.append(self._perplexity("cross_perplexity", nll, ""))
            for _, _, last in _domains(self.positions):
                scores.append(
                    self._perplexity("running_cross_perplexity", [n[:last] for n in nll], f"position 1-{last}")
                )
        return [
            replace(score, higher_is_better=score.metric.removeprefix("free_") in HIGHER_IS_BETTER) for score in scores
        ]

    def _mean(
        self, curves: Sequence[Curve], form: str, measure: str, domain: str, first: int, last: int
    ) -> list[Score]:
        """The one score, or none where no text reaches these positions."""
        along = (curve.along(measure, form == "free_")[first:last] for curve in curves if curve.measures)
        values = [float(part.mean()) for part in along if len(part)]
        return [mean_score(self.name, form + measure, values, self.seed, domain)] if values else []

    def _perplexity(self, metric: str, nll: Sequence[NDArray[np.float64]], domain: str) -> Score:
        sums, counts = [float(values.sum()) for values in nll], [float(len(values)) for values in nll]
        low, high = intervals.bootstrap_perplexity(sums, counts, self.seed)
        return Score(self.name, metric, intervals.perplexity(sums, counts), len(nll), low, high, domain)

    def _sample(self, curve: Curve) -> Sample:
        detail: dict[str, Any] = {"parting": curve.parting, "same_text": curve.same}
        arrays = curve.measures | {"cross_nll": curve.nll}
        detail |= {name: [float(f"{value:.5g}") for value in values] for name, values in arrays.items()}
        score = float(curve.measures["js"].mean())
        return Sample(self.name, curve.pair.item, score, domain=curve.pair.task, detail=detail)


def _domains(positions: int) -> list[tuple[str, int, int]]:
    return [(f"position {first + 1}-{last}", first, last) for first, last in spans(positions)]
