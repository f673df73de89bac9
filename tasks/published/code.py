"""HumanEval, MBPP and their EvalPlus versions: pass@1 with greedy decoding, prompted as EvalPlus prompts.

A base model goes on with the prompt (of MBPP: a docstring that holds the request and its first test); a model with a
chat template is asked for a program, and its answer is begun for it up to the code. Stop strings, prompts and their
layout are those of ``evalplus.provider`` 0.3.1, so that scores compare with those of its leaderboard.
"""

import ast
import re
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

from harness.contracts.backend import Backend
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, TaskResult
from harness.data.schema import Row
from tasks.published.generative import GenerativeBenchmark
from tasks.published.program_tests import CHECKED, PLUS, entry_point, judge, require_evalplus
from tasks.sandbox.run import layers_in_force
from tasks.scores import share_score

# Where a program is over: EvalPlus' marks, beside end-of-text tokens, which the backends know.
ENDS = ("\nif __name__", "\ndef main(", "\nprint(")
ENDS_OF_COMPLETION = {
    "humaneval": ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
    "mbpp": ('\n"""', "\nassert"),
}
END_OF_BLOCK = "\n```\n"
REQUEST = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
ANSWER = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
# EvalPlus tries every stretch of lines of a text: that of a model that loops would take it hours.
MAX_LINES = 200


def problem_text(data_set: str, row: Row) -> str:
    """What a model is shown: the row's prompt, or MBPP's request with its first test, as in EvalPlus' MBPP+."""
    if data_set == "mbpp":
        return f'"""\n{row["text"].strip()}\n{row["test_list"][0].strip()}\n"""\n'
    return f"{row['prompt'].strip()}\n"


def messages(text: str) -> list[dict[str, str]]:
    """The problem as a request, and the beginning of the answer."""
    return [
        {"role": "user", "content": f"{REQUEST}\n```\n{text.strip()}\n```\n"},
        {"role": "assistant", "content": f"{ANSWER}\n```python\n"},
    ]


def parses(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def program(answer: str, begun: str = "") -> str:
    """The program in an answer that goes on with ``begun``: what is inside its code block where one is opened, else all
    up to where a block closes; of that the longest beginning, in lines, that parses."""
    opened = re.search(r"^\s*```(?:python|py)?[ \t]*\n", answer)
    inside = answer[opened.end() :] if opened else answer
    lines = re.split(r"^\s*```", inside, maxsplit=1, flags=re.MULTILINE)[0].split("\n")
    for count in range(len(lines), 0, -1):
        source = begun + "\n".join(lines[:count])
        if parses(source):
            return source
    return begun + "\n".join(lines)


@dataclass(frozen=True)
class CodeBenchmark(GenerativeBenchmark, ModelTask):
    """``pass@1``: the share of problems whose program passes every test; a sample's score is 1.0 for one that does.

    ``data_set``: humaneval, mbpp, humaneval_plus, mbpp_plus. For the plus sets EvalPlus takes the program out of the
    answer (``evalplus.sanitize``) and says how values are compared; they also give ``base_pass@1``, by the base tests
    alone. For the other two ``program`` takes it out. ``cpu_seconds``: for all tests of one problem (None:
    ``benchmark_tests.limits``). Problems of the plus sets whose own solution does not run are left out. With
    ``thinking`` "on" no answer is begun for the model, which would think no more.

    Raises WinnowError for data that cannot be had, EvalPlus not installed, and a sandbox that does not work.
    """

    version: ClassVar[int] = 2  # 2: published tests run on what a program returned, not in its process

    domain: str = "code"
    max_new_tokens: int = 768
    cpu_seconds: int | None = None

    def run(self, backend: Backend) -> TaskResult:
        self.require((*CHECKED, *PLUS))
        plus = self.data_set in PLUS
        if plus:
            require_evalplus(self.data_set)
        problems = self.rows()
        texts = [problem_text(self.data_set, row) for row in problems]
        chat, begins = self.in_chat(backend), self.thinking_mode != "on"
        asked = [messages(text)[: 2 if begins else 1] for text in texts]
        prompts = [self.asked_in_chat(backend, one) for one in asked] if chat else [backend.prompt(t) for t in texts]
        ends = (END_OF_BLOCK,) if chat else ENDS_OF_COMPLETION[self.data_set.removesuffix("_plus")]
        answers = self.answers(backend, prompts, (*ENDS, *ends) if begins else ())
        begun = [""] * len(texts) if chat else texts
        take_out = self._sanitized if plus else lambda row, answer, before: program(answer, before)
        sources = [
            take_out(row, answer.answer.replace("\t", "    "), before)
            for row, answer, before in zip(problems, answers, begun, strict=True)
        ]
        verdicts = judge(self.data_set, problems, sources, self.cpu_seconds, f"{self.name}: running")
        samples = []
        for row, answer, source, verdict in zip(problems, answers, sources, verdicts, strict=True):
            if verdict is None:
                continue
            detail = {
                "status": verdict.status, "passed": verdict.passed, "tests": verdict.tests, "program": source
            } | ({"base_passed": verdict.base_passed, "base_right": verdict.base_right} if plus else {})  # fmt: skip
            score, detail = float(verdict.right), detail | answer.detail()
            samples.append(Sample(self.name, row["id"], score, 1.0, "code", answer.text, detail, answer.prompt))
        scores = [share_score(self.name, "pass@1", [sample.score for sample in samples])]
        if plus:
            right = [float(sample.detail["base_right"]) for sample in samples]
            scores.append(share_score(self.name, "base_pass@1", right))
        scores = [replace(score, supersedes=self._supersedes()) for score in scores]
        result = TaskResult(scores, samples, {"sandbox": layers_in_force()})
        return self.with_truncated(result, problems, answers)

    def _supersedes(self) -> str:
        """The task whose answers this one tests more strictly: it is called as this one is without "plus"."""
        if self.data_set not in PLUS:
            return ""
        name = self.name if self.name.endswith("_plus") else self.data_set
        return name.removesuffix("_plus")

    def _sanitized(self, row: Row, answer: str, begun: str) -> str:
        from evalplus.sanitize import sanitize

        lines = (begun + answer).split("\n")
        return str(sanitize("\n".join(lines[:MAX_LINES]), entry_point(self.data_set, row)))
