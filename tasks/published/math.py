r"""GSM8K and MATH-500: exact match of the final answer, greedy decoding.

A model with a chat template is asked without examples to reason step by step and to put its answer into ``\boxed{}``.
A base model sees ``shots`` worked examples first: these are the project's own, in the form of the data set's solutions
(no training problem of it comes along with the staged data), so its scores do not compare to the point with those of
the usual few-shot prompts; lm-eval's ``gsm8k`` (``tasks.published.lm_eval_task``) has those.

There are two scores, both of exact match (``tasks.published.equality``) with the data set's answer: the first reads the
final answer as a person would, the second takes a box or ``####`` alone (``tasks.published.final_answer``). What a
model thinks aloud is no answer, and a text that ends inside its thought is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from harness.contracts.backend import Backend, Reader, TokenCounter
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, Need, TaskResult
from harness.data.schema import Row
from harness.errors import WinnowError
from tasks.published.equality import Comparer
from tasks.published.final_answer import final_answer
from tasks.published.generative import GenerativeBenchmark
from tasks.scores import share_score

REQUEST = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
STOP = ("\nQuestion:", "\n\n\n")
GSM8K_SHOTS = (
    ("A bakery fills 6 trays with 12 rolls each and sells 50 of the rolls. How many rolls are left?",
     "The bakery fills 6 * 12 = 72 rolls.\nAfter the sale 72 - 50 = 22 rolls are left.\n#### 22"),
    ("Nora reads 15 pages on each of 4 days and then 9 pages a day for 5 days. How many pages does she read in all?",
     "In the first 4 days Nora reads 4 * 15 = 60 pages.\nIn the next 5 days she reads 5 * 9 = 45 pages.\n"
     "Together that is 60 + 45 = 105 pages.\n#### 105"),
    ("A bus ticket costs $3, and a monthly pass costs $48. Leo rides the bus 22 times a month. How many dollars does "
     "he save with the pass?",
     "Single tickets would cost Leo 22 * 3 = 66 dollars.\nThe pass saves him 66 - 48 = 18 dollars.\n#### 18"),
    ("A tank holds 240 liters. It is a quarter full, and a pump adds 20 liters a minute. When is it full?",
     "The tank holds 240 / 4 = 60 liters now.\nIt lacks 240 - 60 = 180 liters.\nThe pump needs 180 / 20 = 9 minutes.\n"
     "#### 9"),
)  # fmt: skip
MATH_SHOTS = (
    ("What is the sum of the solutions of $x^2 - 7x + 10 = 0$?",
     "The left side factors as $(x-2)(x-5)$, so the solutions are $2$ and $5$. Their sum is $\\boxed{7}$."),
    ("A fair die is rolled twice. What is the probability that both rolls show an even number?",
     "Each roll is even with probability $\\frac{1}{2}$, and the rolls are independent, so the probability is "
     "$\\frac{1}{2} \\cdot \\frac{1}{2} = \\boxed{\\frac{1}{4}}$."),
    ("Find the remainder when $3^{10}$ is divided by $7$.",
     "We have $3^3 = 27 \\equiv -1 \\pmod 7$, so $3^9 \\equiv -1$ and $3^{10} \\equiv -3 \\equiv 4 \\pmod 7$. The "
     "remainder is $\\boxed{4}$."),
    ("For which $x$ is $\\sqrt{2x - 6}$ a real number? Answer with an interval.",
     "We need $2x - 6 \\ge 0$, that is $x \\ge 3$. The interval is $\\boxed{[3, \\infty)}$."),
)  # fmt: skip
NUMBERS = ("gsm8k",)  # data sets whose answers are numbers
SHOTS = {"gsm8k": GSM8K_SHOTS, "math_500": MATH_SHOTS}


def few_shot(data_set: str, shots: int, question: str) -> str:
    """Worked examples and the question that is to be answered like them."""
    examples = [f"Question: {asked}\nAnswer: {solution}\n\n" for asked, solution in SHOTS[data_set][:shots]]
    return f"{''.join(examples)}Question: {question.strip()}\nAnswer:"


@dataclass(frozen=True)
class MathBenchmark(GenerativeBenchmark, ModelTask):
    """``exact_match``: the share of right final answers; ``exact_match_strict``: of those in the form asked for.

    ``data_set``: gsm8k or math_500. A sample's score is that of ``exact_match``.

    ``shots``: examples for a model that is not asked in chat, up to 4. ``seconds``: how long the comparison of one
    answer may take; one that takes longer is wrong, and its sample says so.
    """

    version: ClassVar[int] = 2  # 2: answers are read as a person would; nothing is taken from a thought

    domain: str = "math"
    max_new_tokens: int = 1024
    shots: int = 4
    seconds: float = 10.0

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return self.need_of(counter, self._prompts(counter, self.rows()))

    def run(self, backend: Backend) -> TaskResult:
        self.require(tuple(SHOTS))
        if not 0 <= self.shots <= len(SHOTS[self.data_set]):
            raise WinnowError(f"{self.name}: shots={self.shots}: choose 0 to {len(SHOTS[self.data_set])}")
        problems = self.rows()
        prompts = self._prompts(backend, problems)
        answers = self.answers(backend, prompts, () if self.in_chat(backend) else STOP)
        samples = []
        with Comparer(self.seconds) as same:
            for row, answer in zip(problems, answers, strict=True):
                expected, before = str(row["answer"]), same.timeouts
                given, strict = final_answer(answer.answer, row["question"], self.data_set in NUMBERS)
                right = same(given, expected)
                right_strict = right if strict == given else same(strict, expected)
                detail = {
                    "given": given, "given_strict": strict, "right_strict": right_strict, "expected": expected,
                    "compared": same.timeouts == before, **answer.detail(),
                }  # fmt: skip
                detail |= {key: row[key] for key in ("level", "type") if row.get(key) is not None}
                samples.append(
                    Sample(self.name, row["id"], float(right), 1.0, "math", answer.text, detail, answer.prompt)
                )
        flexible = share_score(self.name, "exact_match", [sample.score for sample in samples])
        strict_score = share_score(
            self.name, "exact_match_strict", [float(sample.detail["right_strict"]) for sample in samples]
        )
        return self.with_truncated(TaskResult([flexible, strict_score], samples), problems, answers)

    def _prompts(self, reader: Reader, problems: Sequence[Row]) -> list[str]:
        if not self.in_chat(reader):
            return [reader.prompt(few_shot(self.data_set, self.shots, row["question"])) for row in problems]
        requests = [REQUEST.format(question=row["question"].strip()) for row in problems]
        return [self.asked_in_chat(reader, [{"role": "user", "content": request}]) for request in requests]
