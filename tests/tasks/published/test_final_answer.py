"""The final answer of a text: by cases, and on endings from a grammar against lm-eval's own filters for GSM8K."""

import random
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from tasks.published.equality import Comparer
from tasks.published.final_answer import final_answer, without_question
from tasks.published.math import MathBenchmark
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    with Comparer(30.0) as same:
        yield same
        assert same.timeouts == 0


NUMBERS = [
    ("\\boxed{18} and so \\boxed{}", "18"),
    ("\\boxed{17}, no, \\boxed{18}", "18"),
    ("\\boxed{18}. I put it within \\boxed{}, as in \\boxed{...} or \\boxed{\\text{your answer}}.", "18"),
    ("\\boxed{\\boxed{18}}", "18"),
    ("\\boxed{\\text{The answer is } \\boxed{18}}", "18"),
    ("\\boxed{18\\text{ eggs}}", "18"),
    ("\\boxed{\\$18.00}", "18"),
    ("\\boxed{18\\%}", "18"),
    ("\\boxed{18^\\circ}", "18"),
    ("\\boxed{36\\text{ cm}^2}", "36"),
    ("\\boxed{x = 18}", "18"),
    ("\\boxed{3 \\times 6 = 18}", "18"),
    ("\\boxed{\\frac{36}{2}}", "18"),
    ("\\boxed{\\text{Total: } 18 \\text{ dollars}}", "18"),
    ("\\boxed{**18**}", "18"),
    ("\\boxed{18 eggs in 2 days}", "18"),
    ("\\boxed{1{,}234}", "1234"),
    ("\\boxed{1\\,234}", "1234"),
    ("\\boxed{1 234}", "1234"),
    ("\\boxed{18", "18"),
    ("#### 1,234", "1234"),
    ("#### 12,34,567", "1234567"),
    ("#### 18 eggs in 2 days", "18"),
    ("#### 18,", "18"),
    ("#### \\$18", "18"),
    ("#### **18**", "18"),
    ("#### 18%", "18"),
    ("####18", "18"),
    ("#### \\boxed{18}", "18"),
    ("#### 3 * 6 = 18", "18"),
    ("#### 18 (3 * 6 = 18)", "18"),
    ("#### 18 = 3 * 6", "18"),
    ("#### The answer is 18", "18"),
    ("#### Answer: 18 dollars", "18"),
    ("#### Answer\n18", "18"),
    ("#### 18\n\nNow another one.\n#### 9", "18"),
    ("#### 1. First we take 3\n#### 2. Then 4\nSo \\boxed{18}", "18"),
    ("#### 1. First we take 3\n#### 2. Then 4\n#### 18", "18"),
    ("We get \\boxed{5}\n#### 6", "6"),
    ("#### 18 eggs\nThat is \\boxed{3} nests", "18"),  # as lm-eval's strict match has it
    ("The answer is **18**.", "18"),
    ("The final answer is: $18. That is for 5 days.", "18"),
    ("**Answer:** 18 dollars for 2 days", "18"),
    ("Answer:\n18\n\nI hope it helps, in 1 way or another 2.", "18"),
    ("The answer is $18 because 20 - 2 = 18 and 5 are left", "18"),
    ("The answer is 9 * 2 = 18.", "18"),
    ("The answer is 9 eggs * 2 = 18 dollars", "18"),
    ("The answer is 7, since 3+4=7 and 5 > 2.", "7"),
    ("The answer is not 5 but 7.", "7"),
    ("The answer is \u22125.", "-5"),
    ("So -$5 is left", "-5"),
    ("It is between 10-18", "18"),
    ("So she makes 1,234,567 dollars", "1234567"),
    ("So it is 3/4", "3/4"),
    ("It costs .5", "0.5"),
    ("no number at all", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "answer"), NUMBERS)
def test_a_number_is_read_out_of_its_ending(text: str, answer: str, comparer: Comparer) -> None:
    given = final_answer(text, number=True).flexible
    assert comparer(given, answer) if answer else given == ""


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        ("The answer is 18.", ""),
        ("So 18", ""),
        ("\\boxed{18 eggs}", "18"),
        ("#### 18 eggs", "18"),
        ("#### $1,018.", "1018"),
        ("\\boxed{eighteen} of 18", ""),
    ],
)
def test_strict_is_a_box_or_the_mark(text: str, strict: str) -> None:
    found = final_answer(text, number=True)
    assert found.strict == strict and found.flexible


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{\\frac{1}{2}} and \\boxed{}", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}"),
        ("\\boxed{18 dollars}", "18"),
        ("\\boxed{The answer is 18}", "18"),
        ("\\boxed{3x + 18}", "3x + 18"),
        ("#### Step 1\nLet us see.\nThe answer is $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("#### \\frac{3}{4}", "\\frac{3}{4}"),
        ("The final answer is: x + 1.", "x + 1"),
        ("**Answer:** $[2, 3)$", "[2, 3)"),
        ("It is 1/2", "1/2"),
        ("\\boxed{never closed 7", "7"),
    ],
)
def test_another_answer_is_what_stands_there(text: str, answer: str) -> None:
    assert final_answer(text).flexible == answer


