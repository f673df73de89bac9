"""Do answers to published multiple choice depend on the order in which the choices are listed?"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.task import ModelTask, Need, TaskResult
from harness.data.schema import DATA_SETS, Row
from harness.errors import WinnowError
from tasks.probes.consistency import Question, Wording, ask, asked, rotations
from tasks.published.items import Benchmark

CUE = "Answer:"
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class ChoiceOrder(Benchmark, ModelTask):
    """``consistent``, ``acc`` and ``all_right`` (see ``tasks.probes.consistency.ask``) when lettered choices are turned
    round.

    Each question is asked as often as it has choices, "A. ..." to "D. ..." a line, so that every choice has every
    letter once, and is answered by the likeliest letter, zero-shot. A model that always says A is never consistent.
    For data sets of one context that ends in "Answer:" (arc_challenge, arc_easy, boolq, mmlu, piqa, rte); where that
    lists the choices already (mmlu), its own listing is turned. Raises WinnowError for others.
    """

    kind: ClassVar[str] = "probe"

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return Need(counter.longest_pair(asked(counter, self._questions())))

    def run(self, backend: Backend) -> TaskResult:
        return ask(backend, self.name, self._questions(), self.seed)

    def _questions(self) -> list[Question]:
        self.require([name for name, known in DATA_SETS.items() if known.kind == "choice"])
        return [self._question(row) for row in self.rows()]

    def _question(self, row: Row) -> Question:
        if len(row["contexts"]) > 1 or not row["contexts"][0].rstrip().endswith(CUE):
            raise WinnowError(
                f"{self.name}: the choices of {self.data_set} cannot be listed, since its questions do not end in "
                f'"{CUE}"; take arc_challenge, arc_easy, boolq, mmlu, piqa or rte'
            )
        stem, choices = unlisted(row["contexts"][0].rstrip().removesuffix(CUE).rstrip("\n"), row["choices"])
        letters = tuple(f" {letter}" for letter in LETTERS[: len(choices)])
        wordings = tuple(
            Wording(lettered(stem, [choices[place] for place in order]), letters, order) for order in rotations(choices)
        )
        return Question(f"{self.data_set}-{row['id']}", self.data_set, wordings, row["answer"])


def lettered(stem: str, choices: Sequence[str]) -> str:
    """The question with its choices below it, a line each, and the cue for the answer."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([stem, *lines, CUE])


def unlisted(stem: str, choices: Sequence[str]) -> tuple[str, list[str]]:
    """The question without its listing, and the choices; where they are letters only, those that it lists."""
    if list(choices) != list(LETTERS[: len(choices)]):
        return stem, list(choices)
    # Greedy, so that the last listing is taken: the question itself may hold lines that look like one.
    listing = "".join(rf"\n{letter}\. (.*)" for letter in choices)
    found = re.fullmatch(f"(.*){listing}", stem, re.DOTALL)
    if found is None:
        raise WinnowError(f"the choices {', '.join(choices)} are not listed in the question: {stem[:80]!r}")
    question, *texts = found.groups()
    return question, texts
