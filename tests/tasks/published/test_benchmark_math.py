"""GSM8K and MATH-500: prompts, the answer that is taken, and when two answers are the same."""

import time
from decimal import Decimal
from pathlib import Path

import pytest

from harness.errors import WinnowError
from tasks.published import equality as benchmark_equality
from tasks.published.equality import Comparer, as_number, normalized
from tasks.published.final_answer import final_answer
from tasks.published.math import NUMBERS, SHOTS, MathBenchmark, few_shot
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage

APPLES = {"id": "0", "question": "Two apples and two more?", "solution": "2 + 2 = <<2+2=4>>4\n#### 4", "answer": "4"}
HALF = {
    "id": "0",
    "question": "One of two?",
    "solution": "\\boxed{\\frac12}",
    "answer": "\\frac12",
    "level": 2,
    "type": "Algebra",
}


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1,000", "1000", True),
        ("$18.00", "18", True),
        ("18.", "18", True),
        ("25\\%", "25", True),
        ("1,00", "100", False),
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("\\left( 3, 4 \\right)", "(3,4)", True),
        ("", "4", False),
        ("-4", "4", False),
        ("0.5", "\\frac12", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("\\text{(A)}", "B", False),
        ("x^2 + 1", "1+x^2", True),
        ("\\frac{", "1", False),
    ],
)
def test_when_answers_are_the_same(given: str, expected: str, same: bool, comparer: Comparer) -> None:
    assert comparer(given, expected) is same


@pytest.fixture(scope="module")
def comparer():  # type: ignore[no-untyped-def]
    with Comparer(30.0) as same:
        yield same
        assert same.timeouts == 0


def test_an_answer_that_keeps_math_verify_busy_is_wrong_and_the_next_is_compared() -> None:
    with Comparer(30.0) as same:
        assert same("0.5", "\\frac12")
        same._seconds = 1.0
        started = time.monotonic()
        assert not same("10^{10^{10}}", "5") and same.timeouts == 1
        assert time.monotonic() - started < 15
        same._seconds = 30.0
        assert same("\\frac{3}{6}", "\\frac12")
        child = same._child
    assert child is not None and child.poll() is not None


def test_math_verify_is_not_started_for_plain_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_equality.subprocess, "Popen", None)
    with Comparer() as same:
        assert same("4.0", "4") and same("\\frac{1}{2}", "\\dfrac{1}{2}") and not same("5", "4") and not same(" ", "x")
        assert not same("x" * 5000, "y"), "no answer is as long"
    assert as_number("-1,234") == Decimal(-1234) and as_number("") is None and as_number("1 2") is None
    assert normalized("\\left[1,\\ 2\\right).") == "[1,2)"


def test_base_models_see_examples_and_chat_models_a_request(tmp_path: Path) -> None:
    root = stage(tmp_path, "gsm8k", [APPLES])
    seen: list[str] = []
    base = ScriptedBackend(lambda prompt: seen.append(prompt) or " 2 + 2 = 4.\n#### 4\n\nQuestion: 1 + 8?\n#### 9")
    result = MathBenchmark("gsm8k", "gsm8k", root).run(base)
    assert seen == [few_shot("gsm8k", 4, APPLES["question"])] and seen[0].count("Question:") == 5
    assert result.samples[0].score == 1.0 and "9" not in result.samples[0].output
    chat = ScriptedBackend(lambda prompt: seen.append(prompt) or "It is \\boxed{4}.", has_chat_template=True)
    (sample,) = MathBenchmark("gsm8k", "gsm8k", root).run(chat).samples
    assert (
        sample.score == 1.0
        and seen[1]
        == sample.prompt
        == f"[user]{APPLES['question']}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    )
    few = ScriptedBackend(lambda prompt: seen.append(prompt) or "#### 5", has_chat_template=True)
    wrong = MathBenchmark("gsm8k", "gsm8k", root, chat=False, shots=1).run(few)
    assert seen[2].count("Question:") == 2 and wrong.scores[0].value == 0.0


def test_the_examples_hold_their_own_answers_and_math_details_are_kept(tmp_path: Path) -> None:
    for name, shots in SHOTS.items():
        assert all(final_answer(solution, question, name in NUMBERS).strict for question, solution in shots), name
    root = stage(tmp_path, "math_500", [HALF])
    result = MathBenchmark("m", "math_500", root).run(ScriptedBackend(lambda prompt: "so $\\boxed{0.5}$"))
    assert result.samples[0].score == 1.0
    assert result.samples[0].detail == {
        "given": "0.5",
        "given_strict": "0.5",
        "right_strict": True,
        "expected": "\\frac12",
        "compared": True,
        "level": 2,
        "type": "Algebra",
    }


def test_an_answer_that_ends_in_its_thought_is_wrong(tmp_path: Path) -> None:
    root = stage(tmp_path, "gsm8k", [APPLES])
    for opened, text, score, cut in (
        ("<think>\n", "2 + 2 is 4, so \\boxed{4}. But", 0.0, True),
        ("<think>\n", "Is it 5?</think>\n\nIt is 4.", 1.0, False),
        ("", "<think>#### 4", 0.0, True),
        ("<think>\n\n</think>\n\n", "It is 4.", 1.0, False),
    ):
        backend = ScriptedBackend(lambda prompt, text=text: text, has_chat_template=True)
        backend.prompt = lambda messages, opened=opened, **options: f"{messages[0]['content']}\n{opened}"  # type: ignore
        sample = MathBenchmark("gsm8k", "gsm8k", root).run(backend).samples[0]
        assert (sample.score, sample.detail.get("truncated", False)) == (score, cut), text


def test_bad_settings(tmp_path: Path) -> None:
    root = stage(tmp_path, "gsm8k", [APPLES])
    with pytest.raises(WinnowError, match="shots=5"):
        MathBenchmark("g", "gsm8k", root, shots=5).run(ScriptedBackend())
    with pytest.raises(WinnowError, match="choose gsm8k"):
        MathBenchmark("g", "humaneval", root).run(ScriptedBackend())
