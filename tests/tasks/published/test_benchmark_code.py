"""HumanEval and MBPP on rows of their form: prompts, what is taken out of an answer, and verdicts."""

from pathlib import Path

import pytest

from harness.errors import WinnowError
from tasks.published import program_tests as benchmark_tests
from tasks.published.code import CodeBenchmark, messages, names_asked_for, problem_text
from tasks.published.program_tests import entry_point, judge, limits
from tasks.sandbox.run import Limits
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage

DOUBLE = {
    "id": "HumanEval/0", "prompt": 'from typing import List\n\n\ndef double(x: int) -> int:\n    """ Twice x. """\n',
    "entry_point": "double", "canonical_solution": "    return 2 * x\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\n",
}  # fmt: skip
ADD = {
    "id": "11",
    "text": "Write a function to add two numbers.",
    "code": "def helper(a): return a\r\ndef add(a, b):\r\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(.1, .2), .3)"],
    "test_setup_code": "import math",
}


def humaneval(
    answer: str, chat: bool = False, row: dict[str, str] = DOUBLE, **options: object
) -> tuple[float, ScriptedBackend, dict]:
    root = options.pop("root")
    backend = ScriptedBackend(lambda prompt: answer, has_chat_template=chat)
    result = CodeBenchmark("humaneval", "humaneval", str(root), **options).run(backend)  # type: ignore[arg-type]
    (score,), (sample,) = result.scores, result.samples
    assert score.metric == "pass@1" and score.value == sample.score and score.low <= score.value <= score.high
    return sample.score, backend, sample.detail


@pytest.fixture
def root(tmp_path: Path) -> str:
    stage(tmp_path, "humaneval", [DOUBLE])
    return stage(tmp_path, "mbpp", [ADD])


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("    return 2 * x\n", 1.0),
        ("    return x + x\n\nprint(double(3))\nbroken(", 1.0),
        ("    return x + x\n\n\ndef main():\n    broken(", 1.0),
        ("    y = x * 2\n    return y\nand then the model says: 'it works", 1.0),
        ("    return x * x\n", 0.0),
        ("", 0.0),
        ("    while True: pass\n", 0.0),
        ("    raise SystemExit\n", 0.0),
        ("    import os\n    os._exit(0)\n", 0.0),
        ("    print('passed')\n", 0.0),
    ],
)
def test_a_base_model_goes_on_with_the_prompt(answer: str, score: float, root: str) -> None:
    found, backend, detail = humaneval(answer, root=root, cpu_seconds=1)
    assert found == score, detail
    assert detail["program"].startswith(DOUBLE["prompt"])
    assert {"\ndef ", "\nclass ", "\nprint("} <= set(backend.stop)


def test_a_chat_model_is_asked_and_its_answer_begun(root: str) -> None:
    asked: list[str] = []
    backend = ScriptedBackend(
        lambda prompt: asked.append(prompt) or "def double(x):\n    return x * 2\n```\nDone!", has_chat_template=True
    )
    result = CodeBenchmark("humaneval", "humaneval", root).run(backend)
    assert result.samples[0].score == 1.0
    assert asked == [backend.prompt(messages(DOUBLE["prompt"]))] == [result.samples[0].prompt]
    assert asked[0].endswith("```python\n") and "def double" in asked[0]
    assert backend.stop == ("\nif __name__", "\ndef main(", "\nprint(", "\n```\n")


def test_mbpp_shows_the_request_and_its_first_test(root: str) -> None:
    text = problem_text("mbpp", ADD)
    assert text == '"""\nWrite a function to add two numbers.\nassert add(1, 2) == 3\n"""\n'
    assert entry_point("mbpp", ADD) == "add" and entry_point("humaneval", DOUBLE) == "double"
    for answer, score, passed in (
        ("def add(a, b):\n    return a + b\n", 1.0, 2),
        ("def add(a, b):\n    return 3", 0.0, 1),
    ):
        sample = CodeBenchmark("mbpp", "mbpp", root).run(ScriptedBackend(lambda prompt, a=answer: a)).samples[0]
        assert (sample.score, sample.detail["passed"], sample.detail["tests"]) == (score, passed, 2)
        assert sample.item == "11" and sample.output == answer


def test_the_published_solutions_pass_and_others_do_not() -> None:
    assert judge("humaneval", [DOUBLE], [DOUBLE["prompt"] + DOUBLE["canonical_solution"]])[0].right  # type: ignore[union-attr]
    verdict = judge("mbpp", [ADD, ADD], [ADD["code"], "def add(a, b):\n    return a - b"])
    assert [one.right for one in verdict] == [True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "forged",
    [
        'import os\nfor d in range(3, 30):\n    try: os.write(d, b\'{"outputs": [{"value": [1, ""]}]}\')\n'
        "    except OSError: pass\nos._exit(0)",
        "def double(x): return None\ndef check(f): return True",
        "import builtins\nbuiltins.AssertionError = ValueError\ndef double(x): return 0",
        "raise SystemExit(0)",
    ],
)
def test_a_verdict_cannot_be_written_blindly(forged: str) -> None:
    verdict = judge("humaneval", [DOUBLE], [forged])[0]
    assert verdict is not None and not verdict.right


def test_the_modules_that_tests_use_are_there() -> None:
    source = (
        "import math, re, heapq, collections, itertools, sys, functools, bisect, cmath, operator, string, datetime\n"
    )
    source += (
        "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: int\ndef add(a, b): return Pair(a).a + b"
    )
    assert judge("mbpp", [ADD], [source])[0].right  # type: ignore[union-attr]


def test_what_tests_name_must_be_in_a_program() -> None:
    assert names_asked_for("humaneval", DOUBLE) == ["double"]
    tree = ADD | {"test_list": ["assert add(Node(1), 2) == 3"], "test_setup_code": "root = Node(2)"}
    assert names_asked_for("mbpp", tree) == ["add", "Node", "root"]


@pytest.mark.parametrize(
    ("chat", "written"),
    [
        (True, "Here you are, all in one def with a return:\n```\ndef double(x):\n    return x * 2\n```\n"),
        (False, "```python\ndef double(x):\n    return x * 2\n```\n"),
    ],
)
def test_a_mark_of_the_end_before_any_code_ends_nothing(chat: bool, written: str, root: str) -> None:
    score, backend, _ = humaneval(written, chat=chat, root=root)
    assert score == 1.0 and [count for _, count in backend.calls] == [1, 1] and backend.stop == ()


def test_what_is_wrong_is_said(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WinnowError, match="choose humaneval"):
        CodeBenchmark("x", "gsm8k", root).run(ScriptedBackend())
    monkeypatch.setattr(benchmark_tests, "find_spec", lambda name: None)
    with pytest.raises(WinnowError, match="pip install"):
        CodeBenchmark("x", "humaneval_plus", root).run(ScriptedBackend())
    assert limits("mbpp", 3) == Limits(3, 14.0, 2**30, output_bytes=2**20)
