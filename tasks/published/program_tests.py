"""Whether a program solves a problem of HumanEval, MBPP or their EvalPlus versions: what is run and what is right.

Everything runs in ``tasks.sandbox.run``, the data sets' own solutions too. A program gets inputs alone and hands back
values; it is gone before they are looked at. There are two kinds:

- *asserts* (``humaneval``, ``mbpp``): the published tests run afterwards, in a process without the program, with a
  function that answers each call with the value that the program gave for it (``replayed_tests``). So they hold for
  what was returned, not for an object that equals everything, a replaced ``exec`` or a forged frame: nothing can be
  pretended. A value is compared as a plain one of its builtin type (a Counter as a dict); of a type that has none a
  test learns only whether it is true.
- *inputs* (``humaneval_plus``, ``mbpp_plus``): the values are compared here with those of the data set's solution, as
  EvalPlus compares them (Liu et al. 2023, arXiv 2305.01210; ``evalplus.eval`` 0.3.1, but for HumanEval/32, whose
  passing tests that version does not count).

What differs from running published tests behind a program, as others do:

- Every call is made, also those behind a first one that is wrong, with arguments of its own: what a program does to
  them no test sees. Tests that draw at random (HumanEval/38, 50, 53) draw the same for every program.
- Helpers of a prompt that tests use (``poly``, ``encode_cyclic``, ``encode_shift``) are the data set's.
- The calls of MBPP's tests are evaluated where the program's names are, since tests may build arguments from its
  classes (367).
- Tests whose calls depend on earlier answers cannot be run so. No published one is of that kind; WinnowError says so.

There is no package beside the standard library in the sandbox: a program that imports numpy fails.
"""

import ast
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.schema import Row
from harness.errors import WinnowError
from tasks.published.replayed_tests import ANSWER
from tasks.sandbox.run import Failed, Limits, Outcome, Program, judge_many, run_function, run_many

log = logging.getLogger(__name__)

