"""Backends: models that write and score text (the protocol is ``harness.contracts.task.Backend``). Free of torch."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Adds the seconds that its block takes to ``seconds[what]``."""
    started = time.perf_counter()
    yield
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started
