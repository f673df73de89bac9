import random
import re
from collections import Counter
from itertools import islice

import pytest

from tasks.reference import knowledge
from tasks.reference.problem import SPLITS

TRAIN_DOCUMENTS = 20_000


@pytest.fixture(scope="module")
def train():
    return list(islice(knowledge.problems("train"), TRAIN_DOCUMENTS))


@pytest.fixture(scope="module")
def told(train):
    """(entity, relation) -> words the training passages state of it, read from their text alone."""
    stated = {}
    for problem in train:
        match = re.fullmatch(r"About (\w+) \((.*)\):", problem.prompt)
        if match:
            sentences = problem.answer.strip().rstrip(".").split(". ")
            relations = match[2].split(", ")
            assert len(sentences) == len(relations)
            for relation, sentence in zip(relations, sentences, strict=True):
                assert match[1] in sentence
                stated.setdefault((match[1], relation), []).append(set(re.findall(r"\w+", sentence)))
    return stated


def first(split, count, seed=0):
    return list(islice(knowledge.problems(split, seed), count))


@pytest.mark.parametrize("split", SPLITS)
def test_stream_depends_on_split_and_seed_alone(split):
    assert first(split, 200) == first(split, 200)
    assert first(split, 200) != first(split, 200, seed=1)


def test_world_is_the_recorded_one():
    """The trained model knows these facts: a change of the world makes its checkpoint worthless."""
    assert len(knowledge.FACTS) == 806
    assert knowledge.FACTS["Kimusha", "job"] == "fisher"
    assert knowledge.FACTS["Niledun", "river"] == "Milussa"
    assert knowledge.FACTS["Vavathir", "source"] == "coast"


def test_names_are_unique_and_no_name_hides_in_another():
    names = [name for group in knowledge.NAMES.values() for name in group]
    assert len(set(names)) == len(names) == 200
    assert not [(a, b) for a in names for b in names if a != b and a.lower() in b.lower()]


def test_value_lists_have_no_repeats():
    for relations in knowledge.RELATIONS.values():
        for relation in relations:
            assert 12 <= len(relation.pool) == len(set(relation.pool)) <= 30


def test_splits_share_no_prompt(train):
    prompts = {split: {p.id for p in first(split, 1500)} for split in ("calibration", "evaluation")}
    prompts["train"] = {p.id for p in train}
    assert not prompts["train"] & prompts["calibration"]
    assert not prompts["train"] & prompts["evaluation"]
    assert not prompts["calibration"] & prompts["evaluation"]


def test_evaluation_asks_in_ways_training_never_does(train):
    def ways(problems):
        one = {(p.meta["entity"], p.meta["relation"], p.meta["phrasing"]) for p in problems if p.meta["steps"] == 1}
        two = {(p.meta["entity"], p.meta["relation"]) for p in problems if p.meta["steps"] == 2}
        return one | two

    asked = ways(p for p in train if p.meta["kind"] == "question")
    held_out = ways(first("evaluation", 1500))
    assert len(held_out) > 400
    assert not asked & held_out


def test_training_states_every_fact_and_asks_most(train, told):
    assert set(told) == set(knowledge.FACTS)
    assert min(len(sentences) for sentences in told.values()) >= 15
    asked = {(p.meta["entity"], p.meta["relation"]) for p in train if p.meta["kind"] == "question"}
    assert len(set(knowledge.FACTS) & asked) > 0.95 * len(knowledge.FACTS)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_training_passages(split, told):
    def value(entity, relation, pool):
        words = set.intersection(*told[entity, relation])
        [found] = (words & set(pool)) - {entity}
        return found

    places = {name for kind in ("town", "river") for name in knowledge.NAMES[kind]}
    checked = Counter()
    for problem in first(split, 1000):
        if problem.meta["kind"] == "question":
            entity = problem.meta["entity"]
            assert entity in problem.prompt
            *steps, last = problem.meta["relation"].split(">")
            for step in steps:
                entity = value(entity, step, places)
                assert entity not in problem.prompt
            assert problem.answer == f" {value(entity, last, problem.meta['choices_pool'])}\n"
            checked[len(steps)] += 1
    assert checked[0] > 20 and checked[1] > 20


def test_mixture(train):
    questions = [p for p in train if p.meta["kind"] == "question"]
    assert 0.58 < 1 - len(questions) / len(train) < 0.62
    assert 0.08 < sum(p.meta["steps"] == 2 for p in questions) / len(questions) < 0.12
    assert all(p.meta["kind"] == "question" for p in first("evaluation", 500))


def test_evaluation_does_not_repeat_before_it_must():
    problems = first("evaluation", 450)
    assert len({p.id for p in problems}) == 450


def test_distractors_are_other_values_of_the_relation():
    rng = random.Random("distractors")
    for problem in first("evaluation", 300):
        wrong = knowledge.distractors(problem, rng)
        assert len({problem.answer, *wrong}) == 4
        assert {text.strip() for text in wrong} <= set(problem.meta["choices_pool"])