CHECKED, PLUS = ("humaneval", "mbpp"), ("humaneval_plus", "mbpp_plus")
DRIVER = Path(__file__).with_name("beside_program.py").read_text(encoding="utf-8")
REPLAY = Path(__file__).with_name("replayed_tests.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Verdict:
    """``passed`` of ``tests`` tests; of a plus set also of its base tests, which are the ones of the plain set."""

    status: str
    passed: int
    tests: int
    base_passed: int = 0
    base_tests: int = 0

    @property
    def right(self) -> bool:
        return self.tests > 0 and self.passed == self.tests

    @property
    def base_right(self) -> bool:
        return self.base_tests > 0 and self.base_passed == self.base_tests


def limits(data_set: str, cpu_seconds: int | None) -> Limits:
    """For all tests of a problem: 5 s of CPU time (60 s with EvalPlus' hundreds of inputs) and 1 GiB of memory."""
    plus = data_set in PLUS
    seconds = cpu_seconds or (60 if plus else 5)
    return Limits(seconds, 3.0 * seconds + 5, memory_bytes=2**30, output_bytes=2**23 if plus else 2**20)


def judge(
    data_set: str, problems: Sequence[Row], sources: Sequence[str], cpu_seconds: int | None = None, progress: str = ""
) -> list[Verdict | None]:
    """The verdict on one program for each problem; None where the data set's own solution does not run either, which is
    logged. Raises WinnowError where the sandbox does not work, for tests that cannot be run apart from a program, or
    where EvalPlus is needed and not installed."""
    bounds = limits(data_set, cpu_seconds)
    if data_set in CHECKED:
        return _by_asserts(data_set, problems, sources, bounds, progress)
    require_evalplus(data_set)
    return _by_inputs(data_set, problems, sources, bounds, progress)


def entry_point(data_set: str, row: Row) -> str:
    """The function that is tested: of MBPP the one that the solution defines and the first test names."""
    if data_set != "mbpp":
        return str(row["entry_point"])
    defined = re.findall(r"^def\s+(\w+)", row["code"], re.MULTILINE)
    return next((name for name in defined if re.search(rf"\b{name}\b", row["test_list"][0])), "")


def require_evalplus(data_set: str) -> None:
    if find_spec("evalplus") is None:
        raise WinnowError(
            f'{data_set} needs EvalPlus: pip install "moe-winnow[code]" && pip install --no-deps evalplus==0.3.1'
        )


# --- asserts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tests:
    """Tests that run behind the statements ``setup``, and the inputs of ``DRIVER`` that give the answers for them.
    ``asked``: the calls as ``replayed_tests.record`` found them, where the tests make them themselves."""

    name: str
    setup: str
    tests: list[str]
    inputs: list[list[Any]]
    asked: list[Any] = field(default_factory=list)


def _by_asserts(
    data_set: str, problems: Sequence[Row], sources: Sequence[str], bounds: Limits, progress: str
) -> list[Verdict | None]:
    tests = [_of_mbpp(row) for row in problems] if data_set == "mbpp" else _of_humaneval(problems, bounds)
    programs = [Program(source, one.name, one.inputs, DRIVER) for source, one in zip(sources, tests, strict=True)]

    def verdict(place: int, outcome: Outcome) -> Verdict | None:
        one = tests[place]
        if outcome.status != "ok":
            return Verdict(outcome.status, 0, len(one.tests))
        answers = [None if isinstance(value, Failed) else value for value in outcome.outputs]
        replay = run_function(REPLAY, "judge", [[one.setup, one.tests, one.name, answers, one.asked]], bounds)
        if replay.status != "ok" or isinstance(replay.outputs[0], Failed):
            return Verdict("error" if replay.status == "ok" else replay.status, 0, len(one.tests))
        passed, as_asked = replay.outputs[0]
        if not as_asked:
            raise _inseparable(problems[place], "they call it otherwise with one answer than with another")
        return Verdict("ok", passed, len(one.tests))

    return judge_many(programs, verdict, bounds, progress)


def _inseparable(row: Row, why: str) -> WinnowError:
    return WinnowError(f"{row['id']}: its tests cannot be run apart from a program ({why}): leave the problem out")


def _of_humaneval(problems: Sequence[Row], bounds: Limits) -> list[_Tests]:
    """The test functions call what they are given; what they ask is found by calling them without a program."""
    setups = [f"{row['prompt']}\n    pass\n" for row in problems]
    texts = [f"{row['test']}\ncheck({row['entry_point']})\n" for row in problems]
    names = [str(row["entry_point"]) for row in problems]
    arguments = zip(setups, texts, names, strict=True)
    recorded = run_many([Program(REPLAY, "record", [list(one)]) for one in arguments], bounds)
    found = []
    for row, setup, text, name, outcome in zip(problems, setups, texts, names, recorded, strict=True):
        calls = outcome.outputs[0] if outcome.status == "ok" else Failed(outcome.detail)
        if isinstance(calls, Failed) or not calls:
            raise _inseparable(row, calls.message if isinstance(calls, Failed) else f"they never call {name}")
        found.append(_Tests(name, setup, [text], [["of_arguments", name, *call] for call in calls], calls))
    return found


def _of_mbpp(row: Row) -> _Tests:
    """The tests are assertions about calls that stand in them: each is taken out, its answer put in its place."""
    name, setup = entry_point("mbpp", row), str(row["test_setup_code"])
    calls: list[str] = []
    tests = []
    for text in row["test_list"]:
        before, test = len(calls), ast.parse(text.strip())
        if _repeats(test, name):
            raise _inseparable(row, f"'{text.strip()}' calls it in a loop or a function")
        tests.append(ast.unparse(_Answered(text.strip(), name, calls).visit(test)))
        if len(calls) == before:
            raise _inseparable(row, f"'{text.strip()}' does not call a function that the solution defines")
    inputs = [["of_text", setup, call] for call in calls]
    return _Tests(name, f"{row['code']}\n{setup}", tests, inputs)


def _names(node: ast.AST, name: str) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(node))


def _repeats(test: ast.AST, name: str) -> bool:
    """Whether ``name`` stands where it may be called other than once."""
    repeating = (ast.For, ast.While, ast.comprehension, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
                 ast.Lambda, ast.FunctionDef, ast.ClassDef)  # fmt: skip
    return any(isinstance(node, repeating) and _names(node, name) for node in ast.walk(test))


class _Answered(ast.NodeTransformer):
    """Puts answers in the place of the calls of ``name``, and the texts of those into ``calls``."""

    def __init__(self, text: str, name: str, calls: list[str]) -> None:
        self.text, self.name, self.calls = text, name, calls

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not (isinstance(node.func, ast.Name) and node.func.id == self.name):
            return self.generic_visit(node)
        self.calls.append(ast.get_source_segment(self.text, node) or ast.unparse(node))
        return ast.parse(f"{ANSWER}({len(self.calls) - 1})", mode="eval").body


