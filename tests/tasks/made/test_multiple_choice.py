import math

import pytest

from harness.errors import WinnowError
from tasks.made.multiple_choice import DOMAINS, MultipleChoiceTask, evaluation_questions, pick
from tests.tasks.scripted import ScriptedBackend

ITEMS = 6
QUESTIONS = {q.question: q for domain in DOMAINS for q in evaluation_questions(domain, ITEMS, 0)}


def is_right(context: str, continuation: str) -> bool:
    question = QUESTIONS[context]
    return question.choices[question.answer] == continuation


def test_a_model_that_knows_is_right_in_every_domain() -> None:
    backend = ScriptedBackend(score=lambda c, t: -1.0 if is_right(c, t) else -1000.0)
    result = MultipleChoiceTask(items=ITEMS).run(backend)
    scores = {(score.metric, score.part): score for score in result.scores}
    assert set(scores) == {(metric, domain) for metric in ("acc", "acc_norm") for domain in ("", *DOMAINS)}
    assert all(score.value == 1.0 for score in result.scores)
    assert scores["acc", ""].n == 4 * ITEMS and scores["acc", "code"].n == ITEMS
    assert [sample.item for sample in result.samples] == [question.id for question in QUESTIONS.values()]
    assert backend.calls == [("multiple_choice: scoring", 16 * ITEMS)]


def test_a_model_that_knows_one_domain_is_right_there() -> None:
    def score(context: str, continuation: str) -> float:
        knows = QUESTIONS[context].domain == "math"
        return -1.0 if is_right(context, continuation) is knows else -1000.0

    result = MultipleChoiceTask(items=ITEMS).run(ScriptedBackend(score=score))
    values = {score.part: score.value for score in result.scores if score.metric == "acc"}
    assert values == {"": 0.25, "knowledge": 0.0, "code": 0.0, "math": 1.0, "writing": 0.0}
    assert {s.domain for s in result.samples if s.score == 1.0} == {"math"}


def test_the_norm_divides_by_characters_without_the_leading_space() -> None:
    # Per character -1/2, -3/4, -2/3, -10/9: the sums favour the first, the norm too; then not.
    assert pick([-1.0, -3.0, -2.0, -10.0], [" ab", " abcd", " abc", " abcdefghi"]) == (0, 0)
    assert pick([-2.0, -3.0, -2.5, -10.0], [" ab", " abcdefgh", " abc", " abcde"]) == (0, 1)
    # -1.9 over 2 characters against -2.8 over 3; counting the space would turn it round.
    assert pick([-1.9, -2.84], [" ab", " abc"]) == (0, 1) and pick([-1.9, -2.86], [" ab", " abc"]) == (0, 0)
    assert pick([-1.0, -1.0], [" a", " b"]) == (0, 0)


def test_samples_hold_both_outcomes_and_every_log_likelihood() -> None:
    result = MultipleChoiceTask(items=ITEMS).run(ScriptedBackend(score=lambda c, t: -float(len(t))))
    for sample in result.samples:
        question = next(q for q in QUESTIONS.values() if q.id == sample.item)
        shortest = min(range(4), key=lambda i: len(question.choices[i]))
        assert sample.detail["picked"] == shortest and sample.score == float(shortest == question.answer)
        assert sample.detail["logprobs"] == [-float(len(choice)) for choice in question.choices]
    norm = sum(sample.detail["acc_norm"] for sample in result.samples) / len(result.samples)
    assert norm == next(s.value for s in result.scores if s.metric == "acc_norm" and s.part == "")


def test_chosen_domains_alone() -> None:
    result = MultipleChoiceTask(items=ITEMS, domains=("math",)).run(ScriptedBackend())
    assert {sample.domain for sample in result.samples} == {"math"}


def test_nan_is_an_error_and_no_answer() -> None:
    with pytest.raises(WinnowError, match="not finite"):
        MultipleChoiceTask(items=ITEMS).run(ScriptedBackend(score=lambda c, t: math.nan))
