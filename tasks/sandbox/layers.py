"""What a process gives up before it runs a program, beside files (``files``) and system calls (``system_calls``)."""

import contextlib
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any

NOBODY = 65534
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000
CLONE_NEWNS = 0x20000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
NAMESPACES = {"mount": CLONE_NEWNS, "network": CLONE_NEWNET, "ipc": CLONE_NEWIPC, "pid": CLONE_NEWPID}

REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "os.kill", "pty.",
    "ctypes.", "signal.pthread_kill", "_posixsubprocess.", "resource.setrlimit",
)  # fmt: skip
CHANGING = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move",
)  # fmt: skip
LISTING = ("os.listdir", "os.scandir")


def enter_user_namespace(libc: Any) -> bool:
    """Whether this process may make other namespaces: root may, others in a user namespace in which they are themselves
    and nobody else."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        return True
    if libc.unshare(CLONE_NEWUSER) != 0:
        return False
    with contextlib.suppress(OSError):
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def enter_namespaces(libc: Any) -> list[str]:
    """New mount, network, IPC and process namespaces, as far as the kernel allows."""
    if libc.unshare(sum(NAMESPACES.values())) == 0:
        return [f"{name}_namespace" for name in NAMESPACES]
    return [f"{name}_namespace" for name, flag in NAMESPACES.items() if libc.unshare(flag) == 0]


def limit_resources(limits: dict[str, int]) -> list[str]:
    wanted = {
        "RLIMIT_CPU": limits["cpu_seconds"],
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["disk_bytes"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
    }
    done = []
    for name, value in wanted.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, name), (value, value))
            done.append(name.lower())
    return done


def become_nobody() -> None:
    """For root alone. Raises OSError where there is no such user, as in some containers."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def drop_capabilities(libc: Any) -> bool:
    return bool(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0)


def give_up_new_rights(libc: Any) -> bool:
    """No program file can give rights back; and the process ends with the one that forked it."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return bool(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)


def watch(scratch: str, places: Sequence[str], hidden: Sequence[str]) -> None:
    """An audit hook: what the interpreter itself can refuse where the kernel cannot. Not proof on its own.

    Files are written below ``scratch`` alone, and read there and in ``places`` without ``hidden``.
    """
    below, realpath, fsdecode = os.path.join(scratch, ""), os.path.realpath, os.fsdecode
    shown, covered = (tuple(os.path.join(realpath(place), "") for place in some) for some in (places, hidden))
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    named = (str, bytes, os.PathLike)

    def inside(path: Any) -> bool:
        return isinstance(path, named) and realpath(fsdecode(path)).startswith(below)

    def is_shown(path: Any) -> bool:
        if path is None or isinstance(path, int):
            return True
        real = os.path.join(realpath(fsdecode(path)), "")
        return real.startswith(below) or (real.startswith(shown) and not real.startswith(covered))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            if flags & writes and not inside(path) and path != os.devnull:
                raise PermissionError(f"{path!r} is not allowed here")
            if not is_shown(path):
                raise FileNotFoundError(f"{path!r} is not here")
        elif event in LISTING:
            if not is_shown(arguments[0]):
                raise FileNotFoundError(f"{arguments[0]!r} is not here")
        elif event.startswith(CHANGING):
            count = 2 if event in ("os.rename", "os.link", "shutil.move") else 1
            if not all(inside(path) for path in arguments[:count]):
                raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)
