"""LiveCodeBench's code generation (Jain et al. 2024, arXiv 2403.07974): problems of programming contests, pass@1.

A program reads a test's input and prints its answer, or has a class with a method that is called. Requests, and how
answers are compared, follow ``lcb_runner`` (github.com/LiveCodeBench/LiveCodeBench); what differs:

- One greedy answer a problem, where it samples several; what it puts into a system message heads the request.
- A program that reads and prints is the last code block that is closed; one that is called is what its class or
  function needs of all blocks, as for the other code sets (``program_text``).
- The tests of a problem share ``cpu_seconds`` and 2 GiB of memory, where it gives 6 s to each test.
- There is no package beside the standard library: a program that imports numpy fails.
- A model without a chat template gets the same request, with the code block of its answer begun; there it gets a
  worked example.

A program gets inputs alone, in ``tasks.sandbox.run``; what it prints or returns is compared here. Nothing can be
pretended.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

from harness.contracts.backend import Backend, Reader, TokenCounter
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, Need, TaskResult
from harness.data.schema import Row
from tasks.published.generative import Answer, GenerativeBenchmark
from tasks.published.programs import programs
from tasks.sandbox.run import Failed, Limits, Outcome, Program, judge_many, layers_in_force
from tasks.scores import share_score

DATA_SETS = ("livecodebench",)
CALL = "_winnow_call"
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
COMPLETE = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
READ_AND_PRINT = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows."
)
# What every program finds imported.
MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "typing",
)  # fmt: skip
NESTED = 20  # fences within one text that are looked at
QUOTES = ('"""', "'''")
PRELUDE = (
    "".join(f"from {name} import *\n" for name in (*MODULES, "builtins"))
    + "".join(f"import {name}\n" for name in MODULES)
    + "quit = exit\nsys.setrecursionlimit(50000)\n"
)
# The whole program is run for each input, as a program of its own. ``exit`` (sys's) ends it well.
READS_AND_PRINTS = """
def {call}(text, program={program!r}):
    import io, sys
    kept = sys.stdin, sys.stdout
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")
    printed = io.BytesIO()
    first = sys.stdout = io.TextIOWrapper(printed, "utf-8")  # where a program puts another over it, this one must live
    try:
        exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
    except SystemExit:
        pass
    finally:
        last, (sys.stdin, sys.stdout) = sys.stdout, kept
    first.flush()
    last.flush()
    return printed.getvalue().decode("utf-8", "replace")
"""
CALLED = """
def {call}(*arguments):
    owner = globals().get("Solution")
    return (getattr(owner(), {function!r}) if owner else globals()[{function!r}])(*arguments)
"""


