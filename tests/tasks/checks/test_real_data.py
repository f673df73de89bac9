"""The check on real data, on a few rows in its place."""

import sys
from pathlib import Path

import pytest

from tasks.checks import real_data
from tasks.checks.real_data import Check, as_block, as_completion, recorded_calls
from tests.tasks.published.test_benchmark_code import ADD, DOUBLE
from tests.tasks.published.test_benchmark_math import APPLES, HALF
from tests.tasks.staged import stage


def run(root: str, monkeypatch: pytest.MonkeyPatch, *only: str) -> int:
    monkeypatch.setattr(sys, "argv", ["real_data", "--root", root, *(("--only", *only) if only else ())])
    return real_data.main()


def test_solutions_that_are_right_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("humaneval", [DOUBLE]), ("mbpp", [ADD]), ("gsm8k", [APPLES]), ("math_500", [HALF])):
        root = stage(tmp_path, name, rows)
    assert run(root, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("1/1" in line for line in lines) == len(lines) - 2 >= 8
    assert sum("not staged" in line for line in lines) == 2


def test_one_that_is_wrong_is_named_and_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = stage(tmp_path, "gsm8k", [APPLES, APPLES | {"id": "7", "answer": "5"}])
    assert run(root, monkeypatch, "gsm8k") == 1
    assert "1/2  wrong: 7" in capsys.readouterr().out
    assert run(root, monkeypatch, "math_500") == 1, "nothing was checked"
    assert (
        Check("mbpp", real_data.BY_SANDBOX, [], ["123"]).holds
        and not Check("mbpp", real_data.BY_SANDBOX, [], ["9"]).holds
    )


def test_the_calls_of_tests_are_recorded_and_recursive_ones_are_not() -> None:
    recursive = DOUBLE | {"canonical_solution": "    return 2 + double(x - 1) if x > 0 else 2 * x\n"}
    assert recorded_calls("humaneval", [recursive]) == [[[2], [-3]]]
    assert recorded_calls("mbpp", [ADD, ADD | {"test_list": ["assert add(object(), 1)"]}]) == [
        [[1, 2], [0.1, 0.2]],
        None,
    ]


def test_answers_as_models_write_them() -> None:
    for row, name in ((DOUBLE, "humaneval"), (ADD, "mbpp")):
        (completion,), (block,) = as_completion(name, [row]), as_block(name, [row])
        assert "return" in completion and "Now the next" not in completion
        assert "return" in block and "```" not in block and "works" not in block
