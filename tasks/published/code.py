"""HumanEval, MBPP and their EvalPlus versions: pass@1 with greedy decoding, prompted as EvalPlus prompts.

A base model goes on with the prompt (of MBPP: a docstring that holds the request and its first test); a model with a
chat template is asked for a program, and its answer is begun for it up to the code. Stop strings, prompts and their
layout are those of ``evalplus.provider`` 0.3.1, so that scores compare with those of its leaderboard.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from harness.contracts.backend import Backend, Reader, TokenCounter
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, Need, TaskResult
from harness.data.schema import Row
from tasks.published.generative import Answer, GenerativeBenchmark
from tasks.published.program_tests import CHECKED, PLUS, entry_point, judge, require_evalplus
from tasks.published.programs import programs
from tasks.sandbox.run import layers_in_force
from tasks.scores import share_score

# Where a program is over: EvalPlus' marks, beside end-of-text tokens, which the backends know.
ENDS = ("\nif __name__", "\ndef main(", "\nprint(")
ENDS_OF_COMPLETION = {
    "humaneval": ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
    "mbpp": ('\n"""', "\nassert"),
}
END_OF_BLOCK = "\n```\n"
CODE = re.compile(r"^(?:def |class |async |return\b|\w+ = lambda)|^[ \t]+\S", re.MULTILINE)
REQUEST = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
ANSWER = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)


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


def names_asked_for(data_set: str, row: Row) -> list[str]:
    """What tests ask of a program: the function, and of MBPP whatever else its tests name."""
    function = entry_point(data_set, row)
    tests = [row["test_setup_code"], *row["test_list"]] if data_set == "mbpp" else []
    named = {node.id for test in tests for node in ast.walk(ast.parse(test.strip())) if isinstance(node, ast.Name)}
    return [function, *sorted(named - {function})]


def taken_out(data_set: str, problems: Sequence[Row], answers: Sequence[str], chat: bool) -> list[str]:
    """The program in each answer: of a base model it goes on with the prompt, of a chat model it may lean on it."""
    texts, none = [problem_text(data_set, row) for row in problems], [""] * len(problems)
    begun, contexts = (none, texts) if chat else (texts, none)
    return programs(answers, begun, contexts, [names_asked_for(data_set, row) for row in problems])


@dataclass(frozen=True)
class CodeBenchmark(GenerativeBenchmark, ModelTask):
    """``pass@1``: the share of problems whose program passes every test; a sample's score is 1.0 for one that does.

    ``data_set``: humaneval, mbpp, humaneval_plus, mbpp_plus. The plus sets also give ``base_pass@1``, by the base tests
    alone. The program is taken out of the answer in the same way for all (``program_text``). ``cpu_seconds``: for all
    tests of one problem (None: ``program_tests.limits``). Problems of the plus sets whose own solution does not run are
    left out. With ``thinking`` "on" no answer is begun for the model, which would think no more.

    Raises WinnowError for data that cannot be had, EvalPlus not installed, and a sandbox that does not work.
    """

    version: ClassVar[int] = 2  # 2: tests run on what a program returned; one way to take it out for all sets

    domain: str = "code"
    max_new_tokens: int = 768
    cpu_seconds: int | None = None

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return self.need_of(counter, self._prompts(counter, self.rows()))

    def run(self, backend: Backend) -> TaskResult:
        self.require((*CHECKED, *PLUS))
        plus = self.data_set in PLUS
        if plus:
            require_evalplus(self.data_set)
        problems = self.rows()
        prompts = self._prompts(backend, problems)
        chat, begins = self.in_chat(backend), self._begins
        ends = (END_OF_BLOCK,) if chat else ENDS_OF_COMPLETION[self.data_set.removesuffix("_plus")]
        answers = self._written(backend, prompts, (*ENDS, *ends)) if begins else self.answers(backend, prompts)
        sources = taken_out(self.data_set, problems, [answer.answer for answer in answers], chat)
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

    @property
    def _begins(self) -> bool:
        """Whether a chat model's answer is begun for it."""
        return self.thinking_mode != "on"

    def _prompts(self, reader: Reader, problems: Sequence[Row]) -> list[str]:
        texts = [problem_text(self.data_set, row) for row in problems]
        if not self.in_chat(reader):
            return [reader.prompt(text) for text in texts]
        return [self.asked_in_chat(reader, messages(text)[: 2 if self._begins else 1]) for text in texts]

    def _written(self, backend: Backend, prompts: Sequence[str], stop: Sequence[str]) -> list[Answer]:
        """Answers that end where a program is over. What says so may stand before a program too (a fence that opens a
        block, a ``def`` within one): where words and no code are before it, the model is asked again without it."""
        answers = self.answers(backend, prompts, stop)
        again = [place for place, one in enumerate(answers) if one.answer.strip() and not CODE.search(one.answer)]
        if again:
            for place, answer in zip(again, self.answers(backend, [prompts[place] for place in again]), strict=True):
                answers[place] = answer
        return answers

    def _supersedes(self) -> str:
        """The task whose answers this one tests more strictly: it is called as this one is without "plus"."""
        if self.data_set not in PLUS:
            return ""
        name = self.name if self.name.endswith("_plus") else self.data_set
        return name.removesuffix("_plus")
