"""Does a model know how likely it is right? Calibration error and Brier score of multiple choice, in pure numpy.

The confidence in a question is the largest of the probabilities that a softmax over the log-likelihoods of its choices
gives, so the choice it belongs to is the one that ``acc`` counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.contracts import intervals
from harness.contracts.record import Sample, Score
from harness.contracts.task import SamplesTask, TaskResult
from harness.errors import BrokenModel
from tasks.scores import mean_score, share_score

BINS = 15
NORMAL = 1.959963984540054  # the 97.5 % quantile
Places = NDArray[np.intp]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class CalibrationError:
    """A binned calibration error with its 95 % interval.

    ``chance``: the mean of the same error over answers drawn with exactly the given confidences, that is for a model
    that is calibrated perfectly; ``chance_low`` and ``chance_high`` hold 95 % of it. An error in there is no sign of
    bad calibration (consistency resampling, Bröcker and Smith, Weather and Forecasting 22, 2007).
    """

    value: float
    low: float
    high: float
    chance: float
    chance_low: float
    chance_high: float


def probabilities(logprobs: ArrayLike) -> Vector:
    """Softmax over the choices of one question: [choices] log-likelihoods in nats to [choices] probabilities.

    Raises ValueError for fewer than two choices and for a log-likelihood that is not finite.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise ValueError("a question needs the log-likelihoods of at least two choices, all of them finite")
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def brier(chances: ArrayLike, answer: int) -> float:
    """Brier score of one question, from 0 to 2: the squared distance of the probabilities [choices] from certainty in
    the right choice (Brier, Monthly Weather Review 78, 1950, equation 2)."""
    values = np.asarray(chances, dtype=np.float64)
    if not 0 <= answer < values.size:
        raise ValueError(f"answer {answer} is none of {values.size} choices")
    return float(((values - (np.arange(values.size) == answer)) ** 2).sum())


def equal_width(confidence: ArrayLike, bins: int = BINS) -> Places:
    """The bin of each confidence [n] among ``bins`` of one width; a bin holds its upper edge (Guo et al. 2017,
    arXiv:1706.04599, section 2)."""
    return np.clip(np.ceil(np.asarray(confidence) * bins) - 1, 0, bins - 1).astype(np.intp)


def equal_mass(confidence: ArrayLike, bins: int = BINS) -> Places:
    """The bin of each confidence [n] among at most ``bins`` of as many questions as each other, up to one (adaptive
    bins: Nixon et al. 2019, arXiv:1904.01685). Equal confidences share a bin, whatever it then holds."""
    values = np.asarray(confidence, dtype=np.float64)
    ordered = np.sort(values)
    cuts = [part[0] for part in np.array_split(ordered, min(bins, values.size))[1:]]
    return np.searchsorted(np.array(cuts), values, side="right").astype(np.intp)


def made_up(confidence: ArrayLike, places: Places) -> Vector:
    """[2]: the gaps between confidence and outcome of two answers that were not given, one right and one wrong, of the
    mean confidence of the fullest bin.

    With them no error is certain because all answers happened to be right, as with Agresti and Coull's successes and
    failures (American Statistician 52, 1998).
    """
    own = np.asarray(confidence, dtype=np.float64)[places == np.bincount(places).argmax()]
    return own.mean() - np.array([1.0, 0.0])


def calibration_error(
    confidence: ArrayLike, right: ArrayLike, places: Places, seed: int = 0, resamples: int = intervals.RESAMPLES
) -> CalibrationError:
    """Expected calibration error: the mean over questions of ``|mean confidence - share right|`` of their bin.

    ``confidence`` [n] in [0, 1], ``right`` [n] of 0 and 1, ``places`` [n] the bin of each (Naeini et al. 2015; Guo et
    al. 2017, equation 3). This plug-in estimate is biased upwards, since noise in a bin counts as a gap: by ``chance``
    for a model that is calibrated perfectly, by less for any other (Kumar et al. 2019, arXiv:1909.10155, section 5). It
    is not corrected, so that it compares with published ones; instead its interval reaches from ``chance`` and 1.96
    standard errors below it to 1.96 above it, inside [0, 1]. The standard error is the standard deviation of
    bootstrapped errors, bins held, with ``made_up`` answers among those that are drawn. Raises ValueError for values
    out of range, not finite, or none.
    """
    sure, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if sure.ndim != 1 or sure.size == 0 or sure.shape != hit.shape or hit.shape != np.shape(places):
        raise ValueError("calibration error needs a confidence, an outcome and a bin for at least one question")
    if not ((sure >= 0) & (sure <= 1)).all() or not ((hit == 0) | (hit == 1)).all():
        raise ValueError("calibration error needs confidences from 0 to 1 and outcomes of 0 or 1, none of them NaN")
    n = sure.size
    extra = made_up(sure, places)
    gaps = np.concatenate([sure - hit, extra])
    bins = np.concatenate([places, [np.bincount(places).argmax()] * len(extra)])
    in_bin = np.eye(int(np.max(places)) + 1)[bins]

    def errors(rows: Vector) -> Vector:
        """One error a row of gaps [rows, answers]: the bins' absolute sums over the number of answers."""
        return np.abs(rows @ in_bin[: rows.shape[1]]).sum(axis=1) / rows.shape[1]

    value = float(errors((sure - hit)[None])[0])
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), size=resamples)
    spread = NORMAL * float(errors(drawn * gaps).std())
    by_chance = errors(sure - (generator.random((resamples, n)) < sure))
    chance = float(by_chance.mean())
    low, high = (float(end) for end in np.quantile(by_chance, [0.025, 0.975]))
    return CalibrationError(
        value, max(0.0, value - chance - spread), min(1.0, value + spread), chance, min(low, chance), max(high, chance)
    )


