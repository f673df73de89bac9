"""The process that a vLLM engine lives in: how it is started, asked, waited for and ended, with all of its workers."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
from harness.backends import vllm_guard
from harness.devices import alone_on
from harness.errors import WinnowError

ENGINE = "harness.backends.vllm_engine"
TAIL = 15  # lines of the engine's output that an error looks at
CLOSE_SECONDS = 60.0  # 4 s were measured with one worker and up to 10 s with two; one that takes longer is stuck
LEFT_OVER_SECONDS = 5.0  # for workers to end that are there when the engine is gone
# What an engine with several processes says where one of its workers has failed.
ELSEWHERE = ("See root cause above", "See stack trace (above)")
_ERROR = re.compile(r"\b(?:\w+\.)*\w*(?:Error|Exception): .+")
CHECKPOINT = "checkpoint"  # what the folder is called in there


class EngineProcess:
    """An engine that serves the checkpoint in ``folder``, in a child process and, on several devices, its children.

    They are a process group of their own, of which none is alive after ``close``. The engine's working directory is
    that of ``workplace``: paths in ``options`` must be absolute.

    Raises WinnowError where the engine does not start within ``start_seconds``, fails or dies.
    """

    def __init__(
        self, folder: Path, options: dict[str, Any], environment: dict[str, str], start_seconds: float
    ) -> None:
        self._resources, self._patience = ExitStack(), 0.0
        try:
            self._log = self._resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            if not vllm_guard.is_cpu_build():
                self._resources.enter_context(alone_on("cuda" if options["tensor_parallel_size"] == 1 else "auto"))
            place = self._resources.enter_context(workplace(folder))
            ours, theirs = socket.socketpair()
            self._process = subprocess.Popen(
                [sys.executable, "-m", ENGINE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                env=os.environ | {"PYTHONPATH": _python_path()} | environment, cwd=place, start_new_session=True,
            )  # fmt: skip
            theirs.close()
            self._resources.callback(self._end)
            self._connection = self._resources.enter_context(Connection(ours.detach()))
            self._send(("start", options | {"model": CHECKPOINT}))
            if not self._connection.poll(start_seconds):
                raise WinnowError(f"vLLM did not start within start_seconds={start_seconds:g}: {self._last_words()}")
            self.facts: dict[str, Any] = self._receive()[0]
            self._patience = CLOSE_SECONDS
        except BaseException:
            self._resources.close()
            raise

    def run(self, sequences: list[list[int]], settings: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        self._send(("run", sequences, settings))
        for _ in sequences:
            place, answer = self._receive()
            yield place, answer

    def close(self) -> None:
        self._resources.close()

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise WinnowError(f"the vLLM engine has stopped: {self._last_words()}") from error

    def _receive(self) -> list[Any]:
        try:
            kind, *answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WinnowError(f"the vLLM engine has stopped: {self._last_words()}") from error
        if kind == "failed":
            text = str(answer[0])
            if any(phrase in text for phrase in ELSEWHERE):
                text = self._first_error() or text
            raise WinnowError(f"vLLM: {_advice(text)}")
        return answer

    def _last_words(self) -> str:
        """How the engine ended and what it last wrote."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        lines = self._written()[-TAIL:]
        telling = next(
            (line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "it wrote nothing"
        )
        code = self._process.poll()
        ended = "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{ended}; {telling.strip()}"

    def _written(self) -> list[str]:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip().splitlines()

    def _first_error(self) -> str:
        """The first error in what the engine wrote, "" where there is none: that of the worker which failed first."""
        found = (_ERROR.search(line) for line in self._written())
        return next((match[0].strip() for match in found if match), "")

    def _end(self) -> None:
        """The engine ends by itself once the connection is closed; what has not done so in time is killed.

        One that has not started yet does not look at the connection, and is killed at once.
        """
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience)
                self._wait_for_workers()
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._wait_for_workers()

    def _wait_for_workers(self) -> None:
        until = time.monotonic() + LEFT_OVER_SECONDS
        while self._signal(0) and time.monotonic() < until:
            time.sleep(0.02)

    def _signal(self, number: int) -> bool:
        """Send a signal to the engine and its workers; whether one of them was there."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def workplace(folder: Path) -> Iterator[str]:
    """A new folder in which the checkpoint has always the same name, ``CHECKPOINT``.

    vLLM keeps compiled code, in its own cache folder (VLLM_CACHE_ROOT), under a hash of all that decides it:
    config.json, arguments, environment, versions. The model's path, as it is given, is one of its parts: with one path
    for all, cells of one shape compile once. The config.json of a compact checkpoint has the routes of its layers, so
    merged models share compiled code only where they merged the same experts.
    """
    with tempfile.TemporaryDirectory(prefix="winnow-engine-") as place:
        (Path(place) / CHECKPOINT).symlink_to(folder.resolve(), target_is_directory=True)
        yield place


def _python_path() -> str:
    """Where the engine finds this package, from another working directory."""
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([str(Path(harness.__file__).parents[1]), *given])


def _advice(text: str) -> str:
    """vLLM's words for a fault, with what to do about those that users meet."""
    first = text.strip().splitlines()[0]
    if "KV cache" in text and "max_model_len" in text:
        return f"the KV cache is too small for the longest sequence: lower max_length or raise kv_cache_gib ({first})"
    if "out of memory" in text.lower() or "Free memory on device" in text:
        return f"not enough GPU memory: lower gpu_memory_utilization, or free the GPU ({first})"
    return first
