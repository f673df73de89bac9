"""The code problems: the two writings of each primitive agree, answers pass, splits stay apart."""

import copy
import json
import random
from itertools import islice
from typing import Any

import pytest

from tasks.reference.code import _input, distractors, problems, run_steps
from tasks.reference.primitives import PRIMITIVES
from tasks.reference.problem import SPLITS, Problem, Split


def take(split: Split, count: int, seed: int = 0) -> list[Problem]:
    return list(islice(problems(split, seed), count))


def failures(problem: Problem, answer: str) -> int:
    """How many of its tests the function written out from prompt and answer fails."""
    scope: dict[str, Any] = {}
    exec(problem.prompt + answer, scope)
    return sum(scope["f"](value) != expected for value, expected in copy.deepcopy(problem.meta["tests"]))


def test_there_are_at_least_sixty_primitives_with_a_few_phrasings():
    assert len(PRIMITIVES) >= 60
    assert all(2 <= len(p.phrases) <= 3 for p in PRIMITIVES.values())


def test_a_phrase_names_one_operation():
    """Given the type at hand, no two operations with their constants are described in the same words."""
    meanings: dict[tuple[str, str], str] = {}
    for p in PRIMITIVES.values():
        for constant in p.constants:
            for phrase in p.phrases:
                text = phrase.replace("@", str(constant))
                key = (p.takes, "return " + text[5:] if text.startswith("take ") else text)
                assert meanings.setdefault(key, p.expression(constant)) == p.expression(constant), key


@pytest.mark.parametrize("name", PRIMITIVES)
def test_code_agrees_with_reference(name: str):
    p = PRIMITIVES[name]
    rng = random.Random(f"agree-{name}")
    python_type = {"n": int, "s": str, "xs": list, "ws": list, "d": dict}[p.gives]
    changed = 0
    for i in range(40):
        value, constant = _input(p.takes, rng, edge=i < 2), rng.choice(p.constants)
        out = eval(p.expression(constant), {p.takes: value})
        expected = p.ref(value, constant)
        assert out == expected, (value, constant)
        assert type(expected) is python_type
        if python_type is list:
            assert all(type(item) is (int if p.gives == "xs" else str) for item in expected)
        changed += expected != value
    assert changed, "the operation does nothing on any input"


@pytest.mark.parametrize("split", SPLITS)
def test_answers_pass_their_tests(split: Split):
    for problem in take(split, 70):
        assert len(problem.meta["tests"]) >= 8
        assert failures(problem, problem.answer) == 0, problem.text
        assert json.loads(json.dumps(problem.meta, sort_keys=True)) == problem.meta
        outputs = [expected for _, expected in problem.meta["tests"]]
        assert any(out != outputs[0] for out in outputs)
        assert any(value != out for value, out in problem.meta["tests"])


def test_layout():
    for problem in take("train", 200):
        assert problem.prompt.startswith("def f(") and problem.prompt.endswith('."""')
        assert problem.answer.startswith("\n    ") and problem.answer.endswith("\n")
        lines = problem.answer.strip().split("\n")
        assert len(lines) == problem.meta["depth"] == len(problem.meta["primitives"])
        assert lines[-1].strip().startswith("return ")


def test_depth_mix():
    depths = [problem.meta["depth"] for problem in take("train", 400)]
    for depth, share in {1: 0.2, 2: 0.4, 3: 0.4}.items():
        assert abs(depths.count(depth) / 400 - share) < 0.06


def test_stream_is_deterministic_and_depends_on_the_seed():
    assert take("train", 30) == take("train", 30)
    assert take("train", 30) != take("train", 30, seed=1)


def test_splits_are_disjoint_and_evaluation_holds_out_compositions():
    drawn = {split: take(split, 250) for split in SPLITS}
    prompts = {split: {p.prompt for p in drawn[split]} for split in SPLITS}
    assert len(prompts["evaluation"]) == len(prompts["calibration"]) == 250
    assert not prompts["train"] & prompts["evaluation"]
    assert not prompts["train"] & prompts["calibration"]
    assert not prompts["calibration"] & prompts["evaluation"]
    chains = {split: {tuple(p.meta["primitives"]) for p in drawn[split] if p.meta["depth"] > 1} for split in SPLITS}
    assert chains["evaluation"] and not chains["evaluation"] & (chains["train"] | chains["calibration"])


def test_distractors_are_distinct_and_fail():
    for problem in take("evaluation", 80):
        wrong = distractors(problem, random.Random("distract"))
        assert len(set(wrong)) == 3 and problem.answer not in wrong
        assert all(failures(problem, answer) for answer in wrong)
        assert wrong == distractors(problem, random.Random("distract"))


def test_oversized_values_are_refused():
    square = (PRIMITIVES["square"], None)
    assert run_steps([square], 999) == 998001
    assert run_steps([square, square], 999) is None
