"""The other side of ``tasks.sandbox.run``: a script that locks itself in and then runs one untrusted program.

It is started in a fresh interpreter and imports nothing of the project. That one only forks: the first process of a
program (the keeper) makes the namespaces, forks the process that runs the program, kills whatever is left of it at
the end or at the deadline, and runs no untrusted code itself. The second gives up every right before it sees the
program.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

NOBODY = 65534
TIMED_OUT = 124
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = (1, 22, 36, 38)

# What the program may not ask of the kernel: name -> (number on x86_64, number on aarch64; -1: not there).
SYSCALLS = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # processes
    "fork": (57, -1), "vfork": (58, -1), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154), "prctl": (157, 167),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "prlimit64": (302, 261), "setrlimit": (160, 164),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    # memory that outlives the process or escapes its limit
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgctl": (71, 187), "mq_unlink": (241, 181),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # what Landlock leaves open on files
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "lchown": (94, -1), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, -1),
    "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "inotify_init": (253, -1), "inotify_init1": (294, 26), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "acct": (163, 89),
    # the machine
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "swapon": (167, 224), "swapoff": (168, 225), "personality": (135, 92), "syslog": (103, 116),
    "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1), "vhangup": (153, 58), "kcmp": (312, 272),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
# Calls that are newer than these lists (the same numbers on every machine) are refused too.
FIRST_UNKNOWN = 462
# Most of fcntl is harmless; F_SETOWN, F_SETSIG and F_SETOWN_EX have the kernel send any signal to any process.
FCNTL, FCNTL_REFUSED = (72, 25), (8, 10, 15)
AUDIT_ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def encode(value: Any) -> Any:
    """JSON that keeps tuples, sets, complex numbers and keys that are no strings. Raises TypeError for other types.

    Types are compared exactly, so a subclass with its own ``__eq__`` or ``__repr__`` is never called.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(item) for item in value]
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item) for item in value]}
    raise TypeError("a value of a type that is not compared")


def decode(value: Any) -> Any:
    """The inverse of ``encode``. ValueError, TypeError, KeyError or RecursionError for anything else."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "complex":
        return complex(*items)
    if kind == "dict":
        return dict(zip(_spread([decode(key) for key, _ in items]), [decode(item) for _, item in items], strict=True))
    decoded = [decode(item) for item in items]
    return tuple(decoded) if kind == "tuple" else {"set": set, "frozenset": frozenset}[kind](_spread(decoded))


def _spread(keys: list[Any]) -> list[Any]:
    """``keys``, unless many share a hash: a set of such takes the square of their number of steps to build."""
    if len(keys) > 1000 and len({hash(key) for key in keys}) < len(keys) // 2:
        raise ValueError("keys that share their hashes")
    return keys


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _enter_namespaces(libc: Any) -> list[str]:
    """New user (unless root), mount, network, IPC and process namespaces, as far as the kernel allows."""
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        if libc.unshare(CLONE_NEWUSER) != 0:
            return []
        with contextlib.suppress(OSError):
            maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
    wanted = {"mount": CLONE_NEWNS, "network": CLONE_NEWNET, "ipc": CLONE_NEWIPC, "pid": CLONE_NEWPID}
    return [f"{name}_namespace" for name, flag in wanted.items() if libc.unshare(flag) == 0]


def _mount_scratch(libc: Any, scratch: str, limits: dict[str, int]) -> bool:
    """Memory as the scratch folder's file system: bounds all files together and is gone with its process."""
    private, safe = 1 << 18 | 1 << 14, 2 | 4 | 8  # MS_PRIVATE | MS_REC; MS_NOSUID | MS_NODEV | MS_NOEXEC
    if libc.mount(None, b"/", None, private, None) != 0:
        return False
    owner = NOBODY if os.getuid() == 0 else os.getuid()
    options = f"size={limits['disk_bytes']},nr_inodes={limits['files']},mode=700,uid={owner}".encode()
    return libc.mount(b"tmpfs", scratch.encode(), b"tmpfs", safe, options) == 0


def _open_to_others(path: str) -> bool:
    """Whether another user may pass through the folder and all those above it."""
    above = os.path.dirname(path)
    return bool(os.stat(path).st_mode & 1) and (above == path or _open_to_others(above))


