from collections import Counter
from itertools import islice

import pytest

from tasks.reference import choices, knowledge
from tasks.reference.problem import Problem

DOMAINS = ("knowledge", "code", "math", "writing")


def first(domain, count, split="evaluation", seed=0):
    return list(islice(choices.questions(domain, split, seed), count))


@pytest.mark.parametrize("domain", DOMAINS)
def test_stream_depends_on_its_arguments_alone(domain):
    assert first(domain, 40) == first(domain, 40)
    assert first(domain, 40) != first(domain, 40, seed=1)


@pytest.mark.parametrize("domain", DOMAINS)
def test_right_answer_is_that_of_the_problem(domain):
    stream = choices.GENERATORS[domain].problems("evaluation", 0)
    for choice, problem in zip(first(domain, 100), stream, strict=False):
        assert (choice.domain, choice.question) == (domain, problem.prompt)
        assert choice.choices[choice.answer].rstrip("\n") == problem.answer.rstrip("\n")
        assert len(set(choice.choices)) == 4


@pytest.mark.parametrize("domain", DOMAINS)
def test_position_of_the_right_answer_is_uniform(domain):
    positions = Counter(choice.answer for choice in first(domain, 400))
    assert set(positions) == {0, 1, 2, 3}
    assert min(positions.values()) > 60


def test_knowledge_continuations_are_bare_values():
    for choice in first("knowledge", 200):
        assert choice.question.endswith("\nAnswer:")
        for text in choice.choices:
            assert text.startswith(" ") and text == text.rstrip()


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_passages_are_no_questions(split):
    assert all(choice.question.startswith("Question:") for choice in first("knowledge", 100, split))


def test_ids_tell_choices_apart():
    found = first("knowledge", 450)
    assert len({choice.id for choice in found}) == 450
    swapped = choices.Choice("knowledge", found[0].question, found[0].choices[::-1], 3 - found[0].answer)
    assert swapped.id != found[0].id


def test_unknown_domain_is_refused():
    with pytest.raises(ValueError, match="unknown domain 'cooking'; known: knowledge"):
        next(choices.questions("cooking"))


def test_bad_distractors_are_refused(monkeypatch):
    problem = Problem("knowledge", "Question: ?\nAnswer:", " salt\n")
    monkeypatch.setattr(knowledge, "distractors", lambda problem, rng, count: [" salt\n", " wool\n", " iron\n"])
    with pytest.raises(ValueError, match="3 different wrong answers"):
        choices.choice_from(problem, None)
