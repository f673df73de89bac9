"""The story grammar and the story score."""

import itertools
import random
import re

import pytest

from tasks.reference import writing
from tasks.reference import writing_tables as tables
from tasks.reference.problem import Problem, split_of

PERFECT = {"elements": 1.0, "form": True}


def sample(split: str, count: int, seed: int = 0) -> list[Problem]:
    return list(itertools.islice(writing.problems(split, seed), count))


@pytest.fixture(scope="module")
def train() -> list[Problem]:
    return sample("train", 2000)


@pytest.fixture(scope="module")
def evaluation() -> list[Problem]:
    return sample("evaluation", 300)


def test_reference_stories_score_full_marks(train, evaluation):
    for problem in train + evaluation:
        assert writing.score(problem.answer, problem.meta["elements"]) == PERFECT, problem.text
        assert len(problem.answer.split()) <= 80
        assert not re.search(r"[{}]|\ba [aeiou]", problem.text), problem.text
        for element in problem.meta["elements"].values():
            assert f": {element}\n" in problem.prompt


def test_a_single_missing_element_is_noticed(train):
    """Each element occurs through its own slot only: no other sentence of the grammar gives it away."""
    rng = random.Random(5)
    for problem in train:
        asked = problem.meta["elements"]
        for key in writing.ELEMENTS:
            other = writing.draw_elements(rng)[key]
            if other != asked[key]:
                story = writing.write({**asked, key: other}, rng)
                assert writing.score(story, asked) == {"elements": 0.8, "form": True}, (asked, story)


def test_broken_forms_are_noticed(train):
    problem = train[0]
    story, elements = problem.answer, problem.meta["elements"]
    first = story.strip().split(". ")[0] + "."
    broken = [
        story.replace("The end.", ""),
        story + "And more.",
        f"{first} {story}",
        "The end.",
        "",
        "One. Two. The end.",
        " ".join(f"Sentence {i}." for i in range(9)) + " The end.",
        story + story,
    ]
    for text in broken:
        assert writing.score(text, elements)["form"] is False, text
    assert writing.score("Hopeless joyful people. The end.", {"a": "hope", "b": "joy"})["elements"] == 0.0


def test_the_grammar_is_large_enough(train):
    assert writing.count_stories() >= 1_000_000
    assert len({problem.answer for problem in train}) == len(train)
    assert {p.answer.count(".") for p in train} == {6, 7}  # five or six sentences and "The end."
    assert len(set(tables.ROLES)) >= 24
    for table, least in ((tables.PLACES, 24), (tables.THINGS, 24), (tables.FEELINGS, 12), (tables.ENDS, 16)):
        assert len(set(table)) == len(table) >= least


def test_deterministic_and_seeded(train):
    assert sample("train", 20) == train[:20]
    assert sample("train", 20, seed=1) != train[:20]


def test_splits_are_disjoint_and_pairs_held_out(train, evaluation):
    calibration = sample("calibration", 60)

    def pairs(part: list[Problem]) -> set[str]:
        return {p.meta["elements"]["who"].split()[-1] + "|" + p.meta["elements"]["thing"] for p in part}

    for name, part in (("train", train), ("evaluation", evaluation), ("calibration", calibration)):
        assert {split_of(p.prompt, writing.composition_key(p)) for p in part} == {name}
    assert not pairs(train + calibration) & pairs(evaluation)
    assert len(pairs(evaluation)) >= 40
    assert not {p.id for p in train} & {p.id for p in evaluation + calibration}
    assert len({p.id for p in evaluation}) == len(evaluation)
    for key in ("thing", "where", "feeling", "end"):
        assert {p.meta["elements"][key] for p in evaluation} <= {p.meta["elements"][key] for p in train}


def test_distractors_swap_at_least_two_elements(train):
    for problem in train[:300]:
        wrong = writing.distractors(problem, random.Random(3))
        assert wrong == writing.distractors(problem, random.Random(3))
        assert len(set(wrong)) == 3
        for story in wrong:
            result = writing.score(story, problem.meta["elements"])
            assert result["form"] and result["elements"] <= 0.6
            assert story.startswith(" ") and story.endswith("The end.\n")
