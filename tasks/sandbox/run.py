"""Runs generated code, which is taken to be hostile, and gives back what its function returned.

One program is one process, forked for it from a clean interpreter with an empty environment and gone after it.
Before the program is seen, ``tasks.sandbox.child`` gives up what it can, in layers that each hold without the others:

==================  =================================================================================================
own root            a file system of its own that holds Python's standard library and the system's libraries, read-only;
                    what is installed beside them, winnow too, is not in it
another user        root becomes nobody; others, and root where nobody could not read the library, lose all capabilities
namespaces          processes, network, mounts and IPC of its own; its processes end with it; files in 4 MiB of memory
Landlock            reads the same libraries, writes the scratch folder, opens nothing else; on new kernels no TCP, no
                    signals and no abstract sockets either
seccomp             no sockets, processes, threads, signals to others, mounts, ownership, tracing, shared memory, or
                    calls that are newer than its list
resource limits     CPU and wall time, memory, size of files, open files, no processes, no core dumps
audit hook          the interpreter itself refuses the same; not proof alone, the layer for systems without the others
==================  =================================================================================================

The keeper, a process that runs no untrusted code, kills what is left at the end or at the deadline. What comes back is
JSON of bounded size, read here without trust: what has another form, or would take long to rebuild, is "crashed".

The program never sees what is expected of it: it hands back values, which the caller compares with ``same``. Forging a
verdict therefore gains nothing.

What it does not do. A layer that a system lacks is left out, and ``layers_in_force`` says so: without Landlock and a
root of its own all that the user (as root: nobody) may read can be read by system calls; with neither namespaces nor
seccomp only the audit hook stands between the program and the network; without a mount namespace many small files may
fill the disk until time is up; macOS has the resource limits and the audit hook alone. It does not hide the host's name
or the kernel's version. It does not protect from faults of the kernel, nor from what can be learnt from timing: a
virtual machine does. On Windows it does not run.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

from harness.errors import WinnowError
from harness.progress import bar as progress_bar
from tasks.sandbox.child import TIMED_OUT
from tasks.sandbox.nursery import PROJECT, talk
from tasks.sandbox.values import ROOM, decode, encode

T = TypeVar("T")
KNOWN_PROGRAMS = 20_000  # outcomes remembered
KNOWN_BYTES = 8192  # of answers that are
LARGE_BYTES = 2**20  # of answers of which one at a time is unpacked
# What programs import. Some are not there in every build of Python: the sandbox must have those that this process has.
MODULES = (
    "abc", "argparse", "array", "ast", "base64", "binascii", "bisect", "bz2", "calendar", "cmath", "codecs",
    "collections", "collections.abc", "colorsys", "concurrent.futures", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "encodings.cp500", "encodings.idna", "enum", "fractions", "functools", "gc",
    "graphlib", "hashlib", "heapq", "hmac", "html.parser", "importlib.util", "inspect", "io", "itertools", "json",
    "keyword", "linecache", "locale", "logging", "lzma", "math", "numbers", "operator", "os.path", "pathlib", "pickle",
    "platform", "pprint", "queue", "random", "re", "reprlib", "secrets", "shlex", "sqlite3", "stat", "statistics",
    "string", "struct", "sys", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback", "types",
    "typing", "unicodedata", "unittest.mock", "urllib.parse", "uuid", "warnings", "weakref", "xml.etree.ElementTree",
    "zlib", "zoneinfo",
)  # fmt: skip
# Answers what cannot be imported, and which files that should not be there can be read.
KNOWN_PROGRAM = """
def look(modules, files):
    from importlib import import_module
    missing, seen = [], []
    for name in modules:
        try:
            import_module(name)
        except BaseException as error:
            missing.append([name, f"{type(error).__name__}: {error}"])
    for name in files:
        try:
            open(name, "rb").close()
            seen.append(name)
        except OSError:
            pass
    return [missing, seen]