def _reach_library(libc: Any, place: str, may_mount: bool) -> bool:
    """Whether nobody can import the library; that of root's own Python is bound to ``place`` for it."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    if os.getuid() != 0 or _open_to_others(library):
        return True
    bind = 1 << 12
    if (
        not may_mount
        or not _open_to_others(place)
        or libc.mount(library.encode(), place.encode(), None, bind, None) != 0
    ):
        return False
    for paths in [sys.path, *(m.__path__ for m in sys.modules.values() if hasattr(m, "__path__"))]:
        paths[:] = [place + path.removeprefix(library) if path.startswith(library) else path for path in paths]
    sys.path_importer_cache.clear()
    return True


def _landlock_abi(libc: Any) -> int:
    """The version of Landlock that the kernel offers; below 1 without."""
    return int(libc.syscall(444, None, ctypes.c_size_t(0), 1))


def _restrict_files(libc: Any) -> bool:
    """Landlock: read the standard library and system libraries, write below the working folder, no more."""
    abi = _landlock_abi(libc)
    if abi < 1:
        return False
    execute, write_file, read_file, read_folder, device_control = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 15
    # Later versions add rights: to move (2), to cut (3), to control devices (5); TCP (4); scopes (6).
    everything = (1 << 13) - 1 | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)
    everything |= device_control if abi >= 5 else 0
    attributes = struct.pack("QQQ", everything, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    libraries = {*sys.path, os.path.dirname(os.__file__), os.path.join(sys.base_exec_prefix, "lib")}
    libraries |= {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo"}
    rules = {path: read_file | read_folder for path in libraries}
    rules |= dict.fromkeys(("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"), read_file)
    rules |= {os.devnull: read_file | write_file, os.curdir: everything & ~execute & ~device_control}
    for path, allowed in rules.items():
        with contextlib.suppress(OSError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    done = libc.syscall(446, ruleset, 0)
    os.close(ruleset)
    return bool(done == 0)


def _filter_syscalls(libc: Any) -> bool:
    """A seccomp filter that answers each of ``SYSCALLS`` with EPERM and ends a process of another ABI."""
    if platform.machine() not in AUDIT_ARCHES:
        return False
    column, arch = AUDIT_ARCHES[platform.machine()]
    numbers = sorted({numbers[column] for numbers in SYSCALLS.values()} - {-1})
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    deny, allow, end = 0x00050000 | 1, 0x7FFF0000, 0x80000000
    # Fields: code, instructions to skip if true and if false, operand. x32 numbers (bit 30) reach the same calls, and
    # are above FIRST_UNKNOWN.
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, end), (load, 0, 0, 0)]
    command = [(load, 0, 0, 24)]  # the second argument
    command += [(equal, len(FCNTL_REFUSED) - i, 0, number) for i, number in enumerate(FCNTL_REFUSED)]
    command += [(give, 0, 0, allow), (give, 0, 0, deny)]
    program += [(at_least, len(command) + len(numbers) + 2, 0, FIRST_UNKNOWN)]
    program += [(equal, 0, len(command), FCNTL[column]), *command]
    program += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(give, 0, 0, allow), (give, 0, 0, deny)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0)


def _limit_resources(limits: dict[str, int]) -> list[str]:
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


def _drop_identity(libc: Any) -> bool:
    """Root becomes nobody; anyone else gives up the capabilities that a user namespace lent."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return True
    if libc is not None:
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    return False


def _watch(scratch: str) -> None:
    """An audit hook: what the interpreter itself can refuse where the kernel cannot. Not proof on its own."""
    refused = (
        "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "os.kill",
        "pty.", "ctypes.", "signal.pthread_kill", "_posixsubprocess.", "resource.setrlimit",
    )  # fmt: skip
    changing = (
        "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
        "os.chown", "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move",
    )  # fmt: skip
    below, realpath, fsdecode = scratch + os.sep, os.path.realpath, os.fsdecode
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: Any) -> bool:
        return isinstance(path, (str, bytes, os.PathLike)) and realpath(fsdecode(path)).startswith(below)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            hidden = realpath(fsdecode(path)).startswith("/proc")
            if hidden or (flags & writes and not inside(path) and path != os.devnull):
                raise PermissionError(f"{path!r} is not allowed here")
        elif event.startswith(changing):
            count = 2 if event in ("os.rename", "os.link", "shutil.move") else 1
            if not all(inside(path) for path in arguments[:count]):
                raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)


