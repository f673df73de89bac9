"""The EvalPlus sets: our verdicts, from values that the sandbox hands back, against EvalPlus' own checker."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("evalplus")

from tasks.published.code import CodeBenchmark
from tasks.published.program_tests import PLUS, is_right, judge
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage


def problem(
    data_set: str, number: int, name: str, solution: str, base: list[Any], plus: list[Any], atol: float = 0
) -> dict[str, Any]:
    task = f"{'HumanEval' if data_set == 'humaneval_plus' else 'Mbpp'}/{number}"
    head, body = solution.split("\n", 1)
    prompt, rest = (
        (f"{head}\n", body) if data_set == "humaneval_plus" else (f'"""\nWrite {name}.\nassert {name}\n"""\n', solution)
    )
    return {
        "id": task, "task_id": task, "prompt": prompt, "entry_point": name, "canonical_solution": rest, "contract": "",
        "base_input": base, "plus_input": plus, "atol": atol,
    }  # fmt: skip


ROOTS = "def find_zero(xs):\n    return -xs[0] / xs[1]\n"
HALF = "def half(x):\n    return x / 2\n"
COUNT = "def count(words):\n    from collections import Counter\n    return Counter(words)\n"
SIMILAR = "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n"
CHECK = "def check_str(s):\n    import re\n    return re.match('[aeiou]', s)\n"
BIG = "def big(n):\n    return (7 ** n, 'ab' * n)\n"
ANGLE = "def angle_complex(a, b):\n    import cmath\n    return cmath.phase(a + b)\n"
CASES: list[tuple[str, dict[str, Any], dict[str, bool]]] = [
    (
        "humaneval_plus",
        problem("humaneval_plus", 32, "find_zero", ROOTS, [[[1, 2]]], [[[3, 4]]], 1e-4),
        {
            ROOTS: True,
            "def find_zero(xs):\n    return -xs[0] / xs[1] + 1e-6\n": True,
            "def find_zero(xs):\n    return 0.0\n": False,
        },
    ),
    (
        "humaneval_plus",
        problem("humaneval_plus", 1, "half", HALF, [[4]], [[3], [10**9]]),
        {
            "def half(x):\n    return x * .5 + 1e-9\n": True,
            "def half(x):\n    return x // 2\n": False,
            "def half(x):\n    return [x / 2]\n": False,
            "def half(x):\n    return x / 2 if x != 3 else None\n": False,
        },
    ),
    (
        "humaneval_plus",
        problem("humaneval_plus", 2, "count", COUNT, [[["a", "b", "a"]]], [[[]]]),
        {
            COUNT: True,
            "def count(words):\n    return {w: words.count(w) for w in words}\n": True,
            "def count(words):\n    return list(words)\n": False,
        },
    ),
    (
        "humaneval_plus",
        problem("humaneval_plus", 3, "big", BIG, [[2]], [[40000]]),
        {
            BIG: True,
            "def big(n):\n    return (7 ** n + (n > 9), 'ab' * n)\n": False,
            "def big(n):\n    return (7 ** n, 'ab' * n + 'a')\n": False,
        },
    ),
    (
        "mbpp_plus",
        problem("mbpp_plus", 2, "similar_elements", SIMILAR, [[[3, 4], [5, 4]]], [[[1, 2], [2, 1]]]),
        {
            "def similar_elements(a, b):\n    return [x for x in a if x in b] * 2\n": True,
            "def similar_elements(a, b):\n    return a\n": False,
        },
    ),
    (
        "mbpp_plus",
        problem("mbpp_plus", 454, "check_str", CHECK, [["apple"]], [["pear"]]),
        {
            CHECK: True,
            "def check_str(s):\n    return s[0] in 'aeiou'\n": True,
            "def check_str(s):\n    return 'yes'\n": False,
        },
    ),
    (
        "mbpp_plus",
        problem("mbpp_plus", 124, "angle_complex", ANGLE, [["0", "1j"]], [["1", "1j"]]),
        {
            ANGLE: True,
            "def angle_complex(a, b):\n    return 0.0\n": False,
        },
    ),
    (
        "mbpp_plus",
        problem(
            "mbpp_plus", 164, "are_equivalent", "def are_equivalent(a, b):\n    return a == b\n", [[1, 2]], [[1, 1]]
        ),
        {
            "def are_equivalent(a, b):\n    return 'whatever'\n": True,
        },
    ),
]


def evalplus_says(data_set: str, row: dict[str, Any], source: str) -> bool:
    """The same program by EvalPlus' own checker."""
    from evalplus.data.mbpp import mbpp_deserialize_inputs
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS, untrusted_check
    from evalplus.gen.util import trusted_exec

    inputs = row["base_input"] + row["plus_input"]
    if data_set == "mbpp_plus":
        inputs = mbpp_deserialize_inputs(row["task_id"], inputs)
    name = row["entry_point"]
    solution = row["prompt"] + row["canonical_solution"]
    expected, seconds = trusted_exec(solution, inputs, name, True, name in MBPP_OUTPUT_NOT_NONE_TASKS)
    status, _ = untrusted_check(data_set.removesuffix("_plus"), source, inputs, name, expected, row["atol"], seconds)
    return bool(status == "pass")


