"""Runs generated code, which is taken to be hostile, and gives back what its function returned.

One program is one process, forked for it from a clean interpreter with an empty environment and gone after it.
Before the program is seen, ``sandbox_child`` gives up what it can, in layers that each hold without the others:

==================  =================================================================================================
another user        root becomes nobody; others lose the capabilities of their user namespace
namespaces          processes, network, mounts and IPC of its own; its processes end with it; files in 4 MiB of memory
Landlock            reads Python's and the system's libraries, writes the scratch folder, opens nothing else; on new
                    kernels no TCP, no signals and no abstract sockets either
seccomp             no sockets, processes, threads, signals to others, mounts, ownership, tracing, shared memory, or
                    calls that are newer than its list
resource limits     CPU and wall time, memory, size of files, open files, no processes, no core dumps
audit hook          the interpreter itself refuses the same; not proof alone, the layer for systems without the others
==================  =================================================================================================

The keeper, a process that runs no untrusted code, kills what is left at the end or at the deadline. What comes back is
JSON of bounded size, read here without trust: what has another form, or would take long to rebuild, is "crashed".

The program never sees what is expected of it: it hands back values, which the caller compares with ``same``. Forging a
verdict therefore gains nothing. (Tests that are statements are an exception: see ``tasks.published.program_tests``.)

What it does not do. A layer that a system lacks is left out, and ``capabilities`` says so: without Landlock all that
the user (as root: nobody) may read can be read by system calls; with neither namespaces nor seccomp only the audit hook
stands between the program and the network; without a mount namespace many small files may fill the disk until time is
up; macOS has the resource limits and the audit hook alone. It does not hide that a path exists, the host's name, or the
kernel's version. It does not protect from faults of the kernel, nor from what can be learnt from timing: a virtual
machine does. On Windows it does not run.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

from harness.errors import WinnowError
from harness.progress import bar as progress_bar
from tasks.sandbox.child import TIMED_OUT, decode, encode

CHILD = Path(__file__).with_name("child.py")
GRACE_SECONDS = 10.0
KNOWN_PROGRAMS = 20_000  # outcomes remembered
KNOWN_INPUTS = 32  # of programs with at most as many inputs
# The hash seed makes the order of sets the same in every run; nothing of our environment goes along.
ENVIRONMENT = {"PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Limits:
    """What one program may use, over all of its inputs.

    ``cpu_seconds`` is a whole number (the kernel counts no finer); ``disk_bytes`` and ``files`` bound the
    scratch folder, ``output_bytes`` the encoded return values.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 6.0
    memory_bytes: int = 256 * 2**20
    disk_bytes: int = 4 * 2**20
    files: int = 64
    open_files: int = 32
    output_bytes: int = 2**20


@dataclass(frozen=True)
class Failed:
    """Stands for the value of a call that raised, or that returned a type which is not compared."""

    message: str


@dataclass(frozen=True)
class Outcome:
    """``outputs`` holds one value or ``Failed`` for each input when ``status`` is "ok", else nothing.

    "error": the source does not compile, raises when it is run, or has no such function; "timeout": CPU or
    wall time was up; "too_large": more than ``output_bytes`` came back; "crashed": the process ended without
    a result.
    """

    status: Literal["ok", "error", "timeout", "too_large", "crashed"]
    outputs: list[Any] = field(default_factory=list)
    detail: str = ""


@dataclass(frozen=True)
class Program:
    """``inputs`` holds one list of positional arguments for each call of ``entry_point``."""

    source: str
    entry_point: str
    inputs: list[list[Any]]


def same(actual: Any, expected: Any) -> bool:
    """Equality with types: True is not 1, 1 not 1.0, a tuple not a list. Dicts and sets have no order."""
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(expected, dict):
        # Keys that are equal but of another type (1 and True) would find each other: compare them with types.
        typed = [{(type(key), key) for key in each} for each in (actual, expected)]
        return typed[0] == typed[1] and all(same(actual[key], value) for key, value in expected.items())
    if isinstance(expected, (set, frozenset)):
        return {(type(item), item) for item in actual} == {(type(item), item) for item in expected}
    return not isinstance(expected, Failed) and bool(actual == expected)


def _read_all(stream: IO[bytes], limit: int, deadline: float) -> bytes:
    """What comes until the end or the deadline; reading stops once it is more than ``limit`` bytes."""
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while len(data) <= limit:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                break
            chunk = os.read(stream.fileno(), 65536)
            if not chunk:
                break
            data += chunk
    return bytes(data)