def _lock_in(libc: Any, request: dict[str, Any], scratch: str) -> list[str]:
    """Everything that is given up before the program is seen; the names of the layers that hold."""
    limits = request["limits"]
    layers = []
    if {"pid_namespace", "mount_namespace"} <= set(request["layers"]):
        libc.mount(b"proc", b"/proc", b"proc", 2 | 4 | 8, None)
    os.chdir(scratch)
    if _drop_identity(libc):
        layers.append("unprivileged_user")
    if libc is not None:
        # A change of user clears the first of these two, so they come after it.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            layers.append("no_new_privileges")
    layers += _limit_resources(limits)
    if libc is not None and _restrict_files(libc):
        layers.append("landlock")
    if libc is not None and _filter_syscalls(libc):
        layers.append("seccomp")
    _watch(os.path.realpath(scratch))
    return [*layers, "audit_hook"]


def _describe(error: BaseException) -> dict[str, str]:
    try:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    except BaseException:
        return {"failed": "an exception that does not print"}


def _run_program(request: dict[str, Any]) -> dict[str, Any]:
    """The value of the function on each list of arguments, or how it failed."""
    space: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(request["source"], "program", "exec"), space)
        function = space[request["entry_point"]]
    except BaseException as error:
        return {"error": _describe(error)["failed"]}
    outputs = []
    for arguments in request["inputs"]:
        try:
            outputs.append({"value": encode(function(*decode(arguments)))})
        except BaseException as error:
            outputs.append(_describe(error))
    return {"outputs": outputs}


def _inner(libc: Any, request: dict[str, Any], scratch: str, result: int) -> None:
    """The process that runs the program. Does not return."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        layers = request["layers"] + _lock_in(libc, request, scratch)
        answer = {"layers": layers} if request["source"] is None else _run_program(request)
        message = json.dumps(answer).encode()
    except BaseException as error:
        message = json.dumps({"error": _describe(error)["failed"]}).encode()
    with contextlib.suppress(BaseException):
        while message:
            message = message[os.write(result, message) :]
    # No exit handlers: the program may have registered some.
    os._exit(0)


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


def serve(requests: socket.socket) -> None:
    """Forks a keeper for every message: the base folder, with the keeper's standard input, output and status.

    A keeper begins as an interpreter that has seen nothing but this script, in a session of its own. It writes its
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
            os.write(status, b"%d" % main(base, status))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def main(base: str, status: int) -> int:
    """The keeper. The request comes as one line, JSON, on standard input, whose end means: stop now. ``status`` is a
    descriptor that the program's process must not have.

    Exit status: that of the program, 128 + the signal that ended it, or ``TIMED_OUT``.
    """
    started = time.monotonic()
    scratch, library = os.path.join(base, "work"), os.path.join(base, "library")
    control = os.dup(0)
    request = json.loads(sys.stdin.buffer.readline())
    limits, libc = request["limits"], _libc()
    layers = _enter_namespaces(libc) if libc is not None else []
    if "mount_namespace" in layers and _mount_scratch(libc, scratch, limits):
        layers.append("scratch_in_memory")
    elif os.getuid() == 0:
        os.chown(scratch, NOBODY, NOBODY)
    if _reach_library(libc, library, "mount_namespace" in layers):
        layers.append("standard_library")
    request["layers"] = layers
    if libc is not None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    result, (alive, held) = os.dup(1), os.pipe()
    pid = os.fork()
    if pid == 0:
        for descriptor in (alive, control, status):
            os.close(descriptor)
        _inner(libc, request, scratch, result)
    for descriptor in (1, held, result):
        os.close(descriptor)
    left = max(0.0, limits["wall_seconds"] - (time.monotonic() - started))
    # Ready means: the program's process has ended (or closed its end), or the parent wants it ended.
    late = not select.select([alive, control], [], [], left)[0]
    code, cpu = _end(libc, pid, "pid_namespace" in layers)
    return TIMED_OUT if late or (code > 128 and cpu > limits["cpu_seconds"] - 0.5) else code


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        serve(requests)
