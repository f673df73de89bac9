"""The other side of ``tasks.sandbox.run``: it locks itself in and then runs one untrusted program.

A fresh interpreter imports this folder and nothing else of the project (``start``). That one, the nursery, moves into a
root of its own where it can, and then only forks. The first process of a program, the keeper, makes the namespaces,
forks the process that runs the program, kills whatever is left of it at the end or at the deadline, and runs no
untrusted code itself. The second gives up every right before it sees the program.
"""

import builtins
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.sandbox import files, layers, system_calls
from tasks.sandbox.values import decode, encode

TIMED_OUT = 124
OWN_ROOT, FOLDERS = b"r", b"f"  # what the nursery says when it is ready: whether it needs folders
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Surroundings:
    """What holds for all programs of a nursery. ``places`` are those that can be read, ``hidden`` exceptions to them,
    ``rules`` the same for Landlock.

    ``as_nobody``: programs run as the user nobody. Else root gives up its capabilities instead, which needs Landlock
    and seccomp: it still owns the system's files.
    """

    libc: Any
    own_root: bool
    as_nobody: bool
    places: Sequence[str]
    hidden: Sequence[str]
    rules: dict[str, int]


def start(requests: int, project: str) -> None:
    """Serves on the socket ``requests`` (a descriptor) until its other end is gone."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tasks"]:
        del sys.modules[name]  # or a program could import them
    os.umask(0o022)
    with socket.socket(fileno=requests) as connection:
        around = surroundings(project, os.getcwd())
        connection.send(OWN_ROOT if around.own_root else FOLDERS)
        serve(connection, around)


def surroundings(project: str, temporary: str) -> Surroundings:
    """Made once, from what this system and this user allow."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    places = files.library_places()
    hidden = files.hidden_places(places, project)
    own_root = libc is not None and layers.enter_user_namespace(libc) and files.enter_own_root(libc, places, hidden)
    root = os.getuid() == 0
    reachable = files.library_open_to_others() and (own_root or files.open_to_others(temporary))
    confined = libc is not None and files.landlock_version(libc) >= 1 and system_calls.can_filter()
    as_nobody = root and _has_nobody() and (reachable or not confined)
    if own_root:
        places, hidden = ["/"], []
    return Surroundings(libc, own_root, as_nobody, places, hidden, files.reading_rules(places, hidden))


def _has_nobody() -> bool:
    """Whether there is such a user: not in every container."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            layers.become_nobody()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def serve(requests: socket.socket, around: Surroundings) -> None:
    """Forks a keeper for every message: the base folder, with the keeper's standard input, output and status.

    A keeper begins as an interpreter that has seen nothing but this folder, in a session of its own. It writes its
    process number to its status file, and its exit status at the end. Returns when the other side is gone.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers: the system takes them away
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 4096, 3)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            for place, descriptor in enumerate(descriptors[:2]):
                os.dup2(descriptor, place)
            base, status = message.decode(), descriptors[2]
            for descriptor in descriptors[:2]:
                os.close(descriptor)
            os.chdir(base)
            os.write(status, b"%d " % os.getpid())
            os.write(status, b"%d" % keep(around, base, status))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(around: Surroundings, base: str, status: int) -> int:
    """The keeper. The request comes as one line, JSON, on standard input, whose end means: stop now. ``status`` is a
    descriptor that the program's process must not have.

    Exit status: that of the program, 128 + the signal that ended it, or ``TIMED_OUT``.
    """
    started = time.monotonic()
    libc = around.libc
    control = os.dup(0)
    request = json.loads(sys.stdin.buffer.readline())
    limits = request["limits"]
    held = layers.enter_namespaces(libc) if libc is not None else []
    if around.own_root:
        scratch = files.WORK
        held.append("own_root")
        if "pid_namespace" not in held:
            raise OSError("no namespace for processes")  # nothing but it would end them: there is no /proc
    else:
        scratch = os.path.join(base, "work")
    owner = layers.NOBODY if around.as_nobody else os.getuid()
    if "mount_namespace" in held and files.mount_scratch(libc, scratch, limits, owner):
        held.append("scratch_in_memory")
    elif around.own_root:
        raise OSError("no scratch folder")
    elif around.as_nobody:
        os.chown(scratch, layers.NOBODY, layers.NOBODY)
    if libc is not None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    result, (alive, held_open) = os.dup(1), os.pipe()
    pid = os.fork()
    if pid == 0:
        for descriptor in (alive, control, status):
            os.close(descriptor)
        _inner(around, request, held, scratch, result)
    for descriptor in (1, held_open, result):
        os.close(descriptor)
    left = max(0.0, limits["wall_seconds"] - (time.monotonic() - started))
    # Ready means: the program's process has ended (or closed its end), or the parent wants it ended.
    late = not select.select([alive, control], [], [], left)[0]
    code, cpu = _end(libc, pid, "pid_namespace" in held)
    return TIMED_OUT if late or (code > 128 and cpu > limits["cpu_seconds"] - 0.5) else code