def request(row: Row) -> str:
    """What a model is asked."""
    form, code = (COMPLETE, row["starter_code"]) if row["starter_code"] else (READ_AND_PRINT, "# YOUR CODE HERE")
    return (
        f"{SYSTEM}\n\n### Question:\n{row['prompt']}\n\n### Format: {form}\n```python\n{code}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )


def last_block(answer: str) -> str:
    """The code of the last closed code block: a model may think in others before it. "" where there is none.

    A fence between triple quotes is text of the program's, unless no other closes the block.
    """
    lines = answer.split("\n")
    marks = [place for place, line in enumerate(lines) if line.lstrip().startswith(("```", "~~~"))]
    block, at = (0, 0), 0
    while at + 1 < len(marks):
        inside = ((lines[marks[at] + 1 : marks[end]], end) for end in range(at + 1, min(at + NESTED, len(marks))))
        end = next((end for code, end in inside if not _in_quotes(code)), at + 1)
        block, at = (marks[at] + 1, marks[end]), end + 1
    return "\n".join(lines[slice(*block)])


def _in_quotes(lines: Sequence[str]) -> bool:
    return any(sum(line.count(quotes) for line in lines) % 2 for quotes in QUOTES)


def taken_out(problems: Sequence[Row], answers: Sequence[str], chat: bool) -> list[str]:
    """The program in each answer: of a base model the block has been opened for it."""
    found = [last_block(answer) if chat else answer for answer in answers]
    called = [place for place, row in enumerate(problems) if row["function"] is not None]
    names = ["Solution" if "class Solution" in answers[place] else problems[place]["function"] for place in called]
    none = [""] * len(called)
    sources = programs([answers[place] for place in called], none, none, [[name] for name in names])
    for place, source in zip(called, sources, strict=True):
        found[place] = source
    return found


def program_for(row: Row, source: str) -> Program:
    """The program on the inputs of all tests of ``row``."""
    inputs = [given for given, _ in row["tests"]]
    if row["function"] is None:
        return Program(READS_AND_PRINTS.format(call=CALL, program=PRELUDE + source), CALL, [[text] for text in inputs])
    called = CALLED.format(call=CALL, function=row["function"])
    arguments = [[json.loads(line) for line in text.split("\n")] for text in inputs]
    return Program(f"{PRELUDE}\n{source}\n{called}", CALL, arguments)


def passed(row: Row, outcome: Outcome) -> int:
    """How many tests of ``row`` gave what they should."""
    if outcome.status != "ok":
        return 0
    right = prints_the_same if row["function"] is None else returns_the_same
    return sum(
        not isinstance(value, Failed) and right(value, wanted)
        for value, (_, wanted) in zip(outcome.outputs, row["tests"], strict=True)
    )


def returns_the_same(value: Any, wanted: str) -> bool:
    """Equality with the JSON text ``wanted``; a tuple counts as a list."""
    return bool((list(value) if isinstance(value, tuple) else value) == json.loads(wanted))


def prints_the_same(value: Any, wanted: str) -> bool:
    """Whether every line is the same without the spaces around it, or is the same numbers."""
    if not isinstance(value, str):
        return False
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (value, wanted))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(part) for part in a.split()] == [Decimal(part) for part in b.split()]
    except InvalidOperation:
        return False


@dataclass(frozen=True)
class ContestBenchmark(GenerativeBenchmark, ModelTask):
    """``pass@1``: the share of problems whose program passes every test; a sample's score is 1.0 for one that does.

    ``cpu_seconds``: for all tests of one problem. Raises WinnowError for data that cannot be had, and a sandbox that
    does not work.
    """

    version: ClassVar[int] = 2  # 2: programs that are called are taken out as for the other code sets

    domain: str = "code"
    max_new_tokens: int = 2000
    cpu_seconds: int = 60

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return self.need_of(counter, self._prompts(counter, self.rows()))

    def run(self, backend: Backend) -> TaskResult:
        self.require(DATA_SETS)
        problems = self.rows()
        chat = self.in_chat(backend)
        answers = self.answers(backend, self._prompts(backend, problems), () if chat else ("\n```",))
        sources = taken_out(problems, [answer.answer for answer in answers], chat)
        limits = Limits(self.cpu_seconds, 3.0 * self.cpu_seconds + 5, memory_bytes=2**31, output_bytes=2**24)
        to_run = [program_for(row, source) for row, source in zip(problems, sources, strict=True)]

        def sample(place: int, outcome: Outcome) -> Sample:
            return self._sample(problems[place], answers[place], sources[place], outcome)

        samples = judge_many(to_run, sample, limits, f"{self.name}: running")
        scores = [share_score(self.name, "pass@1", [sample.score for sample in samples])]
        result = TaskResult(scores, samples, {"sandbox": layers_in_force()})
        return self.with_truncated(result, problems, answers)

    def _prompts(self, reader: Reader, problems: Sequence[Row]) -> list[str]:
        texts = [request(row) for row in problems]
        if not self.in_chat(reader):
            return [reader.prompt(f"{text}```python\n") for text in texts]
        return [self.asked_in_chat(reader, [{"role": "user", "content": text}]) for text in texts]

    def _sample(self, row: Row, answer: Answer, source: str, outcome: Outcome) -> Sample:
        count, tests = passed(row, outcome), len(row["tests"])
        detail = {
            "status": outcome.status, "passed": count, "tests": tests, "program": source,
            "difficulty": row["difficulty"], **answer.detail(),
        }  # fmt: skip
        right = float(tests > 0 and count == tests)
        return Sample(self.name, row["id"], right, 1.0, "code", answer.text, detail, answer.prompt)
