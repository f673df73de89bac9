import pytest

from tasks.made.math import MathTask, final_answer, is_equal
from tasks.reference.items import evaluation_problems
from tests.tasks.scripted import ScriptedBackend

ITEMS = 20
PROBLEMS = evaluation_problems("math", ITEMS, 0)
ANSWERS = {problem.prompt: problem.answer for problem in PROBLEMS}


def test_reference_solutions_are_right_and_named_by_their_problem() -> None:
    backend = ScriptedBackend(ANSWERS.__getitem__)
    result = MathTask(items=ITEMS).run(backend)
    (score,) = result.scores
    assert (score.task, score.metric, score.value, score.n) == ("math", "exact_match", 1.0, ITEMS)
    assert [sample.item for sample in result.samples] == [problem.id for problem in PROBLEMS]
    assert [sample.output for sample in result.samples] == [problem.answer for problem in PROBLEMS]
    assert not any(stop in problem.answer for problem in evaluation_problems("math", 100, 0) for stop in backend.stop)


def test_another_number_is_wrong() -> None:
    wrong = PROBLEMS[2].prompt
    result = MathTask(items=ITEMS).run(
        ScriptedBackend(lambda prompt: " 1 + 1 = 2\n#### 100\n" if prompt == wrong else ANSWERS[prompt])
    )
    assert [sample.score for sample in result.samples] == [1.0, 1.0, 0.0] + [1.0] * (ITEMS - 3)
    assert result.samples[2].detail["given"] == "100"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 + 4 = 7\n#### 7\n", "7"),
        ("####7", "7"),
        ("#### 7\n#### 8", "7"),
        ("7", ""),
        ("####\n7", ""),
        ("", ""),
    ],
)
def test_the_answer_stands_behind_the_first_marks(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("given", ["7", "7.0", "+7", "$7", "7.", "14/2", "\\frac{14}{2}", "007"])
def test_the_same_number_otherwise_written_is_right(given: str) -> None:
    assert is_equal(given, "7")


@pytest.mark.parametrize("given", ["", "8", "-7", "71", "7 8", "x", "7.01", "nan"])
def test_other_numbers_are_wrong(given: str) -> None:
    assert not is_equal(given, "7")


def test_thousands_may_be_parted_by_commas() -> None:
    assert is_equal("1,234", "1234") and not is_equal("1,235", "1234")