def _children() -> list[int]:
    with open("/proc/thread-self/children") as file:
        return [int(child) for child in file.read().split()]


def _end(libc: Any, pid: int, in_namespace: bool) -> tuple[int, float]:
    """Kill the inner process with everything it started; its exit code (128 + signal) and CPU seconds."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    # In a process namespace this returns when all of its processes are gone.
    _, status, usage = os.wait4(pid, 0)
    if libc is not None and not in_namespace:
        # What escaped from the process group is by now a child of this subreaper.
        with contextlib.suppress(OSError):
            while left := _children():
                os.kill(left[0], signal.SIGKILL)
                os.waitpid(left[0], 0)
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code), usage.ru_utime + usage.ru_stime


# --- the program's process --------------------------------------------------------------------------------------------


def _inner(around: Surroundings, request: dict[str, Any], held: list[str], scratch: str, result: int) -> None:
    """The process that runs the program. Does not return."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.close(nothing)
        held += _lock_in(around, request["limits"], scratch)
        message = json.dumps(_run_program(request) | ({"layers": held} if request["tell_layers"] else {})).encode()
    except BaseException as error:
        message = json.dumps({"error": _describe(error)["failed"]}).encode()
    with contextlib.suppress(BaseException):
        while message:
            message = message[os.write(result, message) :]
    # No exit handlers: the program may have registered some.
    os._exit(0)


def _lock_in(around: Surroundings, limits: dict[str, int], scratch: str) -> list[str]:
    """Everything that is given up before the program is seen; the names of the layers that hold."""
    libc, held = around.libc, []
    os.chdir(scratch)
    if around.as_nobody:
        layers.become_nobody()
        held.append("unprivileged_user")
    elif libc is not None and layers.drop_capabilities(libc):
        held.append("no_capabilities")
    # A change of user clears what this does, so it comes after it.
    if libc is not None and layers.give_up_new_rights(libc):
        held.append("no_new_privileges")
    held += layers.limit_resources(limits)
    if libc is not None and files.restrict_files(libc, around.rules):
        held.append("landlock")
    if libc is not None and system_calls.filter_system_calls(libc):
        held.append("seccomp")
    if os.getuid() == 0 and not around.as_nobody and not {"no_capabilities", "landlock", "seccomp"} <= set(held):
        raise PermissionError("no program is run as root without Landlock and seccomp")
    layers.watch(os.path.realpath(scratch), around.places, around.hidden)
    if libc is not None:
        vars(libc).clear()  # what has been loaded already is not to be found by looking around
    return [*held, "audit_hook"]


def _run_program(request: dict[str, Any]) -> dict[str, Any]:
    """The value of the function on each list of arguments, or how it failed."""
    driver: dict[str, Any] = {"__name__": "driver", "__builtins__": dict(vars(builtins))}
    space: dict[str, Any] = {"__name__": "program"}
    exec(compile(request["driver"], "driver", "exec"), driver)
    try:
        exec(compile(request["source"], "program", "exec"), space)
        function: Callable[..., Any] = space[request["entry_point"]]
    except BaseException as error:
        return {"error": _describe(error)["failed"]}
    outputs = []
    for arguments in request["inputs"]:
        try:
            given = decode(arguments)
            outputs.append({"value": encode(driver["call"](space, *given) if "call" in driver else function(*given))})
        except BaseException as error:
            outputs.append(_describe(error))
    return {"outputs": outputs}


def _describe(error: BaseException) -> dict[str, str]:
    try:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    except BaseException:
        return {"failed": "an exception that does not print"}
