"""What a task asks of a backend, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from harness.backends import LogLikelihood
from harness.records import Sample, Score


class Backend(Protocol):
    """A model that can write and score text. ``progress`` names the bar that a person sees."""

    name: str

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = (), progress: str = ""
    ) -> list[str]:
        """Greedy continuations, cut before the first stop string or the end-of-text token, in the order given."""
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: str = "") -> list[LogLikelihood]:
        """For each (context, continuation) the log-likelihood of the continuation given the context."""
        ...

    def loglikelihood_rolling(self, texts: Sequence[str], progress: str = "") -> list[LogLikelihood]:
        """For each text the log-likelihood of all its tokens but the first, in windows of the model's length."""
        ...


@dataclass(frozen=True)
class TaskResult:
    scores: list[Score]
    samples: list[Sample]


class Task(Protocol):
    name: str

    def run(self, backend: Backend) -> TaskResult: ...
