"""Contest problems on rows of their form: what is asked and taken out, and verdicts on what is printed or returned."""

from pathlib import Path

import pytest

from harness.errors import WinnowError
from tasks.published.contest import (
    COMPLETE,
    READ_AND_PRINT,
    ContestBenchmark,
    last_block,
    passed,
    prints_the_same,
    program_for,
    request,
    returns_the_same,
    taken_out,
)
from tasks.sandbox.run import Limits, run_many
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage

SUM = {
    "id": "abc_a", "prompt": "Print the sum of the numbers.", "starter_code": "", "function": None,
    "tests": [["2\n1 2\n", "3\n"], ["3\n1 1 5", "7"], ["1\n-4\n", "-4\n"]], "difficulty": "easy",
}  # fmt: skip
PAIRS = {
    "id": "3600", "prompt": "Give back each number with its double.", "difficulty": "medium", "function": "pairs",
    "starter_code": "class Solution:\n    def pairs(self, numbers: List[int], more: int) -> List[List[int]]:\n        ",
    "tests": [["[1, 2]\n0", "[[1, 2], [2, 4]]"], ["[]\n1", "[]"]],
}  # fmt: skip
METHOD = """
class Solution:
    def pairs(self, numbers: List[int], more: int) -> List[List[int]]:
        return {}
"""


class Noting(ScriptedBackend):
    """Keeps the options of messages for the chat template."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.options: list[dict[str, object]] = []

    def prompt(self, prompt: object, **options: object) -> str:
        if not isinstance(prompt, str):
            self.options.append(options)
        return super().prompt(prompt, **options)  # type: ignore[arg-type]


def how_many_pass(row: dict, source: str) -> int:
    (outcome,) = run_many([program_for(row, source)], Limits(2, 11.0, memory_bytes=2**30))
    return passed(row, outcome)


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("n = int(input())\nprint(sum(map(int, input().split())))", 3),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split()[1:])))\nexit()", 3),
        ("data = sys.stdin.buffer.read().split()\nsys.stdout.buffer.write(b'%d' % sum(map(int, data[1:])))", 3),
        ("def main():\n    input()\n    print(sum(int(x) for x in input().split()))\n\n"
         "if __name__ == '__main__':\n    main()", 3),
        ("input()\nprint(*accumulate(map(int, input().split())), sep='\\n')", 1),
        ("seen = globals().setdefault('seen', [])\nseen.append(input())\n"
         "print(sum(map(int, input().split())) if len(seen) == 1 else 0)", 3),
        ("print(sum(map(int, sys.stdin.read().split()[1:])))\nquit()", 3),
        ("import io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\n"
         "print(sum(map(int, sys.stdin.read().split()[1:])))", 3),
        ("print(3)", 1),
        ("raise ValueError", 0),
        ("broken(", 0),
        ("while True: pass", 0),
        ("import os\nos._exit(0)", 0),
        ("", 0),
    ],
)  # fmt: skip
def test_programs_that_read_and_print(source: str, right: int) -> None:
    assert how_many_pass(SUM, source) == right


@pytest.mark.parametrize(
    ("source", "right"),
    [
        (METHOD.format("[[x, 2 * x] for x in numbers]"), 2),
        (METHOD.format("tuple([x, 2 * x] for x in numbers)"), 2),
        (METHOD.format("[(x, 2 * x) for x in numbers]"), 1),
        (METHOD.format("deque()"), 0),
        (METHOD.format("[]"), 1),
        ("def pairs(numbers, more): return [[x, 2 * x] for x in numbers]", 2),
        ("class Solution: pass", 0),
        ("", 0),
    ],
)
def test_methods_that_are_called(source: str, right: int) -> None:
    assert how_many_pass(PAIRS, source) == right


def test_what_is_printed_counts_line_by_line() -> None:
    assert prints_the_same("  1 2 \n3\n\n", "1 2\n3")
    assert prints_the_same("0.50\n1e1", "0.5\n10")
    assert not prints_the_same("0.5000001", "0.5"), "numbers are compared exactly"
    assert not prints_the_same("1\n2", "1 2") and not prints_the_same("yes", "Yes")
    assert not prints_the_same("sNaN", "1") and not prints_the_same(["1"], "1")
    assert returns_the_same([1.0], "[1]") and returns_the_same((), "[]") and not returns_the_same(None, "[]")


def test_the_last_closed_block_is_the_program() -> None:
    assert last_block("First\n```\nx\n```\nno:\n```python\ny\nz\n```\nDone") == "y\nz"
    assert last_block("```\nx\n```\nAgain:\n```python\nnever closed") == "x"
    assert last_block("```python\nnever closed") == "" == last_block("none")
    documented = 'def f():\n    """As in\n    ```\n    f()\n    ```\n    """\nprint(f())'
    assert last_block(f"First\n```\nx\n```\nSo:\n```python\n{documented}\n```\nDone") == documented
    assert last_block('```\nprint(1)  # one """ alone\n```\nDone') == 'print(1)  # one """ alone'


def test_what_is_called_is_taken_out_of_all_blocks() -> None:
    method = METHOD.format("[[x, twice(x)] for x in numbers]")
    helper = "def twice(x):\n    return 2 * x\n"
    for answer in (
        f"```python\n{helper}```\nThen\n```\n{method}```\n```python\nprint(Solution().pairs([1], int(input())))\n```",
        f"{helper}{method}\nassert Solution().pairs([], 1) == 5",
        f"~~~py\n{helper}{method}\nimport sys\nsys.exit()\n~~~",
        f"```python\n{helper}def pairs(numbers, more):\n    return [[x, twice(x)] for x in numbers]\n```",
    ):
        for chat in (True, False):
            (source,) = taken_out([PAIRS], [answer], chat)
            assert how_many_pass(PAIRS, source) == 2, source
    assert taken_out([SUM, PAIRS, SUM], ["```\nx\n```", "no", "y"], True) == ["x", "no", ""]
    assert taken_out([SUM], ["x = input()\n"], False) == ["x = input()\n"]


def test_models_are_asked_and_scored(tmp_path: Path) -> None:
    root = stage(tmp_path, "livecodebench", [SUM, PAIRS])
    prints = "n = input()\nprint(sum(map(int, input().split())))\n"
    for chat, answer in ((True, f"Let me think.\n```python\n{prints}```\n"), (False, f"{prints}```\nAnd so on")):
        asked: list[str] = []
        backend = Noting(lambda prompt, a=answer, seen=asked: seen.append(prompt) or a, has_chat_template=chat)
        template = {"enable_thinking": False}
        result = ContestBenchmark("livecodebench", "livecodebench", root, cpu_seconds=2, template=template).run(backend)
        assert backend.options == ([{"enable_thinking": False}] * 2 if chat else [])
        (score,) = result.scores
        assert (score.metric, score.value, score.n) == ("pass@1", 0.5, 2) and score.low < 0.5 < score.high
        assert [(one.item, one.score, one.detail["passed"]) for one in result.samples] == [
            ("abc_a", 1.0, 3), ("3600", 0.0, 0),
        ]  # fmt: skip
        assert result.samples[0].output == (answer if chat else prints.rstrip())
        assert READ_AND_PRINT in asked[0] and COMPLETE in asked[1] and PAIRS["starter_code"] in asked[1]
        assert asked[0] == (f"[user]{request(SUM)}" if chat else f"{request(SUM)}```python\n")
    with pytest.raises(WinnowError, match="choose livecodebench"):
        ContestBenchmark("x", "gsm8k", root).run(ScriptedBackend())