class _Nursery:
    """A clean interpreter that forks keepers, so that none has to start one; it ends with this process.

    It has never seen a program: what one does to its own process, no other meets.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._requests, theirs = socket.socketpair()
        # -s -S -P: no site packages, nothing of the working folder. -B: no bytecode files.
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(CHILD), str(theirs.fileno())],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=ENVIRONMENT, cwd=os.path.realpath(tempfile.gettempdir()), start_new_session=True,
            pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        # A thread of its own for the interpreter's end, or it would stay as a zombie until ours.
        threading.Thread(target=self._process.wait, daemon=True).start()

    def fork(self, base: str, descriptors: list[int]) -> None:
        """A keeper in the folder ``base`` with these as standard input, output and status. OSError where it died."""
        with self._lock:
            socket.send_fds(self._requests, [base.encode()], descriptors)


_nurseries: list[_Nursery] = []
_nurseries_lock = threading.Lock()


def _fork_keeper(base: str, descriptors: list[int]) -> None:
    """From this process's nursery, which is started where there is none, or none that lives. Raises WinnowError where
    a new one dies at once."""
    with _nurseries_lock:
        if _nurseries and _nurseries[0].owner == os.getpid():
            with contextlib.suppress(OSError):
                return _nurseries[0].fork(base, descriptors)
        _nurseries[:] = [_Nursery()]
        try:
            return _nurseries[0].fork(base, descriptors)
        except OSError as error:
            raise WinnowError(f"the sandbox for generated code does not start here ({error})") from error


def _talk(request: bytes, limits: Limits, base: str) -> tuple[bytes, int]:
    """Have a keeper forked, give it the request, and give back the answer with the keeper's exit status."""
    deadline = time.monotonic() + limits.wall_seconds + GRACE_SECONDS
    (their_input, ours), (output, their_output), (status, their_status) = os.pipe(), os.pipe(), os.pipe()
    try:
        _fork_keeper(base, [their_input, their_output, their_status])
    finally:
        for descriptor in (their_input, their_output, their_status):
            os.close(descriptor)
    with open(ours, "wb") as stdin, open(output, "rb", 0) as stdout, open(status, "rb", 0) as ended:
        try:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(request + b"\n")
                stdin.flush()
            answer = _read_all(stdout, limits.output_bytes, deadline)
        finally:
            # The end of its input tells the keeper to kill what still runs.
            with contextlib.suppress(BrokenPipeError):
                stdin.close()
            stdout.close()
            told = _read_all(ended, 64, time.monotonic() + GRACE_SECONDS).split()
            if len(told) == 1:  # it has not ended
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(told[0]), signal.SIGKILL)
    return answer, int(told[1]) if len(told) > 1 else -signal.SIGKILL


def _ask(request: dict[str, Any], limits: Limits) -> tuple[bytes, int]:
    if not hasattr(os, "fork"):
        raise WinnowError(
            "generated code cannot be run safely on this system: use Linux or macOS, or a suite without code"
        )
    base = os.path.realpath(tempfile.mkdtemp(prefix="winnow-sandbox-"))
    os.chmod(base, 0o711)
    for folder in ("work", "library"):
        os.mkdir(os.path.join(base, folder))
    try:
        return _talk(json.dumps({**request, "limits": vars(limits)}).encode(), limits, base)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _outcome(answer: bytes, code: int, limits: Limits, calls: int) -> Outcome:
    """What a keeper's answer means. Whatever is in the answer may have been written by the program itself."""
    if len(answer) > limits.output_bytes:
        return Outcome("too_large", detail=f"more than {limits.output_bytes} bytes came back")
    if code == TIMED_OUT:
        return Outcome("timeout", detail="time was up")
    if not answer:
        return Outcome("crashed", detail=f"no result; exit status {code}")
    try:
        data = json.loads(answer)
        if "error" in data:
            return Outcome("error", detail=str(data["error"])[:200])
        outputs = [
            decode(item["value"]) if "value" in item else Failed(str(item["failed"])[:200]) for item in data["outputs"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Outcome("crashed", detail="the result is not in the form of one")
    if len(outputs) != calls:
        return Outcome("crashed", detail=f"{len(outputs)} results for {calls} inputs")
    return Outcome("ok", outputs)


def run_function(
    source: str, entry_point: str, inputs: Sequence[Sequence[Any]], limits: Limits | None = None
) -> Outcome:
    """Run ``source`` and call its ``entry_point`` once for each list of arguments in ``inputs``.

    Arguments and values may be built from None, bool, int, float, complex, str, list, tuple, dict, set and frozenset;
    a value of any other type (subclasses too) comes back as ``Failed``. Raises WinnowError where processes
    cannot be forked, TypeError for an argument of another type.
    """
    limits = limits or Limits()
    arguments = [encode(list(call)) for call in inputs]
    request = {"source": source, "entry_point": entry_point, "inputs": arguments}
    return _outcome(*_ask(request, limits), limits, len(arguments))


def run_many(programs: Sequence[Program], limits: Limits | None = None, progress: str = "") -> list[Outcome]:
    """``run_function`` for each program, in order, as many at a time as there are processors to use.

    A program with few inputs that this process has run before under the same limits, and that ended by itself, is not
    run again: compressed models often write what the others wrote. Raises WinnowError where the sandbox does not work,
    rather than count every program as wrong.
    """
    capabilities()
    limits = limits or Limits()
    small = [len(program.inputs) <= KNOWN_INPUTS for program in programs]
    keys = [
        (limits, program.source, program.entry_point, repr(program.inputs) if known else place)
        for place, (program, known) in enumerate(zip(programs, small, strict=True))
    ]
    new = {key: program for key, program in zip(keys, programs, strict=True) if key not in _known}
    found = {key: _known[key] for key in keys if key in _known}
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        outcomes = pool.map(lambda p: run_function(p.source, p.entry_point, p.inputs, limits), new.values())
        found |= zip(new, progress_bar(progress, len(new), outcomes), strict=True)
    if len(_known) > KNOWN_PROGRAMS:
        _known.clear()
    ended = (key for key, known in zip(keys, small, strict=True) if known and found[key].status in ("ok", "error"))
    _known.update({key: found[key] for key in ended})
    return [found[key] for key in keys]


_known: dict[tuple[Limits, str, str, str | int], Outcome] = {}


@cache
def capabilities() -> tuple[str, ...]:
    """The layers that hold here, found by starting an empty sandbox. Raises WinnowError where it fails."""
    answer, code = _ask({"source": None, "entry_point": "", "inputs": []}, Limits())
    try:
        return tuple(json.loads(answer)["layers"])
    except (ValueError, KeyError) as error:
        raise WinnowError(f"the sandbox for generated code does not start here (exit status {code})") from error
