"""Work in a process of its own, whose memory, on the host and on every device, is gone when it ends.

A device's memory is given back for certain by the end of a process alone: allocators keep what was freed, and models
may live until the garbage is collected. On Linux the process is forked from a server that has loaded torch and
transformers but used neither them nor a device, which takes milliseconds; elsewhere a new interpreter is started.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, ParamSpec, TypeVar

from harness import logs, progress
from harness.errors import WinnowError, first_line

P = ParamSpec("P")
R = TypeVar("R")

# What takes long to load and most work needs.
_PRELOADED = [
    "torch", "transformers.models.auto.modeling_auto", "transformers.generation.utils", "scipy.optimize",
    "harness.cells.compress", "harness.cells.diagnostics", "harness.cells.evaluate",
]  # fmt: skip
# Seconds that an interrupted process has to put its things away.
_PATIENCE = 10.0


def apart(what: str, function: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
    """``function(*args, **options)`` in a process of its own; all of them, and the result, have to be picklable.

    Its environment, folder, log, threads and progress bars are those of this process. It ends with this process,
    however that ends. Raises what the function raises, and WinnowError, which says ``what`` was going on, where the
    process was killed or a device's memory did not suffice.
    """
    ours, theirs = multiprocessing.Pipe()
    job = (os.environ.copy(), os.getcwd(), logs.levels(), _threads(), progress.shown())
    # Plain pickle, here and for the answer: torch would share tensors with a process that ends.
    work = pickle.dumps((function, args, options))
    process: Any = _context().Process(target=_child, args=(theirs, job, what, work), name=what)
    with ours:
        with _without_main():
            process.start()
        theirs.close()
        try:
            answer: R = _answer(ours, process, what)
        except KeyboardInterrupt:
            process.terminate()
            raise
        finally:
            process.join(_PATIENCE)
            _stop(process)
        return answer


def warm_up() -> None:
    """Starts the server that processes are forked from, which loads its libraries while this process goes on."""
    if _context().get_start_method() == "forkserver":
        from multiprocessing import forkserver

        with _without_main():
            forkserver.ensure_running()


def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    # Whether there are GPUs is asked without starting the driver, which a forked process could not use any more.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


@contextmanager
def _without_main() -> Iterator[None]:
    """Meanwhile multiprocessing finds no main module, which it would run once more in every process: what is sent there
    lies in modules of its own."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _answer(connection: Connection, process: Any, what: str) -> Any:
    while True:
        try:
            kind, content = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            process.join(_PATIENCE)
            raise WinnowError(_death(what, process.exitcode)) from None
        if kind == "log":
            logging.getLogger(content.name).handle(content)
        elif kind == "done":
            return content
        else:
            error, remote = content
            error.__cause__ = error.__cause__ or _Remote(remote)
            raise error


class _Remote(Exception):
    """Where in the other process an error was raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _death(what: str, code: int | None) -> str:
    if code == -signal.SIGKILL:
        return (
            f"{what}: its process was killed, as the system does when memory runs out: free some, or take less at once"
        )
    ended = "it does not answer" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{what}: its process has ended ({ended}); the same command goes on where it stopped"


def _stop(process: Any) -> None:
    for stop in (process.terminate, process.kill):
        if process.exitcode is None:
            stop()
            process.join(_PATIENCE)


# --- in the other process ---------------------------------------------------------------------------------------------


def _child(connection: Connection, job: Sequence[Any], what: str, work: bytes) -> None:
    environment, folder, levels, threads, shown = job
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _interrupted)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sender = _Sender(connection)
    logging.root.handlers[:] = [sender]
    logs.set_levels(levels)
    logging.captureWarnings(True)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    try:
        function, args, options = pickle.loads(work)
        with progress.showing(shown):
            answer: Any = ("done", function(*args, **options))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        answer = ("failed", (_explained(error, what), traceback.format_exc()))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sender.send(answer)


class _Sender(QueueHandler):
    """Sends log records, and the answer, to the process that asked."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)  # type: ignore[arg-type]
        self._connection = connection

    def enqueue(self, record: logging.LogRecord) -> None:
        self._connection.send_bytes(pickle.dumps(("log", record)))

    def send(self, answer: Any) -> None:
        self.acquire()  # other threads may be logging
        try:
            self._connection.send_bytes(pickle.dumps(answer))
        finally:
            self.release()


def _explained(error: Exception, what: str) -> Exception:
    """An error that can be sent: WinnowError for one of a device that has no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return WinnowError(
            f"{what}: the device's memory does not suffice ({first_line(error)}): free it of other processes, lower "
            "batch_size, or take calibration.stream=always"
        )
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of whatever an error of a library holds
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _interrupted(number: int, frame: types.FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)
