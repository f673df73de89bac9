import re

import pytest

from tasks.made.code import CodeTask, function_body, to_program
from tasks.reference.items import evaluation_problems
from tests.tasks.scripted import ScriptedBackend

ITEMS = 12
PROBLEMS = evaluation_problems("code", ITEMS, 0)
ANSWERS = {problem.prompt: problem.answer for problem in PROBLEMS}


def run(change: object = None) -> list[float]:
    write = (lambda prompt: ANSWERS[prompt]) if change is None else change
    result = CodeTask(items=ITEMS).run(ScriptedBackend(write))  # type: ignore[arg-type]
    (score,) = result.scores
    assert (score.task, score.metric, score.n) == ("code", "pass@1", ITEMS)
    assert (
        score.value == sum(sample.score for sample in result.samples) / ITEMS and score.low <= score.value <= score.high
    )
    return [sample.score for sample in result.samples]


def test_reference_answers_pass_and_are_named_by_their_problem() -> None:
    result = CodeTask(items=ITEMS).run(ScriptedBackend(ANSWERS.__getitem__))
    assert result.scores[0].value == 1.0
    assert [sample.item for sample in result.samples] == [problem.id for problem in PROBLEMS]
    assert all(s.detail["passed"] == s.detail["tests"] >= 8 and s.detail["status"] == "ok" for s in result.samples)
    assert [sample.output for sample in result.samples] == [problem.answer for problem in PROBLEMS]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n    return None\n",
        "\n    return (\n",
        "\n    raise SystemExit(0)\n",
        "\n    import os; os._exit(0)\n",
    ],
)
def test_wrong_broken_and_hostile_answers_fail(body: str) -> None:
    assert run(lambda prompt: body) == [0.0] * ITEMS


def test_one_wrong_answer_is_one_sample() -> None:
    spoiled = PROBLEMS[3].prompt
    scores = run(lambda prompt: "\n    return 0.5\n" if prompt == spoiled else ANSWERS[prompt])
    assert scores == [1.0] * 3 + [0.0] + [1.0] * (ITEMS - 4)


def test_an_equal_value_of_another_type_fails() -> None:
    wrapped = {p.prompt: re.sub(r"return (.*)", r"r = \1\n    return float(r) if type(r) is int else tuple(r)"
               r" if type(r) is list else 1 if r == '' else r", p.answer) for p in PROBLEMS}  # fmt: skip
    kinds = {p.prompt: {type(expected) for _, expected in p.meta["tests"]} for p in PROBLEMS}
    scores = run(wrapped.__getitem__)
    for problem, score in zip(PROBLEMS, scores, strict=True):
        if kinds[problem.prompt] & {int, list}:
            assert score == 0.0
    assert 0.0 in scores


def test_what_follows_the_function_is_cut_off() -> None:
    assert run(lambda prompt: ANSWERS[prompt] + "\nundefined_name()\n") == [1.0] * ITEMS
    assert function_body("\n    return 1\nundefined_name()\n    x") == "\n    return 1"
    assert (
        function_body("\n    if x:\n        return 1\n    return 2\n")
        == "\n    if x:\n        return 1\n    return 2\n"
    )


def test_no_reference_answer_holds_a_stop_string() -> None:
    backend = ScriptedBackend(ANSWERS.__getitem__)
    CodeTask(items=ITEMS).run(backend)
    for problem in evaluation_problems("code", 200, 0):
        assert not any(stop in problem.answer for stop in backend.stop)


def test_the_program_does_not_hold_the_expected_values() -> None:
    program = to_program(PROBLEMS[0], PROBLEMS[0].answer)
    assert program.inputs == [[value] for value, _ in PROBLEMS[0].meta["tests"]]
    assert program.entry_point == "f"
