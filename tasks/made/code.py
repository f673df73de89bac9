"""Python functions from docstrings, scored by running them: pass@1 with greedy decoding."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, Need, TaskResult
from tasks.reference.items import evaluation_problems
from tasks.reference.problem import Problem
from tasks.sandbox.run import Limits, Outcome, Program, judge_many, layers_in_force, same
from tasks.scores import share_score

# The body of a function ends where a line starts at the margin, or at a blank line.
STOP = (
    "\n\n",
    "\ndef ",
    "\nclass ",
    "\nimport ",
    "\nfrom ",
    "\nif ",
    "\nfor ",
    "\nprint",
    "\nreturn",
    "\n#",
    "\n@",
)


def function_body(answer: str) -> str:
    """``answer`` up to the first line, after the one it continues, that is not indented."""
    return re.split(r"\n(?=\S)", answer, maxsplit=1)[0]


def to_program(problem: Problem, answer: str) -> Program:
    """The prompt with the answer as one source, and the test inputs without what is expected of them."""
    name = re.search(r"def (\w+)\(", problem.prompt)
    if name is None:
        raise ValueError(f"{problem.id}: the prompt defines no function")
    source = problem.prompt + function_body(answer) + "\n"
    return Program(source, name.group(1), [[value] for value, _ in problem.meta["tests"]])


def passed_tests(problem: Problem, outcome: Outcome) -> int:
    """How many tests gave the expected value, of the expected type."""
    if outcome.status != "ok":
        return 0
    tests = problem.meta["tests"]
    return sum(same(value, expected) for value, (_, expected) in zip(outcome.outputs, tests, strict=True))


@dataclass(frozen=True)
class CodeTask(ModelTask):
    """pass@1: the share of problems whose answer passes every test. Programs run in ``tasks.sandbox.run``."""

    kind: ClassVar[str] = "generative"
    version: ClassVar[int] = 1

    items: int = 250
    seed: int = 0
    max_new_tokens: int = 96
    cpu_seconds: int = 2
    name: str = "code"
    domain: str = "code"

    def tokens_to_write(self) -> int:
        return self.items * self.max_new_tokens

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        prompts = [problem.prompt for problem in evaluation_problems("code", self.items, self.seed)]
        return Need(counter.longest(prompts) + self.max_new_tokens, self.max_new_tokens)

    def run(self, backend: Backend) -> TaskResult:
        problems = evaluation_problems("code", self.items, self.seed)
        prompts = [problem.prompt for problem in problems]
        answers = backend.generate(prompts, self.max_new_tokens, STOP, progress=f"{self.name}: writing")
        programs = [to_program(problem, answer) for problem, answer in zip(problems, answers, strict=True)]

        def judge(place: int, outcome: Outcome) -> tuple[str, int]:
            return outcome.status, passed_tests(problems[place], outcome)

        judged = judge_many(programs, judge, Limits(cpu_seconds=self.cpu_seconds), f"{self.name}: running")
        samples = []
        for problem, answer, (status, passed) in zip(problems, answers, judged, strict=True):
            tests = len(problem.meta["tests"])
            detail = {
                "status": status,
                "passed": passed,
                "tests": tests,
                "depth": problem.meta["depth"],
            }
            samples.append(
                Sample(
                    self.name,
                    problem.id,
                    float(passed == tests),
                    domain="code",
                    output=answer,
                    detail=detail,
                    prompt=problem.prompt,
                )
            )
        scores = [share_score(self.name, "pass@1", [sample.score for sample in samples])]
        return TaskResult(scores, samples, {"sandbox": layers_in_force()})
