"""Do the scorers take the data sets' own solutions for right? ``python -m tasks.checks.real_data --root DIR``

DIR holds staged data (``winnow-data stage --suite paper --to DIR``). Every set of code and math in it is scored with
its own solutions in place of a model's answers: as programs in the sandbox, as a base and as a chat model would write
them, and by EvalPlus' own checker where EvalPlus is installed (which runs them in this process's children: they are
the data sets' own). Prints one line a check and ends with status 1 where fewer are right than should be.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from harness.data.schema import Row
from harness.data.sets import is_staged, rows
from harness.errors import WinnowError
from tasks.published.code import taken_out
from tasks.published.equality import Comparer
from tasks.published.final_answer import final_answer
from tasks.published.math import NUMBERS, SHOTS
from tasks.published.program_tests import CHECKED, PLUS, entry_point, judge, limits
from tasks.sandbox.run import Failed, Program, run_many

BY_SANDBOX, BY_CHECKER = "solutions in the sandbox", "by EvalPlus' checker, on the tests' calls"
COMPLETION, BLOCK = "as a completion, in the sandbox", "as a code block, in the sandbox"
# Known to fail: 123 needs more CPU time than the tests of a problem get.
MAY_FAIL = {("mbpp", way): {"123"} for way in (BY_SANDBOX, COMPLETION, BLOCK)}

# The arguments of every call that a test makes; a function's own recursive calls are no test's.
RECORDER = """
def _winnow_record(tests):
    import copy
    name, calls, depth = {name!r}, [], [0]
    original = globals()[name]
    def recorded(*arguments):
        if not depth[0]:
            calls.append(list(copy.deepcopy(arguments)))
        depth[0] += 1
        try:
            return original(*arguments)
        finally:
            depth[0] -= 1
    globals()[name] = recorded
    for test in tests:
        exec(test, globals())
    return calls
"""


@dataclass(frozen=True)
class Check:
    data_set: str
    what: str
    right: list[str]
    wrong: list[str]

    @property
    def holds(self) -> bool:
        return set(self.wrong) <= MAY_FAIL.get((self.data_set, self.what), set())

    def __str__(self) -> str:
        line = f"{self.data_set:15} {self.what:45} {len(self.right)}/{len(self.right) + len(self.wrong)}"
        return f"{line}  wrong: {', '.join(self.wrong[:8])}" if self.wrong else line


def check(data_set: str, what: str, problems: Sequence[Row], outcomes: Sequence[bool]) -> Check:
    ids = [row["id"] for row in problems]
    by_outcome: tuple[list[str], ...] = tuple(
        [name for name, right in zip(ids, outcomes, strict=True) if right is wanted] for wanted in (True, False)
    )
    return Check(data_set, what, *by_outcome)


def solution(data_set: str, row: Row) -> str:
    return str(row["code"]) if data_set == "mbpp" else f"{row['prompt']}{row['canonical_solution']}"


def as_completion(data_set: str, problems: Sequence[Row]) -> list[str]:
    """The solutions taken out of what a base model would write behind the prompts."""
    column = "code" if data_set == "mbpp" else "canonical_solution"
    return taken_out(data_set, problems, [f"{row[column]}\n\nNow the next one:" for row in problems], chat=False)


def as_block(data_set: str, problems: Sequence[Row]) -> list[str]:
    """The solutions taken out of a chat model's code blocks."""
    answers = [f"Sure:\n```python\n{solution(data_set, row)}\n```\nThis works because" for row in problems]
    return taken_out(data_set, problems, answers, chat=True)


def code_checks(data_set: str, problems: Sequence[Row]) -> Iterator[Check]:
    """By this project's scorer."""
    ways: list[tuple[str, Callable[[str, Sequence[Row]], list[str]]]] = [
        (BY_SANDBOX, lambda data_set, problems: [solution(data_set, row) for row in problems]),
        (COMPLETION, as_completion),
        (BLOCK, as_block),
    ]
    for what, sources in ways:
        verdicts = judge(data_set, problems, sources(data_set, problems), progress=what)
        yield check(data_set, what, problems, [verdict is not None and verdict.right for verdict in verdicts])


def recorded_calls(data_set: str, problems: Sequence[Row]) -> list[list[list[object]] | None]:
    """The arguments that the published tests call each solution with; None where they are no plain values."""
    programs = []
    for row in problems:
        name = entry_point(data_set, row)
        tests = (
            [f"{row['test']}\ncheck({name})"]
            if data_set == "humaneval"
            else [row["test_setup_code"], *row["test_list"]]
        )
        programs.append(
            Program(f"{solution(data_set, row)}\n{RECORDER.format(name=name)}", "_winnow_record", [[tests]])
        )
    outcomes = run_many(programs, limits(data_set, None), progress="calls of the tests")
    found = [outcome.outputs[0] if outcome.status == "ok" else None for outcome in outcomes]
    return [None if value is None or isinstance(value, Failed) else value for value in found]


def evalplus_checks(data_set: str, problems: Sequence[Row]) -> Iterator[Check]:
    """By EvalPlus' own checker, on the calls that the published tests make."""
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS, untrusted_check
    from evalplus.gen.util import trusted_exec

    kept, outcomes = [], []
    for row, inputs in zip(problems, recorded_calls(data_set, problems), strict=True):
        if inputs:
            source, name = solution(data_set, row), entry_point(data_set, row)
            if name == "find_zero":
                # HumanEval/32: EvalPlus 0.3.1 has a rule for it, by which no test is ever counted as passed. Under
                # another name its answers are compared as all others are.
                source, name = f"{source}\nfound_zero = find_zero\n", "found_zero"
            expected, seconds = trusted_exec(source, inputs, name, True, name in MBPP_OUTPUT_NOT_NONE_TASKS)
            status, _ = untrusted_check(data_set, source, inputs, name, expected, 0, seconds)
            kept.append(row)
            outcomes.append(status == "pass")
    yield check(data_set, BY_CHECKER, kept, outcomes)


def math_checks(data_set: str, problems: Sequence[Row]) -> Iterator[Check]:
    with Comparer() as same:
        taken = [final_answer(row["solution"], row["question"], data_set in NUMBERS).strict for row in problems]
        outcomes = [same(given, str(row["answer"])) for given, row in zip(taken, problems, strict=True)]
    yield check(data_set, "solutions' final answers", problems, outcomes)


def checks(root: str, names: Sequence[str]) -> Iterator[Check]:
    """Those of the data sets ``names`` that are staged in ``root``."""
    for name in names:
        if not is_staged(name, root):
            print(f"{name:15} not staged in {root}: left out")
        elif name in SHOTS:
            yield from math_checks(name, rows(name, root))
        else:
            yield from code_checks(name, rows(name, root))
            if name in CHECKED and find_spec("evalplus"):
                yield from evalplus_checks(name, rows(name, root))


def main() -> int:
    known = (*CHECKED, *PLUS, *SHOTS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", required=True, help="the folder of winnow-data stage")
    parser.add_argument("--only", nargs="+", choices=known, default=known, help="these data sets alone")
    chosen = parser.parse_args()
    hold = []
    try:
        for found in checks(chosen.root, chosen.only):
            print(found, flush=True)
            hold.append(found.holds)
    except WinnowError as error:
        parser.exit(2, f"{error}\n")
    return 0 if hold and all(hold) else 1


if __name__ == "__main__":
    raise SystemExit(main())
