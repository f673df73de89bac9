"""What a task asks of a backend, and what it gives back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.backends import Distributions, LogLikelihood, Sampling, TokenLogprobs
from harness.contracts.record import Sample, Score


class Backend(Protocol):
    """A model that can write and score text. ``progress`` names the bar that a person sees.

    ``max_length``: the longest sequence in tokens; ``seconds``: time spent so far, by what it was spent on ("generate",
    "score"); ``facts``: what is worth knowing of the engine, such as its "version"; ``has_chat_template``: whether it
    can be asked in messages.
    """

    name: str
    max_length: int
    seconds: dict[str, float]
    facts: dict[str, Any]
    has_chat_template: bool

    def prompt(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> str:
        """What the model reads: a plain text behind its beginning-of-text token, or messages in its chat template.

        Messages are {"role", "content"}; a last one of the assistant is left open, to be gone on with. ``options``
        go to the template. The other methods take texts as they are.
        """
        ...

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

    def distributions(
        self, pairs: Sequence[tuple[str, str]], positions: int, progress: str = ""
    ) -> Iterator[tuple[int, Distributions]]:
        """(place, what was expected along the continuation) of each (context, continuation), in any order.

        Whole distributions at the first ``positions`` tokens, or as much of them as the engine gives.
        """
        ...

    def close(self) -> None:
        """Free the model: nothing can be asked afterwards."""
        ...


@dataclass(frozen=True)
class TaskResult:
    scores: list[Score]
    samples: list[Sample]


class Task(Protocol):
    """Tasks that need more than the model have, instead of ``run``:

    - ``run_on(samples)`` scores what the tasks before it wrote,
    - ``run_against(backend, samples, baseline)`` sees that and the samples of the uncompressed model (None where this
      is the uncompressed model, empty where none are kept),
    - ``observe(backend, samples, baseline)`` sees the same, and what it returns goes to ``compare(seen, backend)`` with
      the uncompressed model's backend: two models are measured against each other, and never open at once.
    """

    name: str

    def run(self, backend: Backend) -> TaskResult: ...
