"""Backends: models that write and score text (the protocol is ``harness.contracts.backend.Backend``). Free of torch."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Adds the seconds that its block takes to ``seconds[what]``."""
    started = time.perf_counter()
    yield
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started
