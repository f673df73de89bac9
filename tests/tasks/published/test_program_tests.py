"""Published tests apart from a program: what they ask, what is handed back, and verdicts like those of ``exec``."""

import collections
import enum
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from harness.errors import WinnowError
from tasks.published.beside_program import answer, call, plain
from tasks.published.program_tests import entry_point, judge
from tasks.published.replayed_tests import judge as replay
from tasks.published.replayed_tests import record
from tests.attack.forgeries import COUNTS, ECHO, IDENTITY, LOOP, NEAR, SORTS, TREE, WHETHER, humaneval, mbpp

SELF = humaneval(
    "self", 'def f(x):\n    """ Sorted. """\n', "return sorted(x)",
    "assert tuple(candidate([2, 1])) == tuple(f([1, 2]))\nassert candidate([3, 1]) == [1, 3]",
)  # fmt: skip
HONEST = [
    (ECHO, ["def f(x): return 'the answer is 7341'", "def f(x): return 1 / 0", "def f(x): return x"]),
    (NEAR, ["def f(x): return x / 3", "def f(x): return x / 3 + 1e-5", "def f(x): return str(x)"]),
    (WHETHER, ["def f(x): return x[0] == 'a'", "def f(x): return 1", "def f(x): return [c for c in x if c == 'a']"]),
    (IDENTITY, ["def f(x): return x[0] == 'a'", "def f(x): return 1 if x[0] == 'a' else 0"]),
    (LOOP, [LOOP["prompt"] + "    return s[-1:] + s[:-1]", LOOP["prompt"] + "    return s"]),
    (SELF, ["def f(x): return sorted(x)", "def f(x): return x", "def f(x): return [1, 3]"]),
    (SORTS, ["def f(x): return sorted(x)", "def f(x): return x", "def f(x): return sorted(set(x))", "f = list"]),
    (COUNTS, ["from collections import Counter as f", "def f(x): return {'a': 2.0, 'b': True}", "f = dict"]),
    (TREE, [TREE["code"], TREE["code"].replace("1 +", "2 +")]),
]


def by_exec(row: dict[str, Any], source: str) -> tuple[int, int]:
    """How many tests pass where they run behind the program, as others run them."""
    if "test_list" in row:
        tests = [f"{row['test_setup_code']}\n{test}" for test in row["test_list"]]
    else:
        tests = [f"{row['test']}\ncheck({row['entry_point']})"]
    space: dict[str, Any] = {}
    exec(source, space)
    passed = 0
    for test in tests:
        try:
            exec(test, space)
            passed += 1
        except Exception:
            pass
    return passed, len(tests)


@pytest.mark.parametrize(("row", "sources"), HONEST, ids=[row["id"] for row, _ in HONEST])
def test_honest_programs_get_the_verdict_that_exec_gives_them(row: dict[str, Any], sources: list[str]) -> None:
    verdicts = judge("mbpp" if "test_list" in row else "humaneval", [row] * len(sources), sources)
    found = [(verdict.passed, verdict.tests) for verdict in verdicts if verdict is not None]
    assert found == [by_exec(row, source) for source in sources]
    assert found[0][0] == found[0][1] and len(set(found)) > 1


def test_what_the_tests_ask_is_recorded() -> None:
    setup = "def helper(x):\n    return x * 2\n"
    test = (
        "def check(candidate):\n    given = [1]\n    for i in range(2):\n        given.append(i)\n"
        "        assert abs(candidate(given, key=helper(i)) - 1) < 1 and candidate('b') == 2\n"
        "    assert tuple(sorted(candidate())) == () and not candidate(2.5)[0]\ncheck(f)\n"
    )
    assert record(setup, test, "f") == [
        [[[1, 0]], {"key": 0}], [["b"], {}], [[[1, 0, 1]], {"key": 2}], [["b"], {}], [[], {}], [[2.5], {}],
    ]  # fmt: skip


def test_random_draws_are_the_same_when_recorded_and_when_judged() -> None:
    asked = record(LOOP["prompt"] + "\n    pass", f"{LOOP['test']}\ncheck(f)", "f")
    assert len(asked) == 50
    answers = [["value", given[-1:] + given[:-1]] for (given,), _ in asked]
    tests = [f"{LOOP['test']}\ncheck(f)"]
    assert replay(LOOP["prompt"] + "\n    pass", tests, "f", answers, asked) == [1, True]
    answers[49] = ["value", ""]
    assert replay(LOOP["prompt"] + "\n    pass", tests, "f", answers, asked) == [0, True]
    assert replay(LOOP["prompt"] + "\n    pass", tests, "f", answers[:9], asked[:9]) == [0, False]