# --- inputs -----------------------------------------------------------------------------------------------------------


def _inputs(data_set: str, row: Row) -> list[list[Any]]:
    """EvalPlus' inputs with the types that JSON has lost; those of the base tests come first."""
    found = row["base_input"] + row["plus_input"]
    if data_set == "mbpp_plus":
        from evalplus.data.mbpp import mbpp_deserialize_inputs

        found = mbpp_deserialize_inputs(row["id"], found)
    return [list(arguments) for arguments in found]


def _by_inputs(
    data_set: str, problems: Sequence[Row], sources: Sequence[str], bounds: Limits, progress: str
) -> list[Verdict | None]:
    solutions = [row["prompt"] + row["canonical_solution"] for row in problems]
    expected, programs = (
        [_with_inputs(data_set, *both) for both in zip(problems, texts, strict=True)] for texts in (solutions, sources)
    )
    wanted = run_many(expected, bounds, f"{progress}, what is expected" if progress else "")

    def verdict(place: int, outcome: Outcome) -> Verdict | None:
        return _of_inputs(data_set, problems[place], wanted[place], outcome)

    return judge_many(programs, verdict, bounds, progress)


def _with_inputs(data_set: str, row: Row, source: str) -> Program:
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS

    name = row["entry_point"]
    any_value = data_set == "mbpp_plus" and name in MBPP_OUTPUT_NOT_NONE_TASKS
    inputs = [["digest", name, any_value, arguments] for arguments in _inputs(data_set, row)]
    return Program(source, name, inputs, DRIVER)


def _of_inputs(data_set: str, row: Row, expected: Outcome, actual: Outcome) -> Verdict | None:
    base, tests = len(row["base_input"]), len(row["base_input"]) + len(row["plus_input"])
    if expected.status != "ok" or any(isinstance(value, Failed) for value in expected.outputs):
        log.warning("%s: its own solution does not run in the sandbox (%s): left out", row["id"], expected.status)
        return None
    if actual.status != "ok":
        return Verdict(actual.status, 0, tests, 0, base)
    passed, atol = [], row["atol"]
    for arguments, value, wanted in zip(_inputs(data_set, row), actual.outputs, expected.outputs, strict=True):
        if atol == 0 and _is_floats(wanted):
            atol = 1e-6  # EvalPlus keeps it for the inputs that follow
        passed.append(is_right(data_set, row["entry_point"], arguments, value, wanted, atol))
    return Verdict("ok", sum(passed), tests, sum(passed[:base]), base)


def _is_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def is_right(data_set: str, entry_point: str, arguments: Sequence[Any], value: Any, wanted: Any, atol: float) -> bool:
    """Whether EvalPlus takes ``value`` for right: equal, near enough where numbers are compared, or by the rule of its
    own that some problems have. What cannot be compared is wrong."""
    from evalplus.eval import MBPP_OUTPUT_SET_EQ_TASKS, _special_oracle

    if isinstance(value, Failed):
        return False
    try:
        if data_set == "humaneval_plus" and entry_point == "find_zero":
            return bool(abs(_special_oracle._poly(*arguments, value)) <= atol)
        right = bool(value == wanted)
        if data_set == "mbpp_plus":
            if entry_point in MBPP_OUTPUT_SET_EQ_TASKS:
                right = _same_members(value, wanted)
            elif entry_point in _OWN_RULES:
                right = right or _OWN_RULES[entry_point](_special_oracle, arguments, value, atol)
        if right or atol == 0:
            return right
        same_form = type(value) is type(wanted) and (not isinstance(wanted, (list, tuple)) or len(value) == len(wanted))
        return same_form and bool(np.allclose(value, wanted, rtol=1e-7, atol=atol))
    except Exception:
        return False


def _same_members(value: Any, wanted: Any) -> bool:
    """Equality as sets. None is made of ``value``: its members may have been chosen to make that take long."""
    members = set(wanted)
    return all(item in members for item in value) and members == {item for item in value if item in members}


_OWN_RULES: Mapping[str, Any] = {
    "are_equivalent": lambda oracle, arguments, value, atol: True,
    "sum_div": lambda oracle, arguments, value, atol: value == 0,
    "surface_Area": lambda oracle, arguments, value, atol: abs(value - oracle._surface_Area(*arguments)) <= atol,
    "digit_distance_nums": lambda oracle, arguments, value, atol: value == oracle._digit_distance_nums(*arguments),
}