"""


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
    """``inputs`` holds one list of positional arguments for each call of ``entry_point``.

    ``driver``: trusted source, run before the program in a namespace with builtins of its own. Its function ``call`` is
    called instead of the entry point, with the program's namespace before the arguments.
    """

    source: str
    entry_point: str
    inputs: Sequence[Sequence[Any]]
    driver: str = ""


def same(actual: Any, expected: Any) -> bool:
    """Equality with types: True is not 1, 1 not 1.0, a tuple not a list. Dicts and sets have no order."""
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(expected, dict):
        # Keys that are equal but of another type (1 and True) would find each other: compare them with types.
        typed = {(type(key), key) for key in expected}
        return len(actual) == len(expected) and all(
            (type(key), key) in typed and same(value, expected[key]) for key, value in actual.items()
        )
    if isinstance(expected, (set, frozenset)):
        typed = {(type(item), item) for item in expected}
        return len(actual) == len(expected) and all((type(item), item) in typed for item in actual)
    return not isinstance(expected, Failed) and bool(actual == expected)


# --- one program ------------------------------------------------------------------------------------------------------


def _request(program: Program, limits: Limits, tell_layers: bool = False) -> bytes:
    if not hasattr(os, "fork"):
        raise WinnowError(
            "generated code cannot be run safely on this system: use Linux or macOS, or a suite without code"
        )
    return json.dumps(
        {
            "source": program.source, "entry_point": program.entry_point, "driver": program.driver,
            "inputs": [encode(list(call), -ROOM) for call in program.inputs], "limits": vars(limits),
            "tell_layers": tell_layers,
        }
    ).encode()  # fmt: skip


def _outcome(answer: bytes, code: int, limits: Limits, calls: int) -> Outcome:
    """What a keeper's answer means. Whatever is in the answer may have been written by the program itself."""
    if len(answer) > limits.output_bytes:
        return Outcome("too_large", detail=f"more than {limits.output_bytes} bytes came back")
    if code == TIMED_OUT:
        return Outcome("timeout", detail="time was up")
    if not answer:
        return Outcome("crashed", detail=f"no result; exit status {code}")
    try:
        data = json.loads(answer.decode())
        if "error" in data:
            return Outcome("error", detail=_short(data["error"]))
        items = data["outputs"]
        values = decode([item.get("value") for item in items], len(answer))
        outputs = [
            value if "value" in item else Failed(_short(item["failed"]))
            for value, item in zip(values, items, strict=True)
        ]
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, MemoryError):
        return Outcome("crashed", detail="the result is not in the form of one")
    if len(outputs) != calls:
        return Outcome("crashed", detail=f"{len(outputs)} results for {calls} inputs")
    return Outcome("ok", outputs)


def _short(text: Any) -> str:
    return text[:200].encode(errors="replace").decode() if isinstance(text, str) else ""


def run_function(
    source: str, entry_point: str, inputs: Sequence[Sequence[Any]], limits: Limits | None = None, driver: str = ""
) -> Outcome:
    """Run ``source`` and call its ``entry_point`` once for each list of arguments in ``inputs`` (``Program``).

    Arguments and values may be built from the types of ``values.encode``; a value of any other type (subclasses too)
    comes back as ``Failed``. Raises WinnowError where processes cannot be forked, TypeError for an argument of another
    type.
    """
    limits = limits or Limits()
    request = _request(Program(source, entry_point, inputs, driver), limits)
    return _outcome(*talk(request, limits.wall_seconds, limits.output_bytes), limits, len(inputs))


# --- many programs ----------------------------------------------------------------------------------------------------


def run_many(programs: Sequence[Program], limits: Limits | None = None, progress: str = "") -> list[Outcome]:
    """``run_function`` for each program, in order: ``judge_many`` that keeps the outcomes."""
    return judge_many(programs, lambda place, outcome: outcome, limits, progress)


