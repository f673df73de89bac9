"""The word problems: right equations on the numbers of the text, and splits that keep compositions apart."""

import itertools
import random
import re
from collections import Counter

import pytest

from tasks.reference import math
from tasks.reference.problem import Problem, split_of

WORDS = {"twice": 2, "half": 2, "again": 2, "doubles": 2, "double": 2}


def sample(split: str, count: int, seed: int = 0) -> list[Problem]:
    return list(itertools.islice(math.problems(split, seed), count))


@pytest.fixture(scope="module")
def train() -> list[Problem]:
    return sample("train", 2500)


@pytest.fixture(scope="module")
def evaluation() -> list[Problem]:
    return sample("evaluation", 250)


def numbers_in_text(prompt: str) -> list[int]:
    """The numbers a reader meets, in order, words such as "half" included (each says what to do once)."""
    found = re.findall(r"\d+|[a-z]+", prompt)
    return [int(t) if t.isdigit() else WORDS[t] for t in found if t.isdigit() or t in WORDS]


def check(problem: Problem) -> None:
    lines = problem.answer.strip().split("\n")
    text = Counter(numbers_in_text(problem.prompt))
    results: list[int] = []
    for line in lines[:-1]:
        left, op, right, equals, result = line.split()
        value = {
            "+": int(left) + int(right),
            "-": int(left) - int(right),
            "*": int(left) * int(right),
            "/": int(left) / int(right),
        }[op]
        assert equals == "=" and value == int(result) and 1 <= value <= 99, problem.text
        if results:
            assert results[-1] in (int(left), int(right)), problem.text
        operands = Counter([int(left), int(right)])
        text -= operands - Counter(results[-1:])
        results.append(int(result))
    assert not text, f"numbers of the text left unused: {text} in {problem.text}"
    assert lines[-1] == f"#### {results[-1]}"
    assert problem.meta["answer"] == results[-1]
    assert problem.meta["steps"] == len(results) == len(problem.meta["step_types"])


def test_answers_follow_from_the_text(train, evaluation):
    for problem in train + evaluation:
        check(problem)


def test_numbers_of_the_equations_stand_in_the_text_in_order(train):
    for problem in train:
        told = numbers_in_text(problem.prompt)
        previous = None
        for left, _, right, result in math.parse_equations(problem.answer):
            new = [left, right] if previous is None else [left if left != previous else right]
            for number in sorted(new, key=lambda n: told.index(n) if n in told else 99):
                assert number in told, problem.text
                told = told[told.index(number) + 1 :]
            previous = result


def test_layout(train):
    for problem in train[:500]:
        assert re.fullmatch(r"Question: [A-Z0-9][^\n{}\[\]|]*\?\nAnswer:", problem.prompt)
        assert problem.answer.startswith(" ") and problem.answer.endswith("\n")
        assert "None" not in problem.prompt


def test_deterministic_and_seeded(train):
    assert sample("train", 20) == train[:20]
    assert sample("train", 20, seed=1) != train[:20]


def test_splits_are_disjoint_and_compositions_held_out(train, evaluation):
    calibration = sample("calibration", 60)
    for name, part in (("train", train), ("evaluation", evaluation), ("calibration", calibration)):
        assert {split_of(p.prompt, "math:" + ">".join(p.meta["step_types"])) for p in part} == {name}
    learned = {tuple(p.meta["step_types"]) for p in train + calibration}
    assert not learned & {tuple(p.meta["step_types"]) for p in evaluation}
    assert len({p.prompt for p in evaluation}) == len(evaluation)
    assert not {p.id for p in train} & {p.id for p in evaluation + calibration}


def test_there_are_many_compositions_and_their_parts_are_common(train, evaluation):
    grammar = math.compositions()
    assert len(grammar) >= 500
    drawn = {tuple(p.meta["step_types"]) for p in train + evaluation}
    assert drawn <= grammar
    assert len(drawn) >= 500
    assert {p.meta["steps"] for p in evaluation} == {2, 3, 4}
    seen = {pair for p in train for pair in itertools.pairwise(p.meta["step_types"])}
    new = [pair for p in evaluation for pair in itertools.pairwise(p.meta["step_types"]) if pair not in seen]
    assert len(new) <= 0.05 * sum(p.meta["steps"] - 1 for p in evaluation)


def test_distractors_are_wrong_but_consistent(train):
    for problem in train[:400]:
        wrong = math.distractors(problem, random.Random(7))
        assert wrong == math.distractors(problem, random.Random(7))
        assert len(set(wrong)) == 3
        finals = {text.strip().split("#### ")[1] for text in wrong}
        assert len(finals) == 3 and str(problem.meta["answer"]) not in finals
        for text in wrong:
            equations = math.parse_equations(text)
            assert len(equations) == problem.meta["steps"]
            assert all(math.calculate(left, op, right) == result for left, op, right, result in equations)
            assert all(a[3] in (b[0], b[2]) for a, b in itertools.pairwise(equations))
            assert text.endswith(f"= {equations[-1][3]}\n#### {equations[-1][3]}\n")