@pytest.mark.parametrize(
    ("data_set", "row", "said"),
    [
        ("humaneval", humaneval("d", ECHO["prompt"], "return 1",
                                "x = candidate(1)\nassert candidate(x) == 1"), "apart from a program"),
        ("humaneval", humaneval("n", ECHO["prompt"], "return 1", "assert True"), "never call f"),
        ("humaneval", humaneval("b", ECHO["prompt"], "return 1", "assert candidate(1) == 1\nnothing()"), "nothing"),
        ("mbpp", mbpp(1, "def f(x):\n    return x", ["for i in range(3): assert f(i) == i"]), "in a loop"),
        ("mbpp", mbpp(1, "def f(x):\n    return x", ["assert all(f(i) == i for i in range(3))"]), "in a loop"),
        ("mbpp", mbpp(1, "def f(x):\n    return x", ["assert f(1) == 1", "assert g(1) == 1"]), "does not call"),
    ],
)  # fmt: skip
def test_tests_that_cannot_be_run_apart_are_refused(data_set: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(WinnowError, match=said) as refused:
        judge(data_set, [row], ["def f(x):\n    return x"])
    assert row["id"] in str(refused.value) and "\n" not in str(refused.value)


def test_calls_that_follow_an_answer_are_refused_when_they_differ() -> None:
    row = humaneval("e", ECHO["prompt"], "return x", "if candidate(1) == 1:\n    assert candidate(2) == 2\n")
    (verdict,) = judge("humaneval", [row], ["def f(x):\n    return x"])
    assert verdict is not None and verdict.right
    row = humaneval("e", ECHO["prompt"], "return x", "if not candidate(1) == 1:\n    assert candidate(2) == 3\n")
    with pytest.raises(WinnowError, match="otherwise"):
        judge("humaneval", [row], ["def f(x):\n    return 2"])


def test_the_calls_of_mbpp_see_the_names_of_the_program() -> None:
    row = mbpp(7, "def f(x):\n    return x", ["assert f(f(2) + len('é\"')) == 4"])
    assert [v and v.right for v in judge("mbpp", [row] * 2, ["def f(x): return x", "def f(x): return 2"])] == [
        True, False
    ]  # fmt: skip
    assert entry_point("mbpp", row) == "f" and entry_point("humaneval", ECHO) == "f"


class Text(str):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class Level(enum.IntEnum):
    LOW = 3


class Names(list[str]):
    def __iter__(self) -> Any:
        return iter(["another"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.Counter("aab"), {"a": 2, "b": 1}), (collections.OrderedDict(a=[1]), {"a": [1]}),
        (collections.namedtuple("Pair", "a b")(1, Level.LOW), (1, 3)), (Level.LOW, 3), (True, True), (None, None),
        (Text("a"), "a"), (Names(["a"]), ["a"]), ({1: 2}.keys(), {1}), ({1: 2}.items(), {(1, 2)}),
        (bytearray(b"a"), b"a"), (Fraction(1, 2), Fraction(1, 2)), (Decimal("1.5"), Decimal("1.5")), (2j, 2j),
        (frozenset({Text("a")}), frozenset({"a"})), (2**90, 2**90),
    ],
)  # fmt: skip
def test_values_become_plain_ones_that_equal_them(value: Any, expected: Any) -> None:
    found = plain(value)
    assert found == expected and type(found) is type(expected)
    if isinstance(found, (tuple, frozenset)):
        assert {type(item) for item in found} <= {int, str}
    assert answer(value) == ["value", found]


def test_of_other_values_it_is_told_whether_they_are_true() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in (re.match("a", "a"), object(), range(2), iter(()), loop, [object()]):
        assert answer(value) == ["truth", True]
    assert answer(range(0)) == ["truth", False]
    with pytest.raises(TypeError, match="Match has no plain value"):
        plain(re.match("a", "a"))


def test_long_values_are_digested_on_request() -> None:
    def of(value: Any, whether_any: bool = False) -> Any:
        return call({"f": lambda x: x}, "digest", "f", whether_any, [value])

    assert of([1, "a"]) == [1, "a"] and of("a" * 10_000) == "a" * 10_000
    assert len(of("a" * 10_001)) == 64 and len(of({"k": 7**9999})["k"]) == 64
    assert of(7**9999) != of(7**9999 + 1) and of(7**9999) == of(7**9999)
    assert [of(value, True) for value in (None, "x", False)] == [False, True, False]
