"""Whether two mathematical answers are the same: as numbers, as texts, else by math-verify in a process of its own.

math-verify builds expressions with sympy, which an answer such as ``10^{10^{10}}`` keeps busy where no signal reaches
it. So it runs in a child process with bounded memory, which is killed and started anew when an answer takes too long;
run as a script this module is that child. Answers are parsed, never evaluated as programs.
"""

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import time
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from harness.errors import WinnowError

START_SECONDS = 120.0  # importing sympy on a busy machine
MEMORY = 4 * 2**30  # bytes
LONGEST = 1000  # characters: no answer of the data sets comes near

_SPACING = re.compile(r"\\[!,;: ]|~|\s|\\left|\\right|\$")


def normalized(answer: str) -> str:
    """The answer without spacing, ``$``, ``\\left``, ``\\right`` or a last full stop, and with one kind of fraction."""
    return re.sub(r"\\[dt]frac", r"\\frac", _SPACING.sub("", answer)).rstrip(".")


def as_number(answer: str) -> Decimal | None:
    """A plain number, with thousands separators, units of money or a percent sign; None for anything else."""
    text = answer.strip().strip("$").removeprefix("\\$").removesuffix("%").removesuffix("\\").rstrip(".")
    if not re.fullmatch(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?", text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:  # a sign alone, or nothing
        return None


class Comparer:
    """``with Comparer(seconds) as same: same(given, expected)``. The child is started when it is first needed."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds, self._child = seconds, None  # type: float, subprocess.Popen[bytes] | None
        self.timeouts = 0
        if find_spec("math_verify") is None:
            raise WinnowError('answers are compared by math-verify, which is not installed: pip install "math-verify"')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def __call__(self, given: str, expected: str) -> bool:
        """Whether ``given`` says what ``expected`` does. One that takes longer than ``seconds`` does not."""
        if not given.strip():
            return False
        left, right = as_number(given), as_number(expected)
        if left is not None and right is not None:
            return left == right
        if normalized(given) == normalized(expected):
            return True
        return len(given) <= LONGEST and self._ask(given, expected)

    def _ask(self, given: str, expected: str) -> bool:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tasks.published.equality"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            if self._line(START_SECONDS) != b"ready\n":
                self._end()
                raise WinnowError(
                    "the process that compares answers does not start: see python -m tasks.published.equality"
                )
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps([given, expected]).encode() + b"\n")
            self._child.stdin.flush()
        answer = self._line(self._seconds)
        if not answer:  # too long, or too much memory
            self.timeouts += 1
            self._end()
        return answer == b"1\n"

    def _line(self, seconds: float) -> bytes:
        """The child's next line; nothing where it is late or has ended."""
        assert self._child is not None and self._child.stdout is not None
        deadline, data = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return b""
                chunk = os.read(self._child.stdout.fileno(), 64)
                if not chunk:
                    return b""
                data += chunk
        return data

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


def _verify(given: str, expected: str) -> bool:
    from math_verify import parse, verify

    gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (expected, given))
    return bool(verify(gold, answer, timeout_seconds=None))


def _serve(lines: Any, out: Any) -> None:
    _verify("x", "x")  # imports all it needs
    out.write(b"ready\n")
    out.flush()
    for line in lines:
        try:
            same = _verify(*json.loads(line))
        except Exception:
            same = False
        out.write(b"1\n" if same else b"0\n")
        out.flush()


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _serve(sys.stdin.buffer, sys.stdout.buffer)
