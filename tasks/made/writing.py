"""Short stories with given elements, scored by the elements that are there and by their form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, Need, TaskResult
from tasks.reference import writing as reference
from tasks.reference.items import evaluation_problems
from tasks.scores import mean_score, share_score

STOP = ("\n\n", "\nWrite a short story")


@dataclass(frozen=True)
class WritingTask(ModelTask):
    """``elements``: the mean share of the asked elements in a story; ``form``: the share well formed."""

    kind: ClassVar[str] = "generative"
    version: ClassVar[int] = 1

    items: int = 250
    seed: int = 0
    max_new_tokens: int = 160
    name: str = "writing"
    domain: str = "writing"

    def tokens_to_write(self) -> int:
        return self.items * self.max_new_tokens

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        prompts = [problem.prompt for problem in evaluation_problems("writing", self.items, self.seed)]
        return Need(counter.longest(prompts) + self.max_new_tokens, self.max_new_tokens)

    def run(self, backend: Backend) -> TaskResult:
        problems = evaluation_problems("writing", self.items, self.seed)
        prompts = [problem.prompt for problem in problems]
        stories = backend.generate(prompts, self.max_new_tokens, STOP, progress=f"{self.name}: writing")
        samples = []
        for problem, story in zip(problems, stories, strict=True):
            result = reference.score(story, problem.meta["elements"])
            detail = {"form": bool(result["form"])}
            score = float(result["elements"])
            samples.append(
                Sample(
                    self.name, problem.id, score, domain="writing", output=story, detail=detail, prompt=problem.prompt
                )
            )
        elements = mean_score(self.name, "elements", [sample.score for sample in samples], self.seed)
        form = share_score(self.name, "form", [float(sample.detail["form"]) for sample in samples])
        return TaskResult([elements, form], samples)
