"""Questions with four answers, scored by the log-likelihood of each, as lm-evaluation-harness does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, Need, TaskResult
from tasks.reference import choices
from tasks.reference.choices import Choice
from tasks.reference.items import first_distinct
from tasks.scores import require_finite, share_score

DOMAINS = ("knowledge", "code", "math", "writing")


@lru_cache(maxsize=32)
def evaluation_questions(domain: str, items: int, seed: int) -> tuple[Choice, ...]:
    """The first distinct evaluation questions of a domain, the same for every cell."""
    stream = choices.questions(domain, "evaluation", seed)
    return first_distinct(stream, items, lambda choice: choice.question, f"multiple choice on {domain}")


def _best(values: Sequence[float]) -> int:
    """The index of the largest value, the first of them where there are several."""
    return max(range(len(values)), key=lambda i: values[i])


def pick(logprobs: Sequence[float], texts: Sequence[str]) -> tuple[int, int]:
    """What the model picks by log-likelihood (``acc``), and by log-likelihood a character (``acc_norm``).

    The length is that of the answer in characters, without the space that parts it from the question: so
    counts lm-evaluation-harness (``TaskConfig.target_delimiter``).
    """
    lengths = [max(1, len(text.removeprefix(" "))) for text in texts]
    return _best(logprobs), _best([logprob / n for logprob, n in zip(logprobs, lengths, strict=True)])


@dataclass(frozen=True)
class MultipleChoiceTask(ModelTask):
    """``acc`` and ``acc_norm`` for each domain, and over all questions. A sample's score is its ``acc``.

    ``items`` is the number of questions in each domain.
    """

    kind: ClassVar[str] = "choice"
    version: ClassVar[int] = 1

    items: int = 250
    seed: int = 0
    domains: tuple[str, ...] = DOMAINS
    name: str = "multiple_choice"
    domain: str = "knowledge"

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return Need(counter.longest_pair(_pairs(self._questions())))

    def run(self, backend: Backend) -> TaskResult:
        questions = self._questions()
        results = backend.loglikelihood(_pairs(questions), progress=f"{self.name}: scoring")
        require_finite(results, self.name)
        logprobs = iter(result.logprob for result in results)
        samples = []
        for question in questions:
            own = [next(logprobs) for _ in question.choices]
            picked, picked_norm = pick(own, question.choices)
            detail = {
                "acc_norm": float(picked_norm == question.answer), "picked": picked,
                "picked_norm": picked_norm, "answer": question.answer, "logprobs": own,
            }  # fmt: skip
            samples.append(
                Sample(
                    self.name,
                    question.id,
                    float(picked == question.answer),
                    domain=question.domain,
                    output=question.choices[picked],
                    detail=detail,
                )  # fmt: skip
            )
        scores = []
        for domain in ("", *self.domains):
            own_samples = [sample for sample in samples if domain in ("", sample.domain)]
            right = [sample.score for sample in own_samples]
            right_norm = [float(sample.detail["acc_norm"]) for sample in own_samples]
            scores.append(share_score(self.name, "acc", right, domain))
            scores.append(share_score(self.name, "acc_norm", right_norm, domain))
        return TaskResult(scores, samples)

    def _questions(self) -> list[Choice]:
        return [q for domain in self.domains for q in evaluation_questions(domain, self.items, self.seed)]


def _pairs(questions: Sequence[Choice]) -> list[tuple[str, str]]:
    return [(question.question, text) for question in questions for text in question.choices]
