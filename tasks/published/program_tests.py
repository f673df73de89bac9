"""Whether a program solves a problem of HumanEval, MBPP or their EvalPlus versions: what is run and what is right.

Everything runs in ``tasks.sandbox.run``, the data sets' own solutions too. There are two kinds:

- *asserts* (``humaneval``, ``mbpp``): the published tests are statements, so they run in the program's own process,
  behind it. A program that set out to would find them there and could pretend to pass, as in every harness that runs
  these tests; it cannot do so by printing, exiting or writing blindly, since it must return a token that it was not
  told.
- *inputs* (``humaneval_plus``, ``mbpp_plus``): the program gets inputs alone and hands back values, which are compared
  here with those of the data set's solution, as EvalPlus compares them (Liu et al. 2023, arXiv 2305.01210;
  ``evalplus.eval`` 0.3.1, but for HumanEval/32, whose passing tests that version does not count). Nothing can be
  pretended.

There is no package beside the standard library in the sandbox: a program that imports numpy fails.
"""

import hashlib
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from harness.data.schema import Row
from harness.errors import WinnowError
from tasks.sandbox.run import Failed, Limits, Outcome, Program, run_many

log = logging.getLogger(__name__)

CHECKED, PLUS = ("humaneval", "mbpp"), ("humaneval_plus", "mbpp_plus")
CALL = "_winnow_call"
_SECRET = secrets.token_hex(16)

# The published tests, each a text of its own, run one after the other where the program's names are.
ASSERTS = """
def {call}(tests, token):
    passed = 0
    for test in tests:
        try:
            exec(compile(test, "test", "exec"), globals())
            passed += 1
        except BaseException:
            pass
    return [passed, token]
"""
# Values of subclasses (Counter, namedtuple) become plain ones, as they equal them; integers that are too long to be
# written in decimal and long texts become digests. It runs on both sides, and what comes back is only compared.
INPUTS = """
def {call}(*arguments):
    from hashlib import sha256

    def digest(text):
        return sha256(text.encode()).hexdigest()

    def plain(value):
        for kind in (bool, int, float, complex, str):
            if isinstance(value, kind):
                large = kind is int and value.bit_length() > 13000 or kind is str and len(value) > 10000
                return digest(ascii(value) if kind is str else hex(value)) if large else kind(value)
        if isinstance(value, dict):
            return {{plain(key): plain(item) for key, item in value.items()}}
        for kind in (list, tuple, set, frozenset):
            if isinstance(value, kind):
                return kind(plain(item) for item in value)
        return value
    value = {entry_point}(*arguments)
    if {whether_any} and not isinstance(value, bool):
        return value is not None
    return plain(value)
"""


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
    logged. Raises WinnowError where the sandbox does not work, or EvalPlus is needed and not installed."""
    bounds = limits(data_set, cpu_seconds)
    if data_set in CHECKED:
        programs = [_with_asserts(data_set, *both) for both in zip(problems, sources, strict=True)]
        outcomes = run_many(programs, bounds, progress)
        return [_of_asserts(*both) for both in zip(programs, outcomes, strict=True)]
    require_evalplus(data_set)
    solutions = [row["prompt"] + row["canonical_solution"] for row in problems]
    expected, actual = (
        run_many([_with_inputs(data_set, *both) for both in zip(problems, programs, strict=True)], bounds, what)
        for programs, what in ((solutions, f"{progress}, what is expected" if progress else ""), (sources, progress))
    )
    return [_of_inputs(data_set, *three) for three in zip(problems, expected, actual, strict=True)]


def require_evalplus(data_set: str) -> None:
    if find_spec("evalplus") is None:
        raise WinnowError(
            f'{data_set} needs EvalPlus: pip install "moe-winnow[code]" && pip install --no-deps evalplus==0.3.1'
        )


# --- asserts ----------------------------------------------------------------------------------------------------------


def _with_asserts(data_set: str, row: Row, source: str) -> Program:
    if data_set == "humaneval":
        tests = [f"{row['test']}\ncheck({row['entry_point']})\n"]
    else:
        tests = [f"{row['test_setup_code']}\n{test}\n" for test in row["test_list"]]
    token = hashlib.sha256(f"{_SECRET}{row['id']}".encode()).hexdigest()
    return Program(f"{source}\n{ASSERTS.format(call=CALL)}", CALL, [[tests, token]])


def _of_asserts(program: Program, outcome: Outcome) -> Verdict:
    tests, token = program.inputs[0]
    if outcome.status != "ok":
        return Verdict(outcome.status, 0, len(tests))
    value = outcome.outputs[0]
    returned = isinstance(value, list) and len(value) == 2 and value[1] == token and type(value[0]) is int
    return Verdict("ok" if returned else "error", value[0] if returned else 0, len(tests))


# --- inputs -----------------------------------------------------------------------------------------------------------


def _inputs(data_set: str, row: Row) -> list[list[Any]]:
    """EvalPlus' inputs with the types that JSON has lost; those of the base tests come first."""
    found = row["base_input"] + row["plus_input"]
    if data_set == "mbpp_plus":
        from evalplus.data.mbpp import mbpp_deserialize_inputs

        found = mbpp_deserialize_inputs(row["id"], found)
    return [list(arguments) for arguments in found]


def _with_inputs(data_set: str, row: Row, source: str) -> Program:
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS

    any_value = data_set == "mbpp_plus" and row["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS
    call = INPUTS.format(call=CALL, entry_point=row["entry_point"], whether_any=any_value)
    return Program(f"{source}\n{call}", CALL, _inputs(data_set, row))


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
                right = set(value) == set(wanted)
            elif entry_point in _OWN_RULES:
                right = right or _OWN_RULES[entry_point](_special_oracle, arguments, value, atol)
        if right or atol == 0:
            return right
        same_form = type(value) is type(wanted) and (not isinstance(wanted, (list, tuple)) or len(value) == len(wanted))
        return same_form and bool(np.allclose(value, wanted, rtol=1e-7, atol=atol))
    except Exception:
        return False


_OWN_RULES: Mapping[str, Any] = {
    "are_equivalent": lambda oracle, arguments, value, atol: True,
    "sum_div": lambda oracle, arguments, value, atol: value == 0,
    "surface_Area": lambda oracle, arguments, value, atol: abs(value - oracle._surface_Area(*arguments)) <= atol,
    "digit_distance_nums": lambda oracle, arguments, value, atol: value == oracle._digit_distance_nums(*arguments),
}