@pytest.mark.parametrize("box", ["18, 20", "20, 18", "18 \\text{ or } 20", "20 \\text{ and } 18", "(18, 20)", "18 + 2"])
def test_of_several_answers_in_a_box_none_is_right(box: str, comparer: Comparer) -> None:
    assert not comparer(final_answer(f"\\boxed{{{box}}}", number=True).flexible, "18")


def test_a_question_is_no_answer() -> None:
    question = "Tom has 18 eggs.  He sells 5.\nHow many are left?"
    assert final_answer("Tom has 18 eggs. He sells 5. How many are left?", question, True).flexible == ""
    assert final_answer("**Question:** " + question + "\nHe has none.", question, True).flexible == ""
    assert final_answer(question + "\n13 are left.", question, True).flexible == "13"
    assert final_answer("Question: How many of 18?\nAnswer: 13", question, True).flexible == "13"
    assert final_answer("#### 13\n\nQuestion: 5 and 9?\n#### 14", question, True).flexible == "13"
    assert final_answer("\\boxed{13}\n\nUser: And 5 and 9?\nAssistant: \\boxed{14}", question, True).flexible == "13"
    assert without_question("Nothing of it, 5.", question) == "Nothing of it, 5."


@pytest.mark.parametrize(
    "piece",
    ["1", "1,", "\\boxed{", "}", "#### ", "####", " ", "\n", "$", "\\(", "the answer is ", "answer ", "Question:\n",
     "\\text{", "1/", "-", "**", "= ", "{\\boxed{1}", "1 + "],
)  # fmt: skip
def test_long_loops_are_read_in_time(piece: str) -> None:
    started = time.monotonic()
    for number in (True, False):
        final_answer("So " + piece * (40_000 // len(piece)), "How many?", number)
    assert time.monotonic() - started < 10


# --- against lm-eval --------------------------------------------------------------------------------------------------


def reasoning(rng: random.Random, gold: int) -> str:
    """Steps with numbers that are not the answer, and some with it."""
    a, b, c = (rng.randrange(2, 60) for _ in range(3))
    return rng.choice([
        "", f"He has {a} and gets {b}, so {a} + {b} = {a + b}.\n", f"First, {a} * {b} = <<{a}*{b}={a * b}>>{a * b}.\n",
        f"1. He takes {a}.\n2. He adds {b}.\n\n", f"**Step 1:** {a} of {c} are left.\n**Step 2:** Add {b}.\n",
        f"Not {gold}, as one could think, for there are {a} of them.\n", f"$x = {a}$ and\n\\[ y = {b} \\]\n",
    ])  # fmt: skip


def written(rng: random.Random, number: int) -> str:
    """A number as models write it."""
    grouped = f"{number:,}"
    return rng.choice([str(number), grouped, grouped, f"{number}.00", f"{grouped}.0"])


def dressed(rng: random.Random, number: str) -> str:
    return rng.choice([
        number, number, f"${number}", f"\\${number}", f"**{number}**", f"**${number}**", f"{number}%", f"`{number}`",
        f"{number} dollars", f"{number} eggs", f"€{number}", f"${number}$", f"\\({number}\\)", f"{number} km/h",
    ])  # fmt: skip


def ending(rng: random.Random, number: int) -> str:
    n = written(rng, number)
    d = dressed(rng, n)
    latex = rng.choice([n, n.replace(",", "{,}"), f"\\${n}", f"{n}\\%", f"{n}\\text{{ eggs}}", f"\\text{{{n} eggs}}",
                        f"x = {n}", f"\\textbf{{{n}}}", f"\\text{{Total}} = {n} \\text{{ in }} 2 \\text{{ days}}",
                        f"\\boxed{{{n}}}", f" {n} ", f"{n}."])  # fmt: skip
    other = rng.randrange(100, 999)
    marked = rng.choice([n, f"{n}.", f"{n},", f"{n} eggs", f"{n} eggs a day.", d, f" {n}", f"{n}%", f"{n}\n",
                         f"{n}\n\nQuestion: What is {other} + 1?\nAnswer: #### {other + 1}",
                         f"{n}\n\nNext: {other}\n#### {other}"])  # fmt: skip
    return rng.choice([
        f"#### {marked}", f"#### {marked}", f"#### {marked}", f"####{n}", f"#### {d} is the answer.",
        f"\\boxed{{{latex}}}", f"$\\boxed{{{latex}}}$.", f"The answer is \\boxed{{{latex}}}",
        f"\\[\\boxed{{{latex}}}\\]",
        f"\\boxed{{{other}}}? No: \\boxed{{{latex}}}.", f"\\boxed{{{latex}}}, put within \\boxed{{}}.",
        f"The answer is {d}.", f"The final answer is: {d}", f"**Answer:** {d}", f"Answer: {d}.", f"answer = {d}",
        f"So the answer should be {d}!", f"The answer is {other} - {other - 1} + 0 = {n}." if number == 1 else f"= {d}",
        f"Therefore he has {d} left.", f"So it is {d}", f"In all, {d}", f"{d}", f"Total: {d}.\n",
    ])  # fmt: skip


def endings(count: int, seed: int) -> list[tuple[int, str]]:
    rng = random.Random(seed)
    golds = [rng.choice([rng.randrange(1, 99), rng.randrange(100, 99999), rng.randrange(10**5, 10**8), -7])
             for _ in range(count)]  # fmt: skip
    return [(gold, reasoning(rng, gold) + ending(rng, gold)) for gold in golds]


def scores(pairs: list[tuple[int, str]], folder: Path) -> tuple[list[float], list[float]]:
    """What the task itself says of texts as answers to questions with these golds: flexible and strict."""
    questions = [f"Question number {i} about {gold} or {gold + 1}?" for i, (gold, _) in enumerate(pairs)]
    rows = [
        {"id": str(i), "question": question, "solution": f"#### {gold}", "answer": str(gold)}
        for i, (question, (gold, _)) in enumerate(zip(questions, pairs, strict=True))
    ]
    answers = {question: text for question, (_, text) in zip(questions, pairs, strict=True)}
    backend = ScriptedBackend(
        lambda prompt: answers[prompt.removeprefix("[user]").partition("\n")[0]], has_chat_template=True
    )
    result = MathBenchmark("gsm8k", "gsm8k", stage(folder, "gsm8k", rows)).run(backend)
    assert [score.metric for score in result.scores][:2] == ["exact_match", "exact_match_strict"]
    samples = [sample for sample in result.samples if sample.task == "gsm8k"]
    strict = [float(sample.detail["right_strict"]) for sample in samples]
    assert result.scores[1].value == sum(strict) / len(strict)
    return [sample.score for sample in samples], strict


def lm_eval_says(pairs: list[tuple[int, str]]) -> dict[str, list[bool]]:
    """Which of the answers lm-eval's own filters and metric for gsm8k take for right."""
    metrics = pytest.importorskip("lm_eval.api.metrics")
    from lm_eval.filters.extraction import RegexFilter

    settings = yaml.safe_load((files("lm_eval") / "tasks/gsm8k/gsm8k.yaml").read_text())
    ignored = settings["metric_list"][0]["regexes_to_ignore"]
    stops = settings["generation_kwargs"]["until"]
    found = {}
    for one in settings["filter_list"]:
        options = {key: value for key, value in one["filter"][0].items() if key != "function"}
        texts = []
        for _, text in pairs:
            for stop in stops:
                text = text.partition(stop)[0]
            texts.append([text])
        taken = [answers[0] for answers in RegexFilter(**options).apply(texts, [{}] * len(texts))]
        found[one["name"]] = [
            metrics.exact_match_hf_evaluate([answer], [str(gold)], ignored, ignore_case=True)["exact_match"] == 1.0
            for answer, (gold, _) in zip(taken, pairs, strict=True)
        ]
    return found


def test_what_lm_eval_accepts_is_right_and_so_is_every_ending_of_the_grammar(tmp_path: Path) -> None:
    pairs = endings(2000, seed=1)
    flexible, strict = scores(pairs, tmp_path)
    assert [pair for pair, right in zip(pairs, flexible, strict=True) if not right] == []
    accepted = lm_eval_says(pairs)
    assert sum(accepted["strict-match"]) > 100 and sum(accepted["flexible-extract"]) > 900
    marked = [pair for pair, theirs, ours in zip(pairs, accepted["strict-match"], strict, strict=True) if theirs > ours]
    assert marked == [], "strict of lm-eval is strict here"
    assert 0.3 < sum(strict) / len(strict) < 0.8, "words and last numbers are not strict"


def test_wrong_endings_do_not_become_right(tmp_path: Path) -> None:
    rng = random.Random(2)
    pairs: list[tuple[int, str]] = []
    for gold, _ in endings(1000, seed=3):
        other = rng.choice([gold + 1, gold - 1, gold * 10, gold + 100, -gold, gold * 1000 + 5])
        wrong, right = ending(rng, other), ending(rng, gold)
        question = f"Question number {len(pairs)} about {gold} or {gold + 1}?"
        text = rng.choice([
            reasoning(rng, gold) + wrong, reasoning(rng, gold) + wrong,
            f"<think>\n{reasoning(rng, gold)}{right}\n</think>\n\n{wrong}", f"{right}\n</think>\n{wrong}",
            f"<think>\n{reasoning(rng, gold)}{right}", f"<think>{right}</think>\n\nI do not know.",
            f"{right} <think> Let me check: {right}", question, f"Question: {question}\nAnswer:",
            f"{question}\n{wrong}",
            f"{wrong}\n\nQuestion: What of {gold}?\nAnswer: {right}" if "####" in wrong else wrong,
        ])  # fmt: skip
        pairs.append((gold, text))
    flexible, strict = scores(pairs, tmp_path)
    assert [pair for pair, right in zip(pairs, flexible, strict=True) if right] == []
    assert sum(strict) == 0
