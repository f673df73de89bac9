"""Word problems, scored by the number behind ``####``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import ClassVar

from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, Need, TaskResult
from tasks.reference.items import evaluation_problems
from tasks.scores import share_score

STOP = ("\n\n", "\nQuestion:")
FINAL = re.compile(r"####[ \t]*([^\n]*)")


def final_answer(text: str) -> str:
    """What stands behind the first ``####``, or nothing."""
    found = FINAL.search(text)
    return found.group(1).strip() if found else ""


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").removeprefix("$").rstrip("."))
    except InvalidOperation:
        return None


def is_equal(given: str, expected: str) -> bool:
    """Whether both are the same number; what is no plain number is left to math-verify.

    Without math-verify installed such an answer is wrong.
    """
    if not given:
        return False
    left, right = _number(given), _number(expected)
    if left is not None and right is not None:
        return left == right
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(expected), parse(given)))


@dataclass(frozen=True)
class MathTask(ModelTask):
    """Exact match of the final number, greedy decoding."""

    kind: ClassVar[str] = "generative"
    version: ClassVar[int] = 1

    items: int = 250
    seed: int = 0
    max_new_tokens: int = 80
    name: str = "math"
    domain: str = "math"

    def tokens_to_write(self) -> int:
        return self.items * self.max_new_tokens

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        prompts = [problem.prompt for problem in evaluation_problems("math", self.items, self.seed)]
        return Need(counter.longest(prompts) + self.max_new_tokens, self.max_new_tokens)

    def run(self, backend: Backend) -> TaskResult:
        problems = evaluation_problems("math", self.items, self.seed)
        prompts = [problem.prompt for problem in problems]
        answers = backend.generate(prompts, self.max_new_tokens, STOP, progress=f"{self.name}: writing")
        samples = []
        for problem, answer in zip(problems, answers, strict=True):
            given, expected = final_answer(answer), str(problem.meta["answer"])
            detail = {"given": given, "expected": expected, "steps": problem.meta["steps"]}
            score = float(is_equal(given, expected))
            samples.append(
                Sample(self.name, problem.id, score, domain="math", output=answer, detail=detail, prompt=problem.prompt)
            )
        return TaskResult([share_score(self.name, "exact_match", [sample.score for sample in samples])], samples)
