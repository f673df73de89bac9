"""What a task asks of a backend, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.backends import LogLikelihood, Sampling, TokenLogprobs
from harness.records import Sample, Score


class Backend(Protocol):
    """A model that can write and score text. ``progress`` names the bar that a person sees.

    ``max_length``: the longest sequence in tokens; ``seconds``: time spent so far, by what it was spent on ("generate",
    "score"); ``facts``: what is worth knowing of the engine, such as its "version".
    """

    name: str
    max_length: int
    seconds: dict[str, float]
    facts: dict[str, Any]

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | None = None,
        progress: str = "",
    ) -> list[str]:
        """Continuations, cut before the first stop string or the end-of-text token, in the order given.

        ``stop`` holds the stop strings of all prompts, or one list for each. Greedy where ``sampling`` is None.
        """
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: str = "") -> list[LogLikelihood]:
        """For each (context, continuation) the log-likelihood of the continuation given the context."""
        ...

    def loglikelihood_rolling(self, texts: Sequence[str], progress: str = "") -> list[LogLikelihood]:
        """For each text the log-likelihood of all its tokens but the first, in windows of the model's length."""
        ...

    def token_logprobs(self, texts: Sequence[str], top: int, progress: str = "") -> list[TokenLogprobs]:
        """For each text the log-probability of every token but the first, and of the ``top`` likeliest in its place."""
        ...

    def close(self) -> None:
        """Free the model: nothing can be asked afterwards."""
        ...


@dataclass(frozen=True)
class TaskResult:
    scores: list[Score]
    samples: list[Sample]


class Task(Protocol):
    name: str

    def run(self, backend: Backend) -> TaskResult: ...
