"""Consistency with models from a script: what they know, and what they answer when asked in another way."""

import math
import re

import pytest

from harness.errors import BrokenModel
from tasks.probes.consistency import (
    COMPLEMENT,
    FORMS,
    ConsistencyTask,
    Question,
    Wording,
    ask,
    evaluation_questions,
    listed,
    rotations,
)
from tasks.reference import code, knowledge
from tasks.reference.knowledge import FACTS
from tests.tasks.scripted import ScriptedBackend

ITEMS = 12
RIGHT = {
    (wording.context, text)
    for form in FORMS
    for question in evaluation_questions(form, ITEMS, 0)
    for wording in question.wordings
    for text, means in zip(wording.continuations, wording.means, strict=True)
    if means == question.answer
}


def run(score, forms: tuple[str, ...] = tuple(FORMS)):
    result = ConsistencyTask(items=ITEMS, forms=forms).run(ScriptedBackend(score=score))
    return {(s.metric, s.part): s.value for s in result.scores}, result


def test_a_model_that_knows_is_consistent_in_every_form() -> None:
    scores, result = run(lambda context, text: float((context, text) in RIGHT))
    assert set(scores) == {(metric, form) for metric in ("consistent", "acc", "all_right") for form in FORMS}
    assert set(scores.values()) == {1.0} and len(result.samples) == 4 * ITEMS
    assert len({(s.task, s.item) for s in result.samples}) == 4 * ITEMS
    assert all(s.low <= s.value <= s.high and s.n == ITEMS for s in result.scores)


def test_a_model_that_is_always_wrong_in_the_same_way_is_consistent_too() -> None:
    scores, _ = run(lambda context, text: -float((context, text) in RIGHT), ("negation_code",))
    assert scores == {
        ("consistent", "negation_code"): 1.0, ("acc", "negation_code"): 0.0, ("all_right", "negation_code"): 0.0
    }  # fmt: skip


def test_a_model_that_does_not_read_the_negation_contradicts_itself() -> None:
    # The same program for both: right once, never complementary.
    scores, _ = run(lambda context, text: float(len(text)), ("negation_code",))
    assert scores["consistent", "negation_code"] == 0.0 and scores["acc", "negation_code"] == 0.5


def test_a_model_that_takes_what_is_listed_first_is_never_consistent() -> None:
    def first_listed(context: str, text: str) -> float:
        return -context.index(text.strip(), context.rindex(":", 0, context.index("\nAnswer:")))

    scores, _ = run(first_listed, ("permutation_knowledge",))
    assert scores["consistent", "permutation_knowledge"] == 0.0
    assert scores["acc", "permutation_knowledge"] == pytest.approx(0.25), "each choice was first once"
    assert scores["all_right", "permutation_knowledge"] == 0.0


def test_rates_and_accuracies_are_counted_apart() -> None:
    def question(name: str, *right: str) -> Question:
        return Question(
            name, "form", tuple(Wording(f"{name}{i} {w}", (" a", " b"), (0, 1)) for i, w in enumerate(right)), 1
        )

    given = [question("p", "b", "b"), question("q", "a", "a"), question("r", "a", "b")]
    backend = ScriptedBackend(score=lambda context, text: float(context[-1] == text.strip()))
    result = ask(backend, "task", given)
    assert {s.metric: s.value for s in result.scores} == {
        "consistent": pytest.approx(2 / 3), "acc": pytest.approx(0.5), "all_right": pytest.approx(1 / 3)
    }  # fmt: skip
    assert [s.detail["picked"] for s in result.samples] == [[1, 1], [0, 0], [0, 1]]
    assert [s.score for s in result.samples] == [1.0, 1.0, 0.0]
    assert result.samples[0].detail["logprobs"] == [[0.0, 1.0], [0.0, 1.0]]
    with pytest.raises(BrokenModel, match="not finite"):
        ask(ScriptedBackend(score=lambda c, t: math.nan), "task", given)


