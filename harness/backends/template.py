"""A checkpoint's chat template at work: a program that others wrote, so it gets so much time and no more."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SECONDS = 10.0  # for one conversation; a long one takes milliseconds


def apply_template(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The turns in the tokenizer's chat template. Raises what the template raises, and TimeoutError where it goes on
    for ``SECONDS``."""
    with _time_limit(SECONDS):
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **options))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """The kernel interrupts the main thread alone: in another one nothing is limited."""

    def too_long(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it does not end within {seconds:g} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
