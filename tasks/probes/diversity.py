"""N-gram diversity of what a model wrote for the other tasks: does it repeat itself, and across samples?"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from harness.contracts import intervals
from harness.contracts.record import Sample, Score
from harness.contracts.task import SamplesTask, TaskResult
from tasks.scores import mean_score, text_of

WORD = re.compile(r"\w+|[^\w\s]")
SOURCES = ("code", "math", "writing")


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams over the words and punctuation marks of ``text``, in order."""
    words = WORD.findall(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def diversity(text: str, n: int) -> float | None:
    """Different n-grams over all n-grams of one text, in (0, 1]; None where it has none."""
    grams = ngrams(text, n)
    return len(set(grams)) / len(grams) if grams else None


def distinct(texts: Sequence[str], n: int) -> tuple[float, list[float]] | None:
    """distinct-n (Li et al. 2016): different n-grams over all n-grams of the texts together.

    Also the same without each text in turn, for the jackknife: an n-gram is lost with the only text that has
    it. None for fewer than two texts with n-grams.
    """
    counts = [Counter(grams) for text in texts if (grams := ngrams(text, n))]
    if len(counts) < 2:
        return None
    holders = Counter(gram for count in counts for gram in count)
    total = sum(count.total() for count in counts)
    left_out = [
        (len(holders) - sum(holders[gram] == 1 for gram in count)) / (total - count.total()) for count in counts
    ]
    return len(holders) / total, left_out


@dataclass(frozen=True)
class DiversityTask(SamplesTask):
    """``ngram_diversity_n``: different n-grams over all in a sample, averaged; ``distinct_n``: in all of it.

    It has no prompts of its own: ``run_on`` takes the samples of the tasks that write (``sources``), so it
    runs after them. Scores come for each source and over all. Texts shorter than n words have no n-grams and
    do not count: a score's ``n`` says how many did, and a score that none has is left out.
    """

    kind: ClassVar[str] = "probe"
    version: ClassVar[int] = 1

    orders: tuple[int, ...] = (2, 3, 4)
    sources: tuple[str, ...] = SOURCES
    seed: int = 0
    name: str = "diversity"
    domain: str = ""

    def run_on(self, samples: Sequence[Sample]) -> TaskResult:
        """Scores of the texts in ``samples``; a sample's own score is the mean of its diversities."""
        written = [sample for sample in samples if sample.task in self.sources]
        found = [source for source in self.sources if any(sample.task == source for sample in written)]
        scores = [
            score
            for source in ("", *found)
            for n in self.orders
            for score in self._scores([text_of(s) for s in written if source in ("", s.task)], n, source)
        ]
        return TaskResult(scores, [own for sample in written if (own := self._sample(sample)) is not None])

    def _scores(self, texts: list[str], n: int, source: str) -> list[Score]:
        each = [value for text in texts if (value := diversity(text, n)) is not None]
        scores = [mean_score(self.name, f"ngram_diversity_{n}", each, self.seed, source)] if each else []
        together = distinct(texts, n)
        if together is not None:
            value, left_out = together
            low, high = intervals.jackknife(value, left_out)
            low, high = max(0.0, low), min(1.0, high)
            scores.append(Score(self.name, f"distinct_{n}", value, len(left_out), low, high, source))
        return scores

    def _sample(self, sample: Sample) -> Sample | None:
        values = {str(n): value for n in self.orders if (value := diversity(text_of(sample), n)) is not None}
        if not values:
            return None
        return Sample(self.name, sample.item, sum(values.values()) / len(values), domain=sample.task, detail=values)