def test_paraphrases_of_a_fact_ask_for_the_same_fact() -> None:
    facts = {problem.prompt: problem.meta for problem, _ in knowledge.one_step_questions()}
    facts |= {problem.prompt: problem.meta for problem, _ in knowledge.two_step_questions()}
    seen = set()
    for question in evaluation_questions("paraphrase_knowledge", 60, 0):
        asked = [facts[wording.context] for wording in question.wordings]
        assert len({(meta["entity"], meta["relation"], meta["value"]) for meta in asked}) == 1
        assert len({wording.context for wording in question.wordings}) == (3 if asked[0]["steps"] == 1 else 2)
        assert {wording.continuations[question.answer] for wording in question.wordings} == {f" {asked[0]['value']}"}
        seen.add((asked[0]["entity"], asked[0]["relation"]))
        if asked[0]["steps"] == 1:
            assert FACTS[asked[0]["entity"], asked[0]["relation"]] == asked[0]["value"]
    assert len(seen) == 60, "no fact twice"


def test_paraphrases_of_a_program_differ_in_every_step_and_keep_the_constants() -> None:
    problems = {problem.prompt for _, problem in zip(range(60), code.problems("evaluation"), strict=False)}
    for question in evaluation_questions("paraphrase_code", 40, 0):
        first, second = (wording.context for wording in question.wordings)
        assert first in problems and first.splitlines()[0] == second.splitlines()[0]
        steps = [text.split('"""')[1].lower().rstrip(".").split(", then ") for text in (first, second)]
        assert len(steps[0]) == len(steps[1]) and all(a != b for a, b in zip(*steps, strict=True))
        assert sorted(re.findall(r"\d+", first)) == sorted(re.findall(r"\d+", second))


def test_complements_part_every_list_in_two() -> None:
    for name, other in COMPLEMENT.items():
        kept, dropped = code.PRIMITIVES[name], code.PRIMITIVES[other]
        assert kept.constants == dropped.constants and COMPLEMENT[other] == name
        for k in kept.constants:
            value = {"xs": [3, 4, 4, 7, 9, 0, 2], "s": "a bee sees", "ws": ["a", "be", "cee", "d", "e"]}[kept.takes]
            parts = [*kept.ref(value, k), *dropped.ref(value, k)]
            assert sorted(parts) == sorted(value)


def test_a_negation_turns_one_word_and_both_programs_do_what_is_asked() -> None:
    for question in evaluation_questions("negation_code", 40, 0):
        asked, negated = question.wordings
        assert asked.continuations == negated.continuations and len(set(asked.continuations)) == 2
        assert (asked.means, negated.means, question.answer) == ((0, 1), (1, 0), 0)
        steps = [w.context.split('"""')[1].lower().rstrip(".").split(", then ") for w in question.wordings]
        (changed,) = [(a, b) for a, b in zip(*steps, strict=True) if a != b]
        assert sum(text.startswith("keep") for text in changed) == 1
    by_hand = {
        "keep the first 2": lambda xs: xs[:2],
        "drop the first 2": lambda xs: xs[2:],
        "keep the even numbers": lambda xs: [x for x in xs if x % 2 == 0],
        "drop the even numbers": lambda xs: [x for x in xs if x % 2],
    }
    value, met = [5, 8, 2, 1, 4], set()
    for question in evaluation_questions("negation_code", 150, 0):
        for wording in question.wordings:
            text = wording.context.split('"""')[1].lower().rstrip(".")
            if text in by_hand:
                program = wording.context + wording.continuations[wording.means.index(question.answer)]
                scope: dict = {}
                exec(program, scope)  # a program of our own generator
                assert scope["f"](value) == by_hand[text](value), program
                met.add(text)
    assert met, "none of the short ones came up"


def test_a_listing_has_every_choice_at_every_place_once() -> None:
    assert rotations("abc") == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    prompt = "Question: What is the trade of Bado?\nAnswer:"
    assert (
        listed(prompt, [" wool", " salt", " oil"]) == "Question: What is the trade of Bado: wool, salt or oil?\nAnswer:"
    )
    for question in evaluation_questions("permutation_knowledge", ITEMS, 0):
        orders = [
            re.search(r": ([^:]*)\?\nAnswer:$", w.context)[1].replace(" or ", ", ").split(", ")
            for w in question.wordings
        ]  # type: ignore[index]
        for place in range(4):
            assert sorted(order[place] for order in orders) == sorted(
                text.strip() for text in question.wordings[0].continuations
            )