@dataclass(frozen=True)
class _Answered:
    item: str
    domain: str
    confidence: float
    right: float
    brier: float


@dataclass(frozen=True)
class CalibrationErrorTask(SamplesTask):
    """Calibration of the answers to the multiple choice of the tasks before it (``sources``); it asks nothing itself.

    ``ece`` (15 bins of one width) and ``ece_adaptive`` (15 of equal mass), ``ece_by_chance`` (what ``ece`` a perfectly
    calibrated model of the same confidences shows: its mean, and the range of 95 % as its interval), ``brier`` (mean
    over questions), ``overconfidence`` (mean confidence less accuracy): over all questions, and for each domain where
    there is one source, for each source where there are several. The reliability diagram of all questions is in the
    scores too: ``reliability`` is the share of right answers of a bin, ``reliability_confidence`` its mean confidence,
    their domain the bin, such as "confidence 0.933-1.000". A sample's score is its Brier score.
    """

    kind: ClassVar[str] = "probe"
    version: ClassVar[int] = 1

    sources: tuple[str, ...] = ("multiple_choice",)
    bins: int = BINS
    seed: int = 0
    name: str = "calibration_error"
    domain: str = ""

    def run_on(self, samples: Sequence[Sample]) -> TaskResult:
        """Scores of the samples that hold the log-likelihood of each choice; none where there are none.

        Raises BrokenModel for log-likelihoods that are not finite.
        """
        found = [answered for sample in samples if (answered := self._answered(sample)) is not None]
        if not found:
            return TaskResult([], [])
        domains = list(dict.fromkeys(one.domain for one in found))
        scores = [
            score
            for domain in ("", *domains)
            for score in self._scores([one for one in found if domain in ("", one.domain)], domain)
        ]
        own = [
            Sample(
                self.name, one.item, one.brier, domain=one.domain,
                detail={"confidence": one.confidence, "right": one.right},
            )
            for one in found
        ]  # fmt: skip
        return TaskResult(scores + self._reliability(found), own)

    def _answered(self, sample: Sample) -> _Answered | None:
        # The reference task calls it the answer, lm-evaluation-harness the target.
        answer: Any = sample.detail.get("answer", sample.detail.get("target"))
        logprobs = sample.detail.get("logprobs")
        if sample.task not in self.sources or not isinstance(answer, int) or not logprobs or len(logprobs) < 2:
            return None
        try:
            chances = probabilities(logprobs)
        except ValueError as error:
            raise BrokenModel(f"{self.name}: {sample.item}: {error}; check the weights for NaN") from error
        picked = int(chances.argmax())
        domain = sample.domain if len(self.sources) == 1 else sample.task
        return _Answered(
            sample.item, domain, float(chances[picked]), float(picked == answer), brier(chances, answer)
        )  # fmt: skip

    def _scores(self, found: Sequence[_Answered], domain: str) -> list[Score]:
        sure, hit = np.array([one.confidence for one in found]), np.array([one.right for one in found])
        places = equal_width(sure, self.bins)
        fixed = calibration_error(sure, hit, places, self.seed)
        adaptive = calibration_error(sure, hit, equal_mass(sure, self.bins), self.seed)
        excess = float((sure - hit).mean())
        low, high = intervals.bootstrap_mean(np.concatenate([sure - hit, made_up(sure, places)]), self.seed)

        def score(metric: str, value: float, low: float, high: float) -> Score:
            return Score(self.name, metric, value, len(found), low, high, domain, higher_is_better=False)

        briers = [one.brier for one in found]
        return [
            score("ece", fixed.value, fixed.low, fixed.high),
            score("ece_adaptive", adaptive.value, adaptive.low, adaptive.high),
            score("ece_by_chance", fixed.chance, fixed.chance_low, fixed.chance_high),
            score("brier", float(np.mean(briers)), *intervals.bootstrap_mean(briers, self.seed)),
            score("overconfidence", excess, min(low, excess), max(high, excess)),
        ]

    def _reliability(self, found: Sequence[_Answered]) -> list[Score]:
        places = equal_width([one.confidence for one in found], self.bins)
        scores = []
        for place in sorted(set(places.tolist())):
            own = [one for one, its_place in zip(found, places, strict=True) if its_place == place]
            where = f"confidence {place / self.bins:.3f}-{(place + 1) / self.bins:.3f}"
            scores.append(share_score(self.name, "reliability", [one.right for one in own], where))
            confidences = [one.confidence for one in own]
            scores.append(mean_score(self.name, "reliability_confidence", confidences, self.seed, where))
        return scores
