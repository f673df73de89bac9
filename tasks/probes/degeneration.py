"""Diagnostics of what a model wrote for the other tasks: is there any text, how long, does it loop or repeat itself?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from harness.contracts.record import Sample, Score
from harness.contracts.task import SamplesTask, TaskResult
from tasks.probes.diversity import SOURCES, WORD, ngrams
from tasks.scores import mean_score, share_score

LONGEST_PHRASE = 20  # words
TIMES = 4
SHORTEST_LOOP = 16  # words


def loop_length(text: str) -> int:
    """How many words the loop is long that ``text`` ends in; 0 where it ends in none.

    The rule: the text ends in one phrase of at most 20 words that stands at least 4 times in a row (the last time it
    may break off), 16 words or more in all. Marks of punctuation are words too. A text that has left its loop, such as
    a list of zeros with its closing bracket, ends in none; a model that cannot leave it writes until it is cut off.
    """
    words = WORD.findall(text)[::-1]
    longest = 0
    for phrase in range(1, LONGEST_PHRASE + 1):
        again = 0
        while phrase + again < len(words) and words[again] == words[again + phrase]:
            again += 1
        length = phrase + again
        if length >= max(TIMES * phrase, SHORTEST_LOOP):
            longest = max(longest, length)
    return longest


def self_repetition(texts: Sequence[str], n: int = 4) -> list[float | None]:
    """For each text the share of its n-grams that stand in some other of the texts too; None where it has none.

    n-grams that a system repeats across its outputs are what Salkar et al. 2022 count ("Self-Repetition in Abstractive
    Neural Summarizers", with n = 4 and more); a share of them does not grow with a text's length.
    """
    own = [Counter(ngrams(text, n)) for text in texts]
    holders = Counter(gram for counts in own for gram in counts)
    return [
        sum(times for gram, times in counts.items() if holders[gram] > 1) / counts.total() if counts else None
        for counts in own
    ]


@dataclass(frozen=True)
class GenerationTask(SamplesTask):
    """``degenerate``: the share of texts that end in a loop (``loop_length``); ``empty``: that hold no word;
    ``length``: mean number of words; ``self_repetition``: mean share of a text's 4-grams that another text of its
    source has too.

    It has no prompts of its own: ``run_on`` takes the samples of the tasks that write (``sources``), so it runs after
    them. Scores come for each source and over all. A sample's score is 1.0 for a degenerate text.
    """

    kind: ClassVar[str] = "probe"
    version: ClassVar[int] = 1

    sources: tuple[str, ...] = SOURCES
    seed: int = 0
    name: str = "generation"
    domain: str = ""

    def run_on(self, samples: Sequence[Sample]) -> TaskResult:
        measured = [
            self._sample(sample, repeated)
            for source in self.sources
            if (written := [sample for sample in samples if sample.task == source])
            for sample, repeated in zip(written, self_repetition([s.output for s in written]), strict=True)
        ]
        found = list(dict.fromkeys(sample.domain for sample in measured))
        scores = [
            score
            for source in ("", *found)
            for score in self._scores([s for s in measured if source in ("", s.domain)], source)
        ]
        return TaskResult(scores, measured)

    def _sample(self, sample: Sample, repeated: float | None) -> Sample:
        words, loop = len(WORD.findall(sample.output)), loop_length(sample.output)
        detail = {"words": words, "loop": loop, "self_repetition": repeated}
        return Sample(self.name, sample.item, float(loop > 0), domain=sample.task, detail=detail)

    def _scores(self, measured: Sequence[Sample], source: str) -> list[Score]:
        if not measured:
            return []
        words = [float(sample.detail["words"]) for sample in measured]
        repeated = [value for s in measured if (value := s.detail["self_repetition"]) is not None]
        scores = [
            share_score(self.name, "degenerate", [sample.score for sample in measured], source),
            share_score(self.name, "empty", [float(count == 0) for count in words], source),
            *([mean_score(self.name, "self_repetition", repeated, self.seed, source)] if repeated else []),
        ]
        length = mean_score(self.name, "length", words, self.seed, source)
        return [*(replace(score, higher_is_better=False) for score in scores), length]