def judge_many(
    programs: Sequence[Program], judge: Callable[[int, Outcome], T], limits: Limits | None = None, progress: str = ""
) -> list[T]:
    """Run each program and give back, in order, ``judge`` of its place and its outcome.

    As many run at a time as there are processors to use. Each outcome is judged when it comes and not kept, so that
    programs that return much do not fill the memory together; of large ones one at a time is unpacked.

    A program that this process has run before under the same limits, that ended by itself and said little, is not run
    again: compressed models often write what the others wrote. Raises WinnowError where the sandbox does not work,
    rather than count every program as wrong.
    """
    layers_in_force()
    limits = limits or Limits()
    places: dict[bytes, list[int]] = {}
    for place, program in enumerate(programs):
        places.setdefault(hashlib.sha256(_request(program, limits)).digest(), []).append(place)

    def one(key: bytes) -> list[T]:
        program = programs[places[key][0]]
        answer, code = _known.get(key) or talk(_request(program, limits), limits.wall_seconds, limits.output_bytes)
        with _unpacking if len(answer) > LARGE_BYTES else nullcontext():
            outcome = _outcome(answer, code, limits, len(program.inputs))
            if outcome.status in ("ok", "error") and len(answer) <= KNOWN_BYTES:
                _known[key] = answer, code
            return [judge(place, outcome) for place in places[key]]

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(_known) > KNOWN_PROGRAMS:
        _known.clear()
    with ThreadPoolExecutor(workers) as pool:
        found = list(progress_bar(progress, len(places), pool.map(one, places)))
    judged = {place: result for key, results in zip(places, found, strict=True)
              for place, result in zip(places[key], results, strict=True)}  # fmt: skip
    return [judged[place] for place in range(len(programs))]


_known: dict[bytes, tuple[bytes, int]] = {}
_unpacking = threading.Lock()


# --- what holds -------------------------------------------------------------------------------------------------------


def layers_in_force() -> list[str]:
    """The layers that hold here, for records to name. They are tried once a process, on a program that imports widely.

    Raises WinnowError where the sandbox does not start, where a program cannot import the whole standard library (right
    programs would count as wrong), and where it can read this project.
    """
    return list(_layers_in_force())


@cache
def _layers_in_force() -> tuple[str, ...]:
    limits = Limits(cpu_seconds=30, wall_seconds=60.0)
    program = Program(KNOWN_PROGRAM, "look", [[list(MODULES), [str(PROJECT / "tasks/__init__.py"), __file__]]])
    answer, code = talk(_request(program, limits, tell_layers=True), limits.wall_seconds, limits.output_bytes)
    outcome = _outcome(answer, code, limits, 1)
    if outcome.status != "ok" or isinstance(outcome.outputs[0], Failed):
        why = outcome.detail or getattr(outcome.outputs[0], "message", "")
        raise WinnowError(
            f"the sandbox for generated code does not work here ({outcome.status}: {why}): run as a user who may read "
            f"{os.path.dirname(os.__file__)}, or use a suite without code"
        )
    missing, seen = outcome.outputs[0]
    lacking = [(name, why) for name, why in missing if _is_here(name)]
    if lacking:
        raise WinnowError(
            f"the sandbox for generated code cannot import {len(lacking)} modules of the standard library, "
            f"{lacking[0][0]} among them ({lacking[0][1]}), so that right programs would fail: run as a user other "
            f"than root, or with a Python whose folder ({os.path.dirname(os.__file__)}) others may read"
        )
    if seen:
        raise WinnowError(
            f"programs in the sandbox can read {seen[0]}, and so how they are checked: install winnow into a virtual "
            "environment of its own"
        )
    return tuple(json.loads(answer)["layers"])


def _is_here(module: str) -> bool:
    """Whether this interpreter has the module, with all that it needs."""
    try:
        return find_spec(module) is not None and bool(__import__(module))
    except ImportError:
        return False
