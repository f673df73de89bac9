"""Backends: models that write and score text (the protocol is ``tasks.protocol.Backend``). Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LogLikelihood:
    """``logprob``: natural log-probability summed over the ``tokens`` tokens of the continuation."""

    logprob: float
    tokens: int
