"""What a task asks of a model that writes and scores text: the backend, and what it answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from harness.errors import WinnowError


@dataclass(frozen=True)
class LogLikelihood:
    """``logprob``: natural log-probability summed over the ``tokens`` tokens of the continuation."""

    logprob: float
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: softmax of logits / ``temperature``, cut to the likeliest that together hold ``top_p``.

    Raises WinnowError for a temperature that is not above 0 (greedy is no sampling at all) or a share outside (0, 1].
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise WinnowError(
                f"temperature={self.temperature}, top_p={self.top_p}: needs more than 0, and more than 0 up to 1"
            )


@dataclass(frozen=True)
class TokenLogprobs:
    """Of a text of T tokens, for each but the first: ``tokens`` and ``logprobs`` (T-1,), and the likeliest tokens in
    their places, ``top_tokens`` and ``top_logprobs`` (T-1, n), likeliest first."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray

    @staticmethod
    def empty(tokens: list[int], top: int) -> "TokenLogprobs":
        """That of a text with no token to predict."""
        none, numbers = np.zeros((0, top), dtype=np.int64), np.zeros((0, top), dtype=np.float32)
        return TokenLogprobs(np.array(tokens[1:], dtype=np.int64), np.zeros(0, dtype=np.float32), none, numbers)


@dataclass(frozen=True)
class Distributions:
    """What a model expected along a continuation of T tokens: ``tokens`` and their ``logprobs`` (T,).

    ``expected`` (P, n), at the first P of these places, holds the log-probabilities of the whole vocabulary or, where
    ``expected_tokens`` (P, n) names them, of the n likeliest tokens, likeliest first.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    expected: np.ndarray
    expected_tokens: np.ndarray | None = None


class Reader(Protocol):
    """How a model reads what it is asked, which is known without its weights.

    ``max_length``: the longest sequence in tokens that it takes; ``has_chat_template``: whether it can be asked in
    messages.
    """

    max_length: int
    has_chat_template: bool

    def prompt(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> str:
        """What the model reads: a plain text behind its beginning-of-text token, or messages in its chat template.

        Messages are {"role", "content"}; a last one of the assistant is left open, to be gone on with. ``options``
        go to the template. The other methods take texts as they are.
        """
        ...

    def thinking_options(self, wanted: str) -> dict[str, Any]:
        """The ``options`` of ``prompt`` for a model that shall think aloud first ("on") or not ("off"); none for
        "auto". Raises WinnowError where its chat template has no switch for it."""
        ...


class TokenCounter(Reader, Protocol):
    """Counts the tokens of what a model would be asked. Texts are counted as a backend tokenizes them."""

    tokenizer: Any

    def longest(self, texts: Sequence[str]) -> int:
        """Tokens of the longest text; at least 1, since an empty one is read as one token."""
        ...

    def longest_pair(self, pairs: Sequence[tuple[str, str]]) -> int:
        """Tokens of the longest (context, continuation); at least 1."""
        ...


class Backend(Reader, Protocol):
    """A model that can write and score text. ``progress`` names the bar that a person sees.

    ``seconds``: time spent so far, by what it was spent on ("generate", "score"); ``facts``: what is worth knowing of
    the engine, such as its "version".
    """

    name: str
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