@pytest.mark.parametrize(("data_set", "row", "programs"), CASES, ids=[row["entry_point"] for _, row, _ in CASES])
def test_verdicts_are_those_of_evalplus(data_set: str, row: dict[str, Any], programs: dict[str, bool]) -> None:
    verdicts = judge(data_set, [row] * len(programs), list(programs))
    assert [verdict is not None and verdict.right for verdict in verdicts] == list(programs.values())
    if row["entry_point"] != "find_zero":  # EvalPlus 0.3.1 does not count the tests of it that pass: none ever does
        assert [evalplus_says(data_set, row, source) for source in programs] == list(programs.values())


def test_base_and_plus_are_told_apart_and_programs_are_taken_out_of_answers(tmp_path: Path) -> None:
    row = CASES[1][1]
    root = stage(
        tmp_path,
        "humaneval_plus",
        [row, problem("humaneval_plus", 9, "never", "def never(x):\n    return 1 / 0\n", [[1]], [])],
    )
    answer = "Sure:\n```python\ndef half(x):\n    if x == 4: return 2.0\n    return 1.0\n"
    backend = ScriptedBackend(lambda prompt: answer, has_chat_template=True)
    result = CodeBenchmark("he", "humaneval_plus", root).run(backend)
    assert [(score.metric, score.value, score.n) for score in result.scores] == [
        ("pass@1", 0.0, 1),
        ("base_pass@1", 1.0, 1),
    ]
    (sample,) = result.samples  # the other's own solution does not run
    assert sample.detail["program"].startswith("def half(x)") and (sample.detail["passed"], sample.detail["tests"]) == (
        1,
        3,
    )


@pytest.mark.parametrize(("name", "easier"), [("humaneval_plus", "humaneval"), ("he_plus", "he"), ("own", "humaneval")])
def test_a_plus_set_supersedes_the_set_of_its_name_without_plus(tmp_path: Path, name: str, easier: str) -> None:
    root = stage(tmp_path, "humaneval_plus", [problem("humaneval_plus", 0, "half", HALF, [[2]], [[3]])])
    scores = (
        CodeBenchmark(name, "humaneval_plus", root).run(ScriptedBackend(lambda prompt: "    return x / 2\n")).scores
    )
    assert {score.supersedes for score in scores} == {easier} and scores[0].value == 1.0


def test_a_loop_of_short_lines_does_not_keep_evalplus_busy(tmp_path: Path) -> None:
    root = stage(tmp_path, "humaneval_plus", [CASES[1][1]])
    result = CodeBenchmark("he", "humaneval_plus", root).run(ScriptedBackend(lambda prompt: "    (\n" * 3000))
    assert result.samples[0].score == 0.0


def test_what_cannot_be_compared_is_wrong() -> None:
    for data_set in PLUS:
        assert not is_right(data_set, "f", [1], [[1, 2], [3]], [1.0, 2.0], 1e-6)
        assert not is_right(data_set, "similar_elements", [1], None, (1,), 0)
